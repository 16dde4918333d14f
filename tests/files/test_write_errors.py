"""What cannot be written is one error of one line, before the work, and the old file stays whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from tiny_models import tiny_config

from mfrsvlm import convert_checkpoint
from mfrsvlm.demo import __main__ as demo
from mfrsvlm.demo import ask
from mfrsvlm.evaluation import __main__ as evaluation
from mfrsvlm.files.writing import WriteError, check_file, check_folder, whole_array, whole_file, write_file, write_image
from mfrsvlm.geospatial import __main__ as info
from mfrsvlm.model_card.card import write_model_card
from mfrsvlm.output_folders import unwritten
from mfrsvlm.scenes import __main__ as scenes
from mfrsvlm.training import finetune, train_demo_model


def make_bad_path(kind, folder):
    """A path that no file can be written to, and whether a folder can."""
    path = folder / f"{kind}.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        (folder / "file").write_text("old")
        path = folder / "file" / "a.png"
    elif kind == "nowhere":
        path.symlink_to(folder / "missing.png")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "no parent":
        path = folder / "missing" / "a.png"
    elif kind == "read-only":  # holds for root too
        path = Path("/proc/self/a.png")
    elif kind == "pipe":
        os.mkfifo(path)
    return path


KINDS = ["folder", "below a file", "nowhere", "circle", "no parent", "read-only", "pipe"]
NO_FOLDER = ["file", "below a file", "nowhere", "circle", "read-only"]


@pytest.mark.parametrize("kind", KINDS)
def test_paths_that_are_no_files(tmp_path, kind):
    path = make_bad_path(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for write in (check_file, lambda path: write_file(path, "new"), lambda path: write_image(path, Image.new("L", (2, 2)))):
        with pytest.raises(WriteError) as error:
            write(path)
        message = str(error.value)
        assert str(path) in message and "\n" not in message and "Errno" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", NO_FOLDER)
def test_paths_that_are_no_folders(tmp_path, kind):
    path = make_bad_path(kind, tmp_path)
    if kind == "file":
        path.write_text("old")
    for wanted in (path, path / "a" / "b"):
        with pytest.raises(WriteError, match=rf"so {wanted} cannot be written"):
            check_folder(wanted)


def test_checks_leave_nothing(tmp_path):
    check_file(tmp_path / "a.png", is_image=True)
    check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match=r"suffix \.xyz names no image format"):
        check_file(tmp_path / "a.xyz", is_image=True)


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to all files
    with pytest.raises(WriteError, match="write-protected"):
        write_file(path, "new")
    assert path.read_text() == "old"


def test_a_long_name_can_be_written(tmp_path):
    write_file(tmp_path / ("ß" * 125 + ".txt"), "x")
    with pytest.raises(WriteError, match="name too long"):
        write_file(tmp_path / ("x" * 256), "x")


def test_text_that_is_not_unicode(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt was not written: .*lone surrogate at character 1"):
        write_file(tmp_path / "a.txt", "a\ud800")


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        unfinished.write_text("new")
        raise ZeroDivisionError
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_arrays_are_written_whole(tmp_path):
    path = tmp_path / "a.npy"
    with whole_array(path, np.uint8, (2, 3)) as array:
        array[:] = 7
        assert not path.exists()
    assert np.array_equal(np.load(path), np.full((2, 3), 7))
    with pytest.raises(WriteError, match=r"a\.npy was not written"), whole_array(path, np.uint8, (10**9, 10**6)):
        pytest.fail("a petabyte was reserved")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"] and np.load(path).shape == (2, 3)


def fail_on_a_full_disk(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_the_old_card_survives_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("old")
    fail_on_a_full_disk(monkeypatch)
    with pytest.raises(WriteError, match=r"No space left on device, so .*README\.md was not written"):
        write_model_card(tmp_path, tiny_config(), "trained")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_errors_of_other_libraries_become_one_line():
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    full.add_note("checkpoint-6 could not\nbe saved.")
    assert unwritten(full) == "No space left on device: /a/b checkpoint-6 could not be saved."
    assert unwritten(SafetensorError("I/O error: No space left")) == "I/O error: No space left"
    torch_save = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0")
    assert unwritten(torch_save) == "A file could not be written, since the disk may be full."
    assert (
        unwritten(RuntimeError("out of memory")) is unwritten(OSError("no connection")) is unwritten(KeyError("a")) is None
    )


FULL = """
import resource, signal, sys
from mfrsvlm.files.writing import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file(sys.argv[1], b"x" * 100_000)
except OSError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.integration
def test_the_old_file_survives_a_limit_of_the_system(tmp_path):
    path = tmp_path / "card.md"
    path.write_text("old")
    # As in this process, whose package may lie on the path by a link.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stderr == f"error: File too large, so {path} was not written\n"
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def command_lines(path, folder):
    """All commands that write files, with `path` as their output: with files, and with folders."""
    card = folder / "model"
    image = folder / "image.png"
    config = folder / "config.yaml"
    files = {
        "scenes --contact-sheet": (scenes.main, ["--contact-sheet", path]),
        "info": (info.main, [image, "--preview", path]),
        "demo": (demo.main, ["--picture", path]),
        "ask": (ask.main, [image, "Why?", "--model", card, "--picture", path]),
    }
    folders = {
        "scenes": (scenes.main, [path, "--count", "1", "--workers", "1"]),
        "evaluate": (evaluation.main, ["run", "--model", card, "--benchmark", "scenes", "--output", path]),
        "report": (evaluation.main, ["report", folder, "--output", path]),
        "convert": (convert_checkpoint.main, ["released", card, "--vision-tower", card, "--output", path]),
        "finetune": (finetune.run, [config, "--model_name_or_path", card, "--train_file", image, "--output_dir", path]),
        "train_demo_model": (train_demo_model.run, [config, "--output", path]),
    }
    return files, folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["scenes --contact-sheet", "info", "demo", "ask"])
def test_commands_check_their_file_first(tmp_path, monkeypatch, capsys, name, kind):
    monkeypatch.setattr("mfrsvlm.evaluation.answering.load", lambda *_, **__: pytest.fail("the model was loaded"))
    run, line = command_lines(make_bad_path(kind, tmp_path), tmp_path)[0][name]
    check_one_line(run, line, tmp_path, capsys)


@pytest.mark.parametrize("kind", NO_FOLDER)
@pytest.mark.parametrize("name", ["scenes", "evaluate", "report", "finetune", "train_demo_model"])
def test_commands_check_their_folder_first(tmp_path, monkeypatch, capsys, name, kind):
    monkeypatch.setattr("mfrsvlm.evaluation.answering.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    path = make_bad_path(kind, tmp_path)
    if kind == "file":
        path.write_text("old")
    (tmp_path / "config.yaml").write_text("report_to: none\n")
    run, line = command_lines(path, tmp_path)[1][name]
    check_one_line(run, line, tmp_path, capsys)


def check_one_line(run, line, folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        status = run(list(map(str, line)))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Errno" not in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
