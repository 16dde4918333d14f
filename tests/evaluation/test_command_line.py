"""The command line of the evaluation: options, errors in one line, several processes, and runs that are killed."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_benchmarks import MAKERS, edit_json
from tiny_training import tiny_folder

from mfrsvlm.evaluation.__main__ import main, make_parser
from mfrsvlm.evaluation.answering import load
from mfrsvlm.evaluation.evaluate import describe_model
from mfrsvlm.evaluation.metrics import METRICS
from mfrsvlm.evaluation.protocols import PROTOCOLS, Protocol
from mfrsvlm.output_folders import locked


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "model"
PROTOCOL = ["--protocol", "strict-without-java"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    roots = {}
    for name in ("rsvqa-lr", "scenes"):
        roots[name] = tmp_path_factory.mktemp(name)
        MAKERS[name](roots[name])
    return roots


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The tiny model says all that it may."""
    monkeypatch.setattr(Protocol, "max_new_list_tokens", 0)


def files(folder):
    """The predictions and the summary of a run, without times."""
    summary = json.loads((folder / "summary.json").read_text())
    return (folder / "predictions.jsonl").read_text(), {**summary, "seconds": None}


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n")[:-1]]


def command(*line):
    return main(["run", *map(str, line)])


def test_unknown_dtype_is_named_before_the_model_is_loaded(capsys):
    with pytest.raises(SystemExit):
        command("--model", DEMO, "--benchmark", "scenes", "--dtype", "float33")
    assert "invalid choice: 'float33'" in capsys.readouterr().err


def test_one_benchmark_by_its_own_options(model, data, tmp_path, capsys):
    line = ["--model", model, "--benchmark", "rsvqa-lr", "--data", data["rsvqa-lr"], "--split", "test", *PROTOCOL]
    assert command(*line, "--allow-count-mismatch", "--output", tmp_path) == 0
    assert "4 of 10004 samples" in capsys.readouterr().out  # in the table
    assert len(rows(tmp_path / "rsvqa-lr/test")) == 4


@pytest.mark.integration
def test_several_benchmarks(model, data, tmp_path, capsys):
    both = [f"rsvqa-lr/test={data['rsvqa-lr']}", f"scenes={data['scenes']}"]
    line = ["--model", model, "--allow-count-mismatch", *PROTOCOL]
    assert command(*line, "--benchmark", *both, "--limit", "3", "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "## rsvqa-lr, test" in printed and "## scenes, test" in printed
    assert main(["report", str(tmp_path)]) == 0 and capsys.readouterr().out.count("\n## ") == printed.count("\n## ")
    assert command(*line, "--benchmark", both[0], "--benchmark", both[1], "--limit", "3", "--output", tmp_path) == 0
    assert command(*line, "--benchmark", *both, "--data", data["scenes"]) == 2
    assert "Name several as NAME/SPLIT=FOLDER" in capsys.readouterr().err


def test_incomplete_weights_are_evaluated_only_if_asked_and_said_everywhere(model, data, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "tiny", ignore=shutil.ignore_patterns("checksums.json"))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "injectors" not in n}, folder / "model.safetensors", {"format": "pt"})
    line = ["--model", folder, "--benchmark", f"scenes={data['scenes']}", *PROTOCOL, "--output", tmp_path / "run"]
    assert command(*line) == 2
    assert "tensors are missing: model.injectors.0" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert command(*line, "--allow-incomplete") == 0
    summary = json.loads((tmp_path / "run" / "scenes" / "test" / "summary.json").read_text())
    assert "tensors are missing" in summary["model"]["incomplete"][0]
    assert "incomplete weights" in capsys.readouterr().out
    assert "incomplete" not in described(model)


def test_two_evaluations_to_one_folder(model, data, tmp_path, capsys):
    line = ["--model", model, "--benchmark", f"scenes={data['scenes']}", *PROTOCOL, "--output", tmp_path / "run"]
    with locked(tmp_path / "run" / "scenes" / "test"):
        assert command(*line) == 2
    assert "scenes/test is being written by another run" in capsys.readouterr().err
    assert command(*line) == 0


def described(folder):
    return describe_model(*load(str(folder)))


def test_the_majority_baseline(data, tmp_path, capsys):
    line = ["--baseline", "majority", "--benchmark", f"rsvqa-lr={data['rsvqa-lr']}", "--allow-count-mismatch"]
    assert command(*line, "--output", tmp_path) == 0
    assert "*majority, 4 of 10004 samples*" in capsys.readouterr().out
    assert files(tmp_path / "rsvqa-lr/test")[1]["mode"] == "majority"
    assert command(*line, "--blind") == 2 and "never uses images" in capsys.readouterr().err
    for more in ([*line, "--model", "x"], line[2:]):
        assert command(*more) == 2 and "either --model or --baseline majority" in capsys.readouterr().err


def test_what_is_left_out_on_purpose_stands_in_the_summary(tmp_path, capsys):
    for name in ("rsivqa-ucm", "aid"):
        (tmp_path / name).mkdir()
        MAKERS[name](tmp_path / name)
    path = tmp_path / "rsivqa-ucm" / "UCM" / "ucm_res.txt"
    path.write_text(path.read_text() + "2.tif:How many  in the picture?zero\n")
    line = ["--baseline", "majority", "--allow-count-mismatch", "--output", tmp_path / "out"]
    line += ["--benchmark", f"rsivqa-ucm={tmp_path / 'rsivqa-ucm'}"]
    assert command(*line) == 2 and "1 of 6 rows have a missing word: row 6 " in capsys.readouterr().err
    assert command(*line, "--skip-broken-rows") == 0
    assert files(tmp_path / "out" / "rsivqa-ucm" / "all")[1]["counts"]["left_out"] == {"rows with a missing word": 1}
    line = [*line[:-1], f"aid={tmp_path / 'aid'}"]
    assert command(*line, "--classes", "beach", "bare land") == 0
    counts = files(tmp_path / "out" / "aid" / "all")[1]["counts"]
    assert counts["left_out"] == {"classes": 28} and counts["in_split"] == 4
    assert command(*line, "--skip-broken-rows") == 2 and "aid takes no option broken_rows" in capsys.readouterr().err


@pytest.mark.integration
def test_help_does_not_wait_for_torch():
    code = "import sys; from mfrsvlm.evaluation.__main__ import make_parser; make_parser().format_help();"
    code += " print(sorted(name for name in sys.modules if name.startswith('mfrsvlm.evaluation.')))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['mfrsvlm.evaluation.__main__', 'mfrsvlm.evaluation.settings']", done.stderr


QUESTION_FILE, ANSWER_FILE = "LR_split_test_questions.json", "LR_split_test_answers.json"
BAD_DATA = {
    "truncated": (lambda root: os.truncate(root / QUESTION_FILE, 100), QUESTION_FILE),
    "duplicate": (
        lambda root: edit_json(root / QUESTION_FILE, lambda c: c["questions"].append(c["questions"][0])),
        "occur more than once",
    ),
    "no answer": (lambda root: edit_json(root / ANSWER_FILE, lambda c: c["answers"].pop(0)), "answer"),
    "no image": (lambda root: (root / "Images_LR" / "5.tif").unlink(), "1 of 2 images are missing"),
    "no file": (lambda root: (root / ANSWER_FILE).unlink(), ANSWER_FILE),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_reported_in_a_line_before_anything_is_written(kind, model, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS["rsvqa-lr"](root)
    change, message = BAD_DATA[kind]
    change(root)
    line = ["--model", model, "--benchmark", "rsvqa-lr", "--data", root, "--output", tmp_path / "out"]
    assert command(*line, "--allow-count-mismatch") == 2
    errors = [text for text in capsys.readouterr().err.split("\n") if text]
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--benchmark", "rsvqa", "--model", "x"], "Unknown benchmark 'rsvqa'"),
        (["--benchmark", "rsvqa-lr", "--model", "x"], "needs the folder of its files"),
        (["--benchmark", "scenes", "--model", "x", "--protocol", "ours"], "Unknown protocol 'ours'"),
        (["--benchmark", "scenes", "--model", "x", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--benchmark", "scenes/night", "--model", "x"], "has no split 'night'"),
    ],
)
def test_what_is_not_there_is_named(line, message, tmp_path, capsys):
    assert command(*line, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_count_mismatch_is_an_error_unless_it_is_allowed(model, data, tmp_path, capsys):
    line = ["--model", model, "--benchmark", "rsvqa-lr", "--data", data["rsvqa-lr"], "--output", tmp_path / "out"]
    assert command(*line) == 2
    assert "has 4 samples, not the published 10004" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_named(data, tmp_path, capsys):
    line = ["--benchmark", "rsvqa-lr", "--data", data["rsvqa-lr"], "--allow-count-mismatch", "--output", tmp_path / "out"]
    assert command(*line, "--model", "./no-model") == 2
    error = capsys.readouterr().err
    assert "no-model" in error and "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.integration
def test_the_trained_model_answers_through_the_command_line(tmp_path):
    """Six questions to the model in the repository, as a user would ask them."""
    line = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes", *PROTOCOL]
    line += ["--limit", "6", "--output", str(tmp_path)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"6/6 \[\d\d:\d\d<", done.stderr)  # a bar with the time left
    assert len(rows(tmp_path / "scenes/test")) == 6
    assert "accuracy" in done.stdout or "exact" in done.stdout or "cider" in done.stdout


def of_processes(number, model, data, output):
    """The command of a run by so many processes, which accelerate starts on a CPU only if told `--multi_gpu`."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(number), "--main_process_port", "0"]
    line = ["-m", "mfrsvlm.evaluation", "run", "--model", str(model), "--benchmark", "scenes", "--data"]
    line += [str(data["scenes"]), "--output", str(output), *PROTOCOL, "--batch-size", "3"]
    return [sys.executable, *(launch if number > 1 else []), *line, "--images-per-chunk", "1"]


def do(line):
    subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of a run of one process that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    do(of_processes(1, model, data, output))
    return output / "scenes/test"


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model, data, tmp_path, whole):
    do(of_processes(2, model, data, tmp_path))
    one, two = files(whole), files(tmp_path / "scenes/test")
    assert one[0] == two[0] and one[1] | {"processes": 2} == two[1]
    logs = sorted((tmp_path / "scenes/test").glob("answers-*.jsonl"))
    assert len(logs) == 2 and all(log.stat().st_size for log in logs)


IN_MEMORY = """
import json, sys
from accelerate import PartialState
from mfrsvlm.evaluation import EvaluationSettings, evaluate, load_benchmark
from mfrsvlm.evaluation.answering import load
model, data, output = sys.argv[1:]
settings = EvaluationSettings(batch_size=3, images_per_chunk=1)
scenes = load_benchmark("scenes", data, check_counts=False)
summaries = evaluate(*load(model), [scenes], "strict-without-java", settings)
open(f"{output}/{PartialState().process_index}.json", "w").write(json.dumps(summaries))
"""


@pytest.mark.slow
def test_two_processes_without_files_return_the_same(model, data, tmp_path, whole):
    (tmp_path / "script.py").write_text(IN_MEMORY)
    launch = of_processes(2, model, data, tmp_path)
    launch = launch[: launch.index("0") + 1]
    do([*launch, str(tmp_path / "script.py"), str(model), str(data["scenes"]), str(tmp_path)])
    found = [json.loads((tmp_path / f"{index}.json").read_text())["scenes/test"] for index in range(2)]
    assert found[0] == found[1]
    assert {**found[0], "seconds": None, "processes": 1} == files(whole)[1]


@pytest.mark.slow
def test_one_process_continues_where_two_were_killed(model, data, tmp_path, whole):
    line = of_processes(2, model, data, tmp_path)
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    folder, deadline = tmp_path / "scenes/test", time.time() + 300
    while not any(log.stat().st_size for log in folder.glob("answers-*.jsonl")) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    do(of_processes(1, model, data, tmp_path))
    assert files(folder) == files(whole)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(model, data, tmp_path):
    (tmp_path / "scenes/test").mkdir(parents=True)
    (tmp_path / "scenes/test/dear.txt").write_text("x")
    line = of_processes(2, model, data, tmp_path)
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "contains ['dear.txt'] but no run" in done.stderr


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path):
    def line(output):
        line = [sys.executable, "-m", "mfrsvlm.evaluation", "run", "--model", str(DEMO), "--benchmark", "scenes"]
        return [*line, *PROTOCOL, "--limit", "40", "--batch-size", "2", "--output", str(output)]

    do(line(tmp_path / "whole"))
    process = subprocess.Popen(line(tmp_path / "killed"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/scenes/test/answers-0.jsonl"
    deadline = time.time() + 300
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (log.parent / "summary.json").exists()
    do(line(tmp_path / "killed"))
    assert files(log.parent) == files(tmp_path / "whole/scenes/test")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["settings.json", "answers-0.jsonl", "predictions.jsonl"])
def test_a_file_that_cannot_grow_is_named_and_the_run_continues_later(model, data, tmp_path, whole, file):
    """As on a full disk, while that file is written."""
    line, folder = of_processes(1, model, data, tmp_path), tmp_path / "scenes/test"
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
    assert "File too large" in full.stderr and str(folder / file) in full.stderr
    assert not (folder / "summary.json").exists() and not (folder / "predictions.jsonl").exists()
    do(line)
    assert files(folder) == files(whole)


@pytest.mark.slow
def test_the_benchmark_of_answering():
    line = [sys.executable, str(ROOT / "benchmarks" / "answer_questions.py"), "--scenes", "1", "--questions", "3"]
    done = subprocess.run([*line, "--rounds", "1"], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert "3 questions about 1 images, 0 answers differ" in done.stdout and "median:" in done.stdout, done.stderr


def options_of(parser):
    actions = list(parser._actions)
    for action in actions:
        actions += (
            [inner for sub in (action.choices or {}).values() for inner in sub._actions]
            if hasattr(action, "_name_parser_map")
            else []
        )
    return {option for action in actions for option in action.option_strings} - {"-h", "--help"}


@pytest.mark.integration
def test_the_page_for_users_names_what_there_is(model, data, tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    line = ["--model", model, "--benchmark", f"scenes={data['scenes']}", "--allow-count-mismatch", *PROTOCOL]
    assert command(*line, "--limit", "20", "--output", tmp_path) == 0
    summary = files(tmp_path / "scenes/test")[1]
    fields = {*summary, *summary["model"], *summary["counts"]}
    fields |= {key for row in rows(tmp_path / "scenes/test") for key in row}
    figures = {name for task in summary["results"].values() for name in task}
    for name in [*options_of(make_parser()), *fields, *figures, *PROTOCOLS, *METRICS]:
        assert f"`{name}`" in page or f"`{name} " in page or f" {name} " in page or name.startswith("bleu_"), name
