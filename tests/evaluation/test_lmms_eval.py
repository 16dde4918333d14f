"""Samples of lmms-eval: a file that it wrote, files that are written for it, and rows that cannot be scored."""

import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tiny_benchmarks import MAKERS
from tiny_training import tiny_folder

from mfrsvlm.evaluation import EvaluationSettings, evaluate_majority, load_benchmark
from mfrsvlm.evaluation.answering import Answerer, Prompt, load
from mfrsvlm.evaluation.benchmarks.sample import LIST_TASKS
from mfrsvlm.evaluation.lmms_eval import export_samples, export_task, read_samples, score_samples, target_text


PROTOCOL = "strict-without-java"
# lmms-eval 0.7.3 wrote it with examples/evaluate_with_lmms_eval.py and an earlier demo/model, for a task of `export_task`.
LOGGED = Path(__file__).parent / "data" / "20261127_110420_samples_scenes_test.jsonl"


@pytest.fixture(scope="module")
def scenes():
    """The six scenes that the file is about, without the tasks that were added to scenes later."""
    benchmark = load_benchmark("scenes", None, "test", check_counts=False, count=6)
    return replace(benchmark, samples=[sample for sample in benchmark.samples if sample.task not in LIST_TASKS])


def edited(tmp_path, change):
    lines = [json.loads(line) for line in LOGGED.read_text().splitlines()]
    change(lines)
    path = tmp_path / "x_samples_scenes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_samples_that_lmms_eval_logged_are_scored(scenes):
    results = score_samples(LOGGED, scenes, PROTOCOL)
    assert {task: next(iter(figures.values()))["n"] for task, figures in results.items()} == {
        task: sum(sample.task == task for sample in scenes.samples) for task in results
    }
    # lmms-eval scores exact matches, which is the accuracy of these tasks.
    matches = {row["doc_id"]: row["exact_match"] for row in read_samples(LOGGED)}
    for task, figure in {"classification": "accuracy", "vqa": "accuracy", "counting": "exact"}.items():
        own = [matches[index] for index, sample in enumerate(scenes.samples) if sample.task == task]
        assert results[task][figure]["value"] == pytest.approx(sum(own) / len(own))


def test_a_part_of_a_benchmark_in_another_order(scenes, tmp_path):
    path = edited(tmp_path, lambda lines: lines.reverse() or lines.__delitem__(slice(10, None)))
    asked = [scenes.samples[row["doc_id"]] for row in read_samples(path)]
    results = score_samples(path, scenes, PROTOCOL)
    assert set(results) == {sample.task for sample in asked}
    shuffled = replace(scenes, samples=scenes.samples[::-1])
    names = {row["doc_id"]: sample.id for row, sample in zip(read_samples(path), asked, strict=True)}
    assert score_samples(path, shuffled, PROTOCOL, lambda row: names[row["doc_id"]]).keys() == results.keys()


def test_a_run_comes_back_as_it_was_exported(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["scenes"](root)
    benchmark = load_benchmark("scenes", root, check_counts=False)
    settings = EvaluationSettings(output=tmp_path / "run")
    results = evaluate_majority([benchmark], PROTOCOL, settings)["scenes/test"]["results"]
    written = export_samples(tmp_path / "run/scenes/test", tmp_path / "logs")
    assert {path.name.split("_samples_")[1] for path in written} == {f"scenes_test_{task}.jsonl" for task in results}
    for path in written:
        for task, figures in score_samples(path, benchmark, PROTOCOL).items():
            assert figures == results[task]
        expected = {"doc_id", "target", "input", "filtered_resps", "doc_hash"}
        assert all(expected <= json.loads(line).keys() for line in path.read_text().splitlines())


@pytest.mark.parametrize("wrapped", ["x", ["x"], [["x"]]])
def test_responses_of_all_versions(tmp_path, wrapped):
    """Up to 0.6, a response was wrapped in a list for its request."""
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"doc_id": 0, "target": "x", "filtered_resps": wrapped, "doc": {}, "arguments": []}) + "\n")
    assert read_samples(path)[0]["response"] == "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(target="desert"), "row 2: target 'desert' is not the reference of sample"),
        (lambda rows: rows[2].update(doc_id=999), "row 3: doc_id 999 is not a sample of scenes test"),
        (lambda rows: rows.append(rows[0]), "row 43 answers sample 'test-0000000-0', like an earlier row"),
        (lambda rows: rows[0].update(filtered_resps=["a", "b"]), r"row 1: filtered_resps is \['a', 'b'\], not the text"),
        (lambda rows: rows[0].pop("filtered_resps"), "row 1 has no filtered_resps"),
        (lambda rows: rows.insert(0, "text"), "row 1 has no doc_id"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(scenes, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        score_samples(edited(tmp_path, change), scenes, PROTOCOL)


def test_truncated_files_and_unfinished_runs_are_named(scenes, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(LOGGED.read_text()[:700])
    with pytest.raises(ValueError, match="row 3 is not JSON"):
        read_samples(path)
    with pytest.raises(ValueError, match=r"has no summary\.json"):
        export_samples(tmp_path, tmp_path / "logs")


def test_an_exported_task(tmp_path):
    yaml = pytest.importorskip("yaml")
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["scenes"](root)
    benchmark = load_benchmark("scenes", root, check_counts=False)
    name = export_task(benchmark, tmp_path / "tasks", PROTOCOL)
    text = (tmp_path / "tasks" / f"{name}.yaml").read_text()
    task = yaml.safe_load(text.replace("!function ", ""))
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert task["task"] == name == "scenes_test" and len(rows) == len(benchmark.samples)
    assert task["generation_kwargs"]["max_new_tokens"] == 256  # for lists of boxes
    functions = {}
    exec((tmp_path / "tasks" / f"{name}.py").read_text(), functions)
    for row, sample in zip(rows, benchmark.samples, strict=True):
        assert row["id"] == sample.id and row["target"] == target_text(sample.references or sample.boxes)
        images = [benchmark.read_image(name).tobytes() for name in sample.images]
        assert [image.tobytes() for image in functions["doc_to_visual"](row)] == images


class Messages:
    """Stands in for `ChatMessages` of lmms-eval."""

    def __init__(self, messages):
        self.messages = messages

    def to_hf_messages(self):
        return self.messages


def test_the_model_class_of_the_example(tmp_path, monkeypatch):
    """With stand-ins for what it takes from lmms-eval, which is not a dependency."""
    names = ["", ".__main__", ".api", ".api.model", ".models", ".models.registry_v2", ".protocol"]
    modules = {name: ModuleType(f"lmms_eval{name}") for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", module)
    modules[".__main__"].cli_evaluate = modules[".models"].MODEL_REGISTRY_V2 = None
    modules[".models.registry_v2"].ModelManifest = None
    modules[".api.model"].lmms, modules[".protocol"].ChatMessages = type("lmms", (), {}), Messages
    path = Path(__file__).parents[2] / "examples" / "evaluate_with_lmms_eval.py"
    spec = spec_from_file_location("example", path)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)

    folder = tiny_folder(tmp_path / "model")
    model = example.ImageTextToText(str(folder), device="cpu", batch_size="2", trust_remote_code=True)
    image = Image.new("RGB", (40, 30), (90, 120, 60))
    docs = [[{"type": "text", "text": text}] for text in ("What?", "Is there a river?", "How many ships are there?")]
    model.task_dict = {"task": {"test": docs}}

    def make_messages(content):
        return [{"role": "user", "content": [{"type": "image", "image": image}, *content]}]

    options = {"max_new_tokens": 5, "temperature": 0, "until": ["\n\n"], "do_sample": False}
    requests = [SimpleNamespace(args=("", make_messages, options, index, "task", "test")) for index in range(3)]
    answerer = Answerer(*load(str(folder)), 5)
    prompts = [Prompt(doc[0]["text"], 0) for doc in docs]
    expected = answerer.answer(prompts, answerer.encode_images([[image]], prompts))
    assert model.generate_until(requests) == [answer.text for answer in expected]
