"""A run of the evaluation: what it returns and writes, how it continues after a stop, and what it does with bad input."""

import errno
import json
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_benchmarks import MAKERS, edit_json
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder

from mfrsvlm.evaluation import EvaluationSettings, answer_log, evaluate, evaluate_majority, load_benchmark
from mfrsvlm.evaluation.answering import Answer, Answerer, fingerprint, load
from mfrsvlm.evaluation.batches import make_plan
from mfrsvlm.evaluation.benchmarks import BenchmarkError
from mfrsvlm.evaluation.benchmarks.sample import LIST_TASKS
from mfrsvlm.evaluation.evaluate import make_runs
from mfrsvlm.evaluation.protocols import PROTOCOLS


PROTOCOL = "strict-without-java"
SETTINGS = EvaluationSettings(batch_size=3, images_per_chunk=2, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    """A tiny model and its processor."""
    return load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    roots = {}
    for name in ("rsvqa-lr", "scenes", "aid", "dior-rsvg"):
        roots[name] = tmp_path_factory.mktemp(name)
        MAKERS[name](roots[name])
    return roots


@pytest.fixture(scope="module")
def benchmarks(data):
    return {name: load_benchmark(name, root, check_counts=False) for name, root in data.items()}


def run(model, benchmark, output=None, **settings):
    """The summary of one benchmark. Files lie in OUTPUT/BENCHMARK/SPLIT."""
    summaries = evaluate(*model, [benchmark], PROTOCOL, replace(SETTINGS, output=output, **settings))
    assert list(summaries) == [f"{benchmark.name}/{benchmark.split}"]
    return summaries[f"{benchmark.name}/{benchmark.split}"]


def files(output, benchmark="rsvqa-lr/test"):
    """The predictions and the summary of a run, without times."""
    folder = output / benchmark
    summary = json.loads((folder / "summary.json").read_text())
    return (folder / "predictions.jsonl").read_text(), {**summary, "seconds": None}


def rows(output, benchmark="rsvqa-lr/test"):
    return [json.loads(line) for line in files(output, benchmark)[0].split("\n")[:-1]]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(PROTOCOLS[PROTOCOL], "max_new_tokens", 4)
    monkeypatch.setattr(PROTOCOLS[PROTOCOL], "max_new_list_tokens", 6)


def test_a_run_writes_every_question_with_its_score(model, benchmarks, tmp_path):
    summary = run(model, benchmarks["scenes"], tmp_path)
    found = rows(tmp_path, "scenes/test")
    assert json.loads((tmp_path / "scenes/test/summary.json").read_text()) == summary
    assert summary["counts"]["samples"] == len(found) == len({row["id"] for row in found})
    assert set(summary["results"]) >= {
        "classification",
        "vqa",
        "counting",
        "captioning",
        "grounding",
        "detection",
        "pointing",
    }
    for task, figures in summary["results"].items():
        scored = [row["score"] for row in found if row["task"] == task]
        main = {"classification": "accuracy", "vqa": "accuracy", "counting": "exact"}.get(task)
        if main:
            assert figures[main]["value"] == pytest.approx(sum(scored) / len(scored)) and figures[main]["n"] == len(scored)
            assert figures[main]["low"] <= figures[main]["value"] <= figures[main]["high"]
    keys = {"id", "task", "group", "images", "prompt", "answer", "truncated", "parsed", "score"}
    assert all(keys <= row.keys() and ("references" in row) != ("boxes" in row) for row in found)
    yes_no = [row for row in found if row.get("references") in (["yes"], ["no"])]
    assert yes_no and all("yes_probability" in row for row in yes_no)
    assert summary["counts"]["truncated_answers"] == sum(row["truncated"] for row in found)


def test_a_summary_names_the_model_and_what_figures_depend_on(model, benchmarks):
    summary = run(model, benchmarks["rsvqa-lr"], model_name="My model", limit=999)
    assert summary["model"]["name"] == "My model" and summary["model"]["revision"] is None
    assert summary["model"]["fingerprint"] == fingerprint(model[0]) and summary["model"]["parameters"] > 0
    assert (summary["protocol"], summary["split"], summary["seed"]) == (PROTOCOL, "test", 0)
    assert summary["limit"] is None  # there are fewer, so none was left out
    assert summary["versions"]["torch"] == torch.__version__
    assert {"python", "mfrsvlm", "transformers", "evaluate", "pycocoevalcap"} <= summary["versions"].keys()
    assert summary["generation"] == {"max_new_tokens": 4, "do_sample": False}
    assert run(model, benchmarks["rsvqa-lr"], limit=2)["model"]["name"] == "tiny"  # the folder that it was loaded from


def test_nothing_is_written_without_an_output_folder(model, benchmarks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = run(model, benchmarks["rsvqa-lr"], tmp_path / "out")
    in_memory = run(model, benchmarks["rsvqa-lr"])
    assert {**in_memory, "seconds": None} == {**written, "seconds": None}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.integration
def test_several_benchmarks_in_one_run(model, benchmarks, tmp_path):
    chosen = [benchmarks[name] for name in ("rsvqa-lr", "dior-rsvg", "scenes")]
    settings = replace(SETTINGS, output=tmp_path, limit=4)
    summaries = evaluate(*model, chosen, PROTOCOL, settings)
    assert list(summaries) == ["rsvqa-lr/test", "dior-rsvg/test", "scenes/test"]
    for key, summary in summaries.items():
        alone = run(model, benchmarks[key.split("/")[0]], limit=4)
        assert {**alone, "seconds": None} == {**summary, "seconds": None} == files(tmp_path, key)[1]
    more = evaluate(*model, [*chosen, benchmarks["aid"]], PROTOCOL, settings)  # continues with what is new
    assert more["scenes/test"]["results"] == summaries["scenes/test"]["results"] and "aid/all" in more


def test_model_and_processor_stay_as_they_were(folder, benchmarks):
    model, processor = load(str(folder), dtype="float32")
    model.train()
    model.model.vision_tower.eval()
    model.config.use_cache = False
    generation, processor.tokenizer.padding_side = model.generation_config, "right"
    before = [module.training for module in model.modules()], generation.to_dict(), model.config.to_dict()
    random = torch.get_rng_state()
    summary = run((model, processor), benchmarks["rsvqa-lr"], limit=4)
    assert before == ([m.training for m in model.modules()], model.generation_config.to_dict(), model.config.to_dict())
    assert model.generation_config is generation and processor.tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), random)  # so that training goes on as without an evaluation
    assert {**summary, "seconds": None} == {
        **run((model.eval(), processor), benchmarks["rsvqa-lr"], limit=4),
        "seconds": None,
    }


def test_a_quantized_model(folder, benchmarks):
    model, processor = load(str(folder), dtype="float32")
    before = run((model, processor), benchmarks["rsvqa-lr"], limit=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = {module for module in model.modules() if isinstance(module, torch.nn.Linear)}
        assert layers
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        summary = run((quantized, processor), benchmarks["rsvqa-lr"], limit=4)
    assert summary["counts"]["samples"] == 4 and summary["model"]["fingerprint"] != before["model"]["fingerprint"]


@pytest.mark.integration
def test_adapters_in_memory_and_merged_score_alike(folder, benchmarks):
    peft = pytest.importorskip("peft")
    model, processor = load(str(folder), dtype="float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    summary = run((adapted, processor), benchmarks["rsvqa-lr"], limit=4)
    merged = run((adapted.merge_and_unload(), processor), benchmarks["rsvqa-lr"], limit=4)
    assert summary["results"].keys() == merged["results"].keys()
    assert summary["counts"] == merged["counts"] and summary["model"]["architecture"].startswith("Peft")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_run_continues_and_ends_with_the_same_files(model, benchmarks, tmp_path, monkeypatch, after):
    single = {"batch_size": 1, "images_per_chunk": 1}
    run(model, benchmarks["rsvqa-lr"], tmp_path / "whole", **single)
    asked = []
    answer = Answerer.answer

    def stopped(self, batch, encoded, limit):
        if len(asked) == after:
            raise Stopped
        asked.append(batch)
        return answer(self, batch, encoded, limit)

    monkeypatch.setattr(Answerer, "answer", stopped)
    with pytest.raises(Stopped):
        run(model, benchmarks["rsvqa-lr"], tmp_path / "parts", **single)
    log = tmp_path / "parts/rsvqa-lr/test/answers-0.jsonl"
    with log.open("a") as file:
        file.write('{"id": "test-000')  # killed while it wrote a line
    again = []
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, *rest: again.append(batch) or answer(self, batch, *rest))
    run(model, benchmarks["rsvqa-lr"], tmp_path / "parts", **single)
    assert files(tmp_path / "parts") == files(tmp_path / "whole") and again
    monkeypatch.setattr(Answerer, "answer", None)  # a finished run asks nothing
    run(model, benchmarks["rsvqa-lr"], tmp_path / "parts", **single)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_run_that_was_killed_in_its_first_moment_continues(model, benchmarks, tmp_path):
    (tmp_path / "rsvqa-lr/test").mkdir(parents=True)
    (tmp_path / "rsvqa-lr/test/.settings.json.123.unfinished").write_text('{"format"')
    run(model, benchmarks["rsvqa-lr"], tmp_path, limit=2)
    assert len(rows(tmp_path)) == 2


def test_line_breaks_within_answers_are_kept(model, benchmarks, tmp_path, monkeypatch):
    """Some that JSON leaves as they are, but by which Python splits lines."""
    text = "a\u2028b\u0085c\x0bd\re\nf"
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, *rest: [Answer(text, 0.5) for _ in batch])
    for _ in range(2):
        run(model, benchmarks["rsvqa-lr"], tmp_path, limit=4)
        assert [row["answer"] for row in rows(tmp_path)] == [text] * 4


def test_a_run_does_not_continue_with_other_questions_or_another_template(model, data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    processor = model[1]
    run(model, load_benchmark("rsvqa-lr", root, check_counts=False), tmp_path / "out")
    template = processor.chat_template
    processor.chat_template = template + "!"
    with pytest.raises(ValueError, match="chat_template"):
        run(model, load_benchmark("rsvqa-lr", root, check_counts=False), tmp_path / "out")
    processor.chat_template = template
    edit_json(root / "LR_split_test_questions.json", lambda c: c["questions"][0].update(question="Is it another one?"))
    with pytest.raises(ValueError, match="questions = "):
        run(model, load_benchmark("rsvqa-lr", root, check_counts=False), tmp_path / "out")


@pytest.mark.integration
@pytest.mark.parametrize("peer", [tiny_llava, tiny_qwen2_vl])
@pytest.mark.parametrize("benchmark", ["rsvqa-lr", "aid", "dior-rsvg", "scenes"])
def test_models_of_other_families(peer, benchmark, benchmarks, tmp_path):
    model = load(str(peer(tmp_path / "peer")), trust_remote_code=True)
    chosen = benchmarks[benchmark]
    key = f"{chosen.name}/{chosen.split}"
    summary = run(model, chosen, tmp_path / "out")
    assert summary["model"]["architecture"].startswith(("Llava", "Qwen2VL"))
    found = rows(tmp_path / "out", key)
    assert len(found) == summary["counts"]["samples"] > 0
    run(model, chosen, tmp_path / "alone", share_images=False)
    assert [row["answer"] for row in rows(tmp_path / "alone", key)] == [row["answer"] for row in found]


def test_blind_prompts_hold_no_image(model, benchmarks, monkeypatch):
    asked = []
    answer = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, *rest: asked.extend(batch) or answer(self, batch, *rest))
    monkeypatch.setattr(Answerer, "_encode", None)
    summary = run(model, benchmarks["rsvqa-lr"], blind=True)
    assert summary["mode"] == "blind" and asked and all(prompt.group is None for prompt in asked)


def test_the_majority_baseline_needs_no_model(benchmarks, tmp_path):
    chosen = [benchmarks["rsvqa-lr"], benchmarks["scenes"]]
    summaries = evaluate_majority(chosen, PROTOCOL, EvaluationSettings(output=tmp_path))
    summary = summaries["rsvqa-lr/test"]
    assert summary["mode"] == "majority" and summary["model"] == {"name": "majority"}
    assert summary["results"]["vqa"]["accuracy"]["value"] == 1  # every question of the stand-in is the only one of its type
    assert files(tmp_path, "scenes/test")[1] == {**summaries["scenes/test"], "seconds": None}
    with pytest.raises(ValueError, match="never uses images"):
        evaluate_majority(chosen, PROTOCOL, EvaluationSettings(blind=True))


def test_a_limit_is_a_sample_that_the_seed_draws(model, benchmarks, tmp_path):
    ids = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        run(model, benchmarks["rsvqa-lr"], tmp_path / name, limit=2, seed=seed)
        ids.append([row["id"] for row in rows(tmp_path / name)])
    assert ids[0] == ids[1] != ids[2] and all(len(chosen) == 2 for chosen in ids)


def test_a_model_that_says_nothing_is_always_wrong(model, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, *rest: [Answer("", 0.5) for _ in batch])
    summary = run(model, benchmarks["scenes"], tmp_path)
    assert summary["counts"]["empty_answers"] == summary["counts"]["samples"]
    assert all(row["score"] == 0 for row in rows(tmp_path, "scenes/test"))


def test_a_model_that_says_only_special_tokens_says_nothing(folder, benchmarks, tmp_path):
    weights, processor = load(str(folder), dtype="float32")
    weights.model.language_model.norm.weight.data.zero_()  # all words as likely, so that the first is taken: <unk>
    summary = run((weights, processor), benchmarks["scenes"], tmp_path)
    assert summary["counts"]["empty_answers"] == summary["counts"]["samples"] == len(rows(tmp_path, "scenes/test"))
    assert all(row["answer"] == "" and row["score"] == 0 for row in rows(tmp_path, "scenes/test"))


def test_missing_images_stop_the_run_or_score_zero(model, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    gone = sorted(root.rglob("*.tif"))[0]
    gone.unlink()
    benchmark = load_benchmark("rsvqa-lr", root, check_counts=False, check_images=False)
    with pytest.raises(BenchmarkError, match=gone.name):
        run(model, benchmark, tmp_path / "stopped")
    summary = run(model, benchmark, tmp_path / "out", missing_images="wrong")
    missed = [row for row in rows(tmp_path / "out") if any(gone.name in name for name in row["images"])]
    counts = {"samples": 4, "in_split": 4, "published": 10004, "left_out": {}}
    counts |= {"truncated_answers": 2}  # of the others
    assert summary["counts"] == {**counts, "images": 2, "empty_answers": len(missed), "missing_images": 1}
    assert missed and all(row["score"] == 0 and row["answer"] == "" for row in missed)
    for output in (tmp_path / "out", None):  # a run that continues knows of them too
        assert run(model, benchmark, output, missing_images="wrong")["counts"] == summary["counts"]


def test_a_full_disk_is_reported_and_leaves_what_was_answered(model, benchmarks, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(model, benchmarks["rsvqa-lr"], tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(answer_log.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(model, benchmarks["rsvqa-lr"], tmp_path / "out")
    assert not (tmp_path / "out/rsvqa-lr/test/summary.json").exists()
    run(model, benchmarks["rsvqa-lr"], tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_folders_of_others_are_left_alone(model, folder, benchmarks, tmp_path):
    (tmp_path / "letters/rsvqa-lr/test").mkdir(parents=True)
    (tmp_path / "letters/rsvqa-lr/test/dear.txt").write_text("x")
    with pytest.raises(ValueError, match=r"contains \['dear.txt'\] but no run"):
        run(model, benchmarks["rsvqa-lr"], tmp_path / "letters")
    run(model, benchmarks["rsvqa-lr"], tmp_path / "out", limit=3)
    with pytest.raises(ValueError, match="limit = 3, not 2"):
        run(model, benchmarks["rsvqa-lr"], tmp_path / "out", limit=2)
    with pytest.raises(ValueError, match="mode = 'image', not 'blind'"):
        run(model, benchmarks["rsvqa-lr"], tmp_path / "out", limit=3, blind=True)
    other = load(str(tiny_folder(tmp_path / "tiny", routing="token")), dtype="float32")
    with pytest.raises(ValueError, match="model = "):
        run(other, benchmarks["rsvqa-lr"], tmp_path / "out", limit=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "song"}, "makes no prompt of it: AttributeError"),
        ({"choices": 5}, "makes no prompt of it: TypeError"),
        ({"question": "What is in <image>?"}, "contains <image>"),
        ({"question": "a\ud800"}, "lone surrogate"),
        ({"images": ("missing.png",)}, r"missing\.png.* cannot be read"),
        ({"images": ("../../secret.png",)}, r"secret\.png.* cannot be read"),
        ({"images": ("http://localhost:1/a.png",)}, "an address"),
        ({"images": (5,)}, "cannot be read"),
    ],
)
def test_every_sample_is_checked_before_the_first_answer(benchmarks, changes, message):
    samples = list(benchmarks["rsvqa-lr"].samples)
    samples[-1] = replace(samples[-1], **changes)
    benchmark = replace(benchmarks["rsvqa-lr"], samples=samples)
    with pytest.raises(ValueError, match=message) as error:
        make_runs([benchmark], PROTOCOLS[PROTOCOL](), SETTINGS, mode="image")
    assert "rsvqa-lr" in str(error.value) and repr(samples[-1].id) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"limit": -2}, "limit=-2 must be at least 1"),
        ({"images_per_chunk": 0}, "images_per_chunk=0 must be at least 1"),
        ({"missing_images": "skip"}, "missing_images='skip' must be 'error' or 'wrong'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


def test_arguments_that_make_no_sense(model, benchmarks, tmp_path):
    scenes = benchmarks["scenes"]
    for chosen, protocol, message in [
        ([scenes, scenes], PROTOCOL, "scenes/test is listed twice"),
        ([], PROTOCOL, "one or more benchmarks"),
        ("scenes", PROTOCOL, "one or more benchmarks"),
        (["rsvqa-lr"], PROTOCOL, "needs the folder of its files"),
        (["scenes/night"], PROTOCOL, "has no split 'night'"),
        ([scenes], "ours", "Unknown protocol 'ours'. Protocols are strict"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(*model, chosen, protocol, replace(SETTINGS, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    processor = model[1]
    template, processor.chat_template = processor.chat_template, None
    with pytest.raises(ValueError, match="has no chat template"):
        run(model, scenes)
    processor.chat_template = template


def test_lists_may_be_longer_than_other_answers(model, benchmarks, tmp_path, monkeypatch):
    """In batches of their own. The other batches are those of a benchmark without lists, and so are their answers."""
    scenes = benchmarks["scenes"]
    asked = []
    answer = Answerer.answer

    def remember(self, batch, encoded, limit):
        answers = answer(self, batch, encoded, limit)
        asked.append((limit, {len(one.tokens) for one in answers}))
        return answers

    monkeypatch.setattr(Answerer, "answer", remember)
    summary = run(model, scenes, tmp_path / "all")
    assert summary["generation"] == {
        "max_new_tokens": 4, "max_new_tokens_by_task": {"detection": 6, "pointing": 6}, "do_sample": False
    }  # fmt: skip
    assert {limit for limit, _ in asked} == {4, 6}
    assert all(max(lengths) <= limit for limit, lengths in asked) and any(max(lengths) > 4 for _, lengths in asked)
    others = replace(scenes, samples=[sample for sample in scenes.samples if sample.task not in LIST_TASKS])
    assert run(model, others, tmp_path / "others")["generation"] == {"max_new_tokens": 4, "do_sample": False}
    kept = [row for row in rows(tmp_path / "all", "scenes/test") if row["task"] not in LIST_TASKS]
    assert kept == rows(tmp_path / "others", "scenes/test")


def test_the_function_and_the_module_evaluate():
    import mfrsvlm.evaluation.evaluate  # noqa: F401
    from mfrsvlm.evaluation import evaluate as function

    assert function is evaluate and callable(function)


def test_a_plan_asks_everything_once_and_keeps_images_together(benchmarks):
    samples = benchmarks["scenes"].samples
    prompts = [sample.question for sample in samples]
    limits = [512 if sample.task in LIST_TASKS else 128 for sample in samples]
    plan = make_plan(samples, prompts, limits, 3, 2)
    assert sorted(index for chunk in plan for batch in chunk for index in batch) == list(range(len(samples)))
    assert all(len(batch) <= 3 for chunk in plan for batch in chunk)
    for chunk in plan:  # what is answered together has similar lengths
        order = [(limits[index], samples[index].task, len(prompts[index])) for batch in chunk for index in batch]
        assert order == sorted(order)
        assert all(len({limits[index] for index in batch}) == 1 for batch in chunk)
    homes = {}
    for number, chunk in enumerate(plan):
        for batch in chunk:
            for index in batch:
                assert homes.setdefault(samples[index].images, number) == number
