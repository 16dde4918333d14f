"""A run of the harness: what it writes, how it goes on after being stopped, and what it makes of bad input."""

import argparse
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_benchmarks import MAKERS, edit_json
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder

from mfrsvlm.evaluation import report
from mfrsvlm.evaluation import run as runner
from mfrsvlm.evaluation.__main__ import main
from mfrsvlm.evaluation.answering import Answer, Answerer, fingerprint, load
from mfrsvlm.evaluation.benchmarks import BenchmarkError
from mfrsvlm.evaluation.metrics import METRICS


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
DEMO = Path(__file__).parents[1] / "demo" / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    roots = {}
    for name in ("rsvqa-lr", "scenes", "aid", "dior-rsvg"):
        roots[name] = tmp_path_factory.mktemp(name)
        MAKERS[name](roots[name])
    return roots


def arguments_parser():
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser


def arguments(model, data, output, benchmark="scenes", *more):
    line = ["--benchmark", benchmark, "--data", str(data[benchmark]), "--output", str(output)]
    line += ["--protocol", "strict-without-java", "--batch-size", "3", "--images-per-chunk", "2", "--allow-count-mismatch"]
    line += ["--model", str(model)] if model else []
    return arguments_parser().parse_args([*line, *more])


def rows(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().split("\n")[:-1]]


def same_for_all_runs(output):
    """What a run leaves, without the times."""
    summary = json.loads((output / "summary.json").read_text())
    return (output / "predictions.jsonl").read_text(), {**summary, "seconds": None}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(runner.PROTOCOLS["strict-without-java"], "max_new_tokens", 8)


def test_a_run_writes_every_question_with_its_score(model, data, tmp_path):
    summary = runner.run(arguments(model, data, tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["counts"]["samples"] == len(found) == len({row["id"] for row in found})
    assert set(summary["results"]) >= {"classification", "vqa", "counting", "captioning", "grounding"}
    assert summary["model"]["name"] == "tiny" and summary["model"]["parameters"] > 0 and summary["protocol"]
    for task, figures in summary["results"].items():
        scored = [row["score"] for row in found if row["task"] == task]
        main = {"classification": "accuracy", "vqa": "accuracy", "counting": "exact"}.get(task)
        if main:
            assert figures[main]["value"] == pytest.approx(sum(scored) / len(scored)) and figures[main]["n"] == len(scored)
            assert figures[main]["low"] <= figures[main]["value"] <= figures[main]["high"]
    keys = {"id", "task", "group", "images", "prompt", "raw", "cut_off", "parsed", "score"}
    assert all(keys <= row.keys() and ("references" in row) != ("boxes" in row) for row in found)
    yes_no = [row for row in found if row.get("references") in (["yes"], ["no"])]
    assert yes_no and all("yes_probability" in row for row in yes_no)
    assert summary["counts"]["cut_off_answers"] == sum(row["cut_off"] for row in found)


def test_a_summary_says_what_was_measured_with_what(model, data, tmp_path):
    summary = runner.run(arguments(model, data, tmp_path / "out", "scenes", "--name", "My model", "--limit", "999"))
    weights = load(str(model))[0]
    assert summary["model"]["name"] == "My model" and summary["model"]["revision"] is None
    assert summary["model"]["fingerprint"] == fingerprint(weights)
    assert (summary["protocol"], summary["split"], summary["seed"]) == ("strict-without-java", "test", 0)
    assert summary["limit"] is None  # there are not so many, so that nothing was left out
    assert summary["versions"]["torch"] == torch.__version__
    assert {"python", "mfrsvlm", "transformers", "evaluate", "pycocoevalcap"} <= summary["versions"].keys()
    assert summary["generation"] == {"max_new_tokens": 8, "do_sample": False}


def test_the_trained_model_answers_through_the_command_line(tmp_path):
    """Six questions to the model in the repository, as a user would ask them."""
    command = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes"]
    command += ["--protocol", "strict-without-java", "--limit", "6", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"6/6 \[\d\d:\d\d<", done.stderr) and len(rows(tmp_path / "out")) == 6  # a bar with the time left
    assert "accuracy" in done.stdout or "exact" in done.stdout or "cider" in done.stdout


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(model, data, tmp_path, monkeypatch, after):
    runner.run(arguments(model, data, tmp_path / "whole"))
    asked = []
    answer = Answerer.answer

    def stopped(self, batch, seen):
        if len(asked) == after:
            raise Stopped
        asked.append(batch)
        return answer(self, batch, seen)

    monkeypatch.setattr(Answerer, "answer", stopped)
    with pytest.raises(Stopped):
        runner.run(arguments(model, data, tmp_path / "parts"))
    log = tmp_path / "parts" / "answers-0.jsonl"
    with log.open("a") as file:
        file.write('{"id": "test-000')  # killed while it wrote a line
    again = []
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, seen: again.append(batch) or answer(self, batch, seen))
    runner.run(arguments(model, data, tmp_path / "parts"))
    assert same_for_all_runs(tmp_path / "parts") == same_for_all_runs(tmp_path / "whole")
    assert not {prompt for batch in again for prompt in batch} == set()
    monkeypatch.setattr(Answerer, "answer", None)  # a finished run asks nothing
    runner.run(arguments(model, data, tmp_path / "parts"))
    assert same_for_all_runs(tmp_path / "parts") == same_for_all_runs(tmp_path / "whole")


def test_a_run_that_was_killed_in_its_first_moment_goes_on(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".settings.json.partial").write_text('{"format"')
    runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "2"))
    assert len(rows(tmp_path / "out")) == 2


def test_line_breaks_within_answers_are_kept(model, data, tmp_path, monkeypatch):
    """Some that JSON leaves as they are, but by which Python splits lines."""
    said = "a\u2028b\u0085c\x0bd\re\nf"
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, seen: [Answer(said, 0.5) for _ in batch])
    for _ in range(2):
        runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "4"))
        assert [row["raw"] for row in rows(tmp_path / "out")] == [said] * 4


def test_a_run_does_not_go_on_with_other_questions_or_another_template(data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    folder = tiny_folder(tmp_path / "tiny")
    line = arguments(folder, {"rsvqa-lr": root}, tmp_path / "out", "rsvqa-lr")
    runner.run(line)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + "!")
    with pytest.raises(ValueError, match="chat_template"):
        runner.run(line)
    template.write_text(text)
    edit_json(root / "LR_split_test_questions.json", lambda c: c["questions"][0].update(question="Is it another one?"))
    with pytest.raises(ValueError, match="questions = "):
        runner.run(line)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    def command(output):
        line = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes"]
        return [*line, "--protocol", "strict-without-java", "--limit", "40", "--batch-size", "2", "--output", str(output)]

    do(command(tmp_path / "whole"))
    process = subprocess.Popen(command(tmp_path / "killed"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "answers-0.jsonl"
    deadline = time.time() + 300
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    do(command(tmp_path / "killed"))
    assert same_for_all_runs(tmp_path / "killed") == same_for_all_runs(tmp_path / "whole")


def of_processes(number, model, data, output):
    """The command of a run by so many processes, which accelerate starts on a CPU only if told `--multi_gpu`."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(number), "--main_process_port", "0"]
    line = ["-m", "mfrsvlm.evaluation", "run", "--model", str(model), "--benchmark", "scenes", "--data"]
    line += [str(data["scenes"]), "--output", str(output), "--protocol", "strict-without-java", "--batch-size", "3"]
    return [sys.executable, *(launch if number > 1 else []), *line, "--images-per-chunk", "1"]


def do(line):
    subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run of one process that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    do(of_processes(1, model, data, output))
    return output


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model, data, tmp_path, whole):
    do(of_processes(2, model, data, tmp_path / "two"))
    one, two = same_for_all_runs(whole), same_for_all_runs(tmp_path / "two")
    assert one[0] == two[0] and one[1] | {"processes": 2} == two[1]
    logs = sorted((tmp_path / "two").glob("answers-*.jsonl"))
    assert len(logs) == 2 and all(log.stat().st_size for log in logs)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(model, data, tmp_path, whole):
    line = of_processes(2, model, data, tmp_path / "killed")
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 300
    while not any(log.stat().st_size for log in (tmp_path / "killed").glob("answers-*.jsonl")) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    do(of_processes(1, model, data, tmp_path / "killed"))
    assert same_for_all_runs(tmp_path / "killed") == same_for_all_runs(whole)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dear.txt").write_text("x")
    line = of_processes(2, model, data, tmp_path / "out")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "holds ['dear.txt'] but no run" in done.stderr


@pytest.mark.parametrize("peer", [tiny_llava, tiny_qwen2_vl])
@pytest.mark.parametrize("benchmark", ["rsvqa-lr", "aid", "dior-rsvg", "scenes"])
def test_peers_are_measured_by_the_same_command(peer, benchmark, data, tmp_path):
    folder = peer(tmp_path / "peer")
    summary = runner.run(arguments(folder, data, tmp_path / "out", benchmark, "--trust-remote-code"))
    assert summary["model"]["architecture"].startswith(("Llava", "Qwen2VL"))
    found = rows(tmp_path / "out")
    assert len(found) == summary["counts"]["samples"] > 0
    runner.run(arguments(folder, data, tmp_path / "alone", benchmark, "--trust-remote-code", "--no-sharing"))
    assert [row["raw"] for row in rows(tmp_path / "alone")] == [row["raw"] for row in found]


def test_blind_prompts_hold_no_image(model, data, tmp_path, monkeypatch):
    asked = []
    answer = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, seen: asked.extend(batch) or answer(self, batch, seen))
    monkeypatch.setattr(Answerer, "_encode", None)
    summary = runner.run(arguments(model, data, tmp_path / "out", "scenes", "--blind"))
    assert summary["mode"] == "blind" and asked and all(prompt.group is None for prompt in asked)


def test_chance_needs_no_model(data, tmp_path):
    summary = runner.run(arguments(None, data, tmp_path / "out", "rsvqa-lr", "--baseline", "chance"))
    assert summary["mode"] == "chance" and summary["model"] == {"name": "chance"}
    assert summary["results"]["vqa"]["accuracy"]["value"] == 1  # every question of the stand-in is the only one of its type


def test_a_limit_is_a_sample_that_the_seed_chooses(model, data, tmp_path):
    ids = []
    for name, more in {"a": ["0"], "b": ["0"], "c": ["1"]}.items():
        runner.run(arguments(model, data, tmp_path / name, "scenes", "--limit", "5", "--seed", *more))
        ids.append([row["id"] for row in rows(tmp_path / name)])
    assert ids[0] == ids[1] != ids[2] and all(len(chosen) == 5 for chosen in ids)


def test_a_model_that_says_nothing_is_always_wrong(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Answerer, "answer", lambda self, batch, seen: [Answer("", 0.5) for _ in batch])
    summary = runner.run(arguments(model, data, tmp_path / "out"))
    assert summary["counts"]["empty_answers"] == summary["counts"]["samples"]
    assert all(row["score"] == 0 for row in rows(tmp_path / "out"))


def test_a_model_that_says_only_special_tokens_says_nothing(data, tmp_path):
    weights, processor = load(str(tiny_folder(tmp_path / "tiny")))
    weights.model.language_model.norm.weight.data.zero_()  # all words as likely, so that the first is taken: <unk>
    for part in (weights, processor):
        part.save_pretrained(tmp_path / "tiny")
    summary = runner.run(arguments(tmp_path / "tiny", data, tmp_path / "out"))
    assert summary["counts"]["empty_answers"] == summary["counts"]["samples"] == len(rows(tmp_path / "out"))
    assert all(row["raw"] == "" and row["score"] == 0 for row in rows(tmp_path / "out"))


def test_missing_images_stop_the_run_or_count_as_wrong(model, data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    gone = sorted(root.rglob("*.tif"))[0]
    gone.unlink()
    places = {"rsvqa-lr": root}
    with pytest.raises(BenchmarkError, match=gone.name):
        runner.run(arguments(model, places, tmp_path / "stopped", "rsvqa-lr"))
    summary = runner.run(arguments(model, places, tmp_path / "out", "rsvqa-lr", "--missing-images", "wrong"))
    missed = [row for row in rows(tmp_path / "out") if any(gone.name in name for name in row["images"])]
    counts = {"samples": 4, "in_split": 4, "published": 10004}
    counts |= {"cut_off_answers": 2}  # of the others
    assert summary["counts"] == {**counts, "images": 2, "empty_answers": len(missed), "missing_images": 1}
    assert missed and all(row["score"] == 0 and row["raw"] == "" for row in missed)
    # A second run knows of them too.
    assert (
        runner.run(arguments(model, places, tmp_path / "out", "rsvqa-lr", "--missing-images", "wrong"))["counts"]
        == (summary["counts"])
    )


def test_a_full_disk_is_told_and_leaves_what_was_answered(model, data, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    runner.run(arguments(model, data, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(runner.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            runner.run(arguments(model, data, tmp_path / "out"))
    assert not (tmp_path / "out" / "summary.json").exists()
    runner.run(arguments(model, data, tmp_path / "out"))
    assert same_for_all_runs(tmp_path / "out") == same_for_all_runs(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["settings.json", "answers-0.jsonl", "predictions.jsonl"])
def test_a_file_that_cannot_grow_is_named_and_the_run_goes_on_later(model, data, tmp_path, whole, file):
    """As on a full disk, while that file is written."""
    line = of_processes(1, model, data, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
    assert sizes["settings.json"] < sizes["answers-0.jsonl"] < sizes["predictions.jsonl"]
    limit = sizes[file] - 100
    full = subprocess.run(
        line,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert all(text in full.stderr for text in ("File too large", str(tmp_path / "out" / file), "run again"))
    assert not {"summary.json", "predictions.jsonl"} & {path.name for path in (tmp_path / "out").iterdir()}
    do(line)
    assert same_for_all_runs(tmp_path / "out") == same_for_all_runs(whole)


QUESTION_FILE, ANSWER_FILE = "LR_split_test_questions.json", "LR_split_test_answers.json"
BAD_DATA = {
    "truncated": (lambda root: os.truncate(root / QUESTION_FILE, 100), "is not JSON, or its end is missing"),
    "duplicate": (
        lambda root: edit_json(root / QUESTION_FILE, lambda c: c["questions"].append(c["questions"][0])),
        "1 ids of split 'test' occur more than once, such as 10",
    ),
    "wrong type": (
        lambda root: edit_json(root / ANSWER_FILE, lambda c: c["answers"][0].update(answer=["yes"])),
        "'answer' is ['yes'], a list; expected str",
    ),
    "no answer": (lambda root: edit_json(root / ANSWER_FILE, lambda c: c["answers"].pop(0)), "has no active answer"),
    "no image": (lambda root: (root / "Images_LR" / "5.tif").unlink(), "1 of 2 images are missing"),
    "no file": (lambda root: (root / ANSWER_FILE).unlink(), f"{ANSWER_FILE}. docs/benchmarks.md says which files"),
}


def command(monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", ["evaluation", "run", *map(str, line)])
    return main()


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_told_in_a_line_before_anything_is_written(kind, model, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    change, message = BAD_DATA[kind]
    change(root)
    line = ["--model", model, "--benchmark", "rsvqa-lr", "--data", root, "--output", tmp_path / "out"]
    assert command(monkeypatch, *line, "--allow-count-mismatch") == 2
    errors = [text for text in capsys.readouterr().err.split("\n") if text]
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "out").exists()


def test_a_count_mismatch_is_told_and_can_be_allowed(model, data, tmp_path, monkeypatch, capsys):
    line = ["--model", model, "--benchmark", "rsvqa-lr", "--data", data["rsvqa-lr"], "--output", tmp_path / "out"]
    assert command(monkeypatch, *line) == 2
    assert "holds 4 samples, not the published 10004" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command(monkeypatch, *line, "--allow-count-mismatch") == 0
    assert "4 of 10004 samples" in capsys.readouterr().out  # what reports say of it


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--benchmark", "rsvqa", "--model", "x"], "There is no benchmark 'rsvqa'. Known are aid"),
        (["--benchmark", "rsvqa-lr", "--model", "x"], "needs the folder of its files. Download it from https://"),
        (["--benchmark", "rsvqa-lr", "--data", ".", "--model", "x"], "docs/benchmarks.md says which files"),
    ],
)
def test_what_is_not_there_is_named(line, message, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, *line, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_named(data, tmp_path, monkeypatch, capsys):
    line = ["--benchmark", "rsvqa-lr", "--data", data["rsvqa-lr"], "--allow-count-mismatch", "--output", tmp_path / "out"]
    assert command(monkeypatch, *line, "--model", "./no-model") == 2
    error = capsys.readouterr().err
    assert "no-model" in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(model, data, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds \['dear.txt'\] but no run"):
        runner.run(arguments(model, data, tmp_path / "letters"))
    runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "3"))
    with pytest.raises(ValueError, match="limit = 3, not 4"):
        runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "4"))
    with pytest.raises(ValueError, match="mode = 'image', not 'blind'"):
        runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "3", "--blind"))
    other = tiny_folder(tmp_path / "tiny", routing="token")
    with pytest.raises(ValueError, match="model = "):
        runner.run(arguments(other, data, tmp_path / "out", "scenes", "--limit", "3"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--limit", "-2"], "--limit -2 must be at least 1"),
        (["--baseline", "chance"], "Say what to measure"),
    ],
)
def test_arguments_that_make_no_sense(model, data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        runner.run(arguments(model, data, tmp_path / "out", "scenes", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_benchmark_of_answering():
    line = [sys.executable, str(DEMO.parents[1] / "benchmarks" / "answer_questions.py"), "--scenes", "1", "--questions", "3"]
    done = subprocess.run([*line, "--rounds", "1"], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert "3 questions about 1 images, 0 answers differ" in done.stdout and "median:" in done.stdout, done.stderr


def test_the_page_for_users_names_what_there_is(model, data, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    summary = runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "20"))
    options = {option for action in arguments_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    reported = argparse.ArgumentParser()
    report.add_arguments(reported)
    options |= {option for action in reported._actions for option in action.option_strings} - {"-h", "--help"}
    fields = {*summary, *summary["model"], *summary["counts"], *(key for row in rows(tmp_path / "out") for key in row)}
    figures = {name for task in summary["results"].values() for name in task}
    for name in [*options, *fields, *figures, *runner.PROTOCOLS, *METRICS]:
        assert f"`{name}`" in page or f"`{name} " in page or f" {name} " in page or name.startswith("bleu_"), name


def test_a_plan_asks_everything_once_and_keeps_images_together(data):
    from mfrsvlm.evaluation.benchmarks import load_benchmark

    samples = load_benchmark("scenes", data["scenes"]).samples
    prompts = [sample.question for sample in samples]
    plan = runner.make_plan(samples, prompts, 3, 2)
    assert sorted(index for chunk in plan for batch in chunk for index in batch) == list(range(len(samples)))
    assert all(len(batch) <= 3 for chunk in plan for batch in chunk)
    for chunk in plan:  # what is answered together is of like length
        order = [(samples[index].task, len(prompts[index])) for batch in chunk for index in batch]
        assert order == sorted(order)
    homes = {}
    for number, chunk in enumerate(plan):
        for batch in chunk:
            for index in batch:
                assert homes.setdefault(samples[index].images, number) == number
