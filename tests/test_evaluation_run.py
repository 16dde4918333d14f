"""A run of the harness: what it writes, how it goes on after being stopped, and what it makes of bad input."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_benchmarks import MAKERS
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder

from mfrsvlm.evaluation import run as runner
from mfrsvlm.evaluation.answering import Answer, Answerer
from mfrsvlm.evaluation.benchmarks import BenchmarkError


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


def arguments(model, data, output, benchmark="scenes", *more):
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    line = ["--benchmark", benchmark, "--data", str(data[benchmark]), "--output", str(output)]
    line += ["--protocol", "ours-without-java", "--batch-size", "3", "--images-per-chunk", "2", "--allow-count-mismatch"]
    line += ["--model", str(model)] if model else []
    return parser.parse_args([*line, *more])


def rows(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def same_for_all_runs(output):
    """What a run leaves, without the times."""
    summary = json.loads((output / "summary.json").read_text())
    return (output / "predictions.jsonl").read_text(), {**summary, "seconds": None}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(runner.PROTOCOLS["ours-without-java"], "max_new_tokens", 8)


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
    assert all({"prompt", "raw", "parsed", "score"} <= row.keys() for row in found)


def test_the_trained_model_answers_through_the_command_line(tmp_path):
    """Six questions to the model in the repository, as a user would ask them."""
    command = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes"]
    command += ["--protocol", "ours-without-java", "--limit", "6", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6/6" in done.stderr and len(rows(tmp_path / "out")) == 6
    assert "accuracy" in done.stdout or "exact" in done.stdout or "cider" in done.stdout
    again = subprocess.run([*command, "--blind"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and "mode = 'image', not 'blind'" in again.stderr and "Traceback" not in again.stderr


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


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    def command(output):
        line = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes"]
        return [*line, "--protocol", "ours-without-java", "--limit", "40", "--batch-size", "2", "--output", str(output)]

    subprocess.run(command(tmp_path / "whole"), env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    process = subprocess.Popen(command(tmp_path / "killed"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "answers-0.jsonl"
    deadline = time.time() + 300
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    subprocess.run(command(tmp_path / "killed"), env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    assert same_for_all_runs(tmp_path / "killed") == same_for_all_runs(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model, data, tmp_path):
    def command(output, launch):
        line = ["-m", "mfrsvlm.evaluation", "run", "--model", str(model), "--benchmark", "scenes", "--data"]
        line += [str(data["scenes"]), "--output", str(output), "--protocol", "ours-without-java", "--batch-size", "3"]
        return [sys.executable, *launch, *line, "--images-per-chunk", "2", "--allow-count-mismatch"]

    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    for name, launch in {"one": [], "two": accelerate}.items():
        subprocess.run(command(tmp_path / name, launch), env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    one, two = (same_for_all_runs(tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0] and one[1]["results"] == two[1]["results"]
    assert two[1]["processes"] == 2 and len(list((tmp_path / "two").glob("answers-*.jsonl"))) == 2


@pytest.mark.parametrize("peer", [tiny_llava, tiny_qwen2_vl])
@pytest.mark.parametrize("benchmark", ["rsvqa-lr", "aid", "dior-rsvg"])
def test_peers_are_measured_by_the_same_command(peer, benchmark, data, tmp_path):
    folder = peer(tmp_path / "peer")
    summary = runner.run(arguments(folder, data, tmp_path / "out", benchmark, "--trust-remote-code"))
    assert summary["model"]["architecture"].startswith(("Llava", "Qwen2VL"))
    assert len(rows(tmp_path / "out")) == summary["counts"]["samples"] > 0


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


def test_folders_of_others_are_left_alone(model, data, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds \['dear.txt'\] but no run"):
        runner.run(arguments(model, data, tmp_path / "letters"))
    runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "3"))
    with pytest.raises(ValueError, match="limit = 3, not 4"):
        runner.run(arguments(model, data, tmp_path / "out", "scenes", "--limit", "4"))
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


def test_a_plan_asks_everything_once_and_keeps_images_together(data):
    from mfrsvlm.evaluation.benchmarks import load_benchmark

    samples = load_benchmark("scenes", data["scenes"]).samples
    prompts = [sample.question for sample in samples]
    plan = runner.make_plan(samples, prompts, 3, 2)
    assert sorted(index for chunk in plan for batch in chunk for index in batch) == list(range(len(samples)))
    assert all(len(batch) <= 3 for chunk in plan for batch in chunk)
    homes = {}
    for number, chunk in enumerate(plan):
        for batch in chunk:
            for index in batch:
                assert homes.setdefault(samples[index].images, number) == number
