"""Output folders: one run at a time, and nothing lost or left behind when a run is killed."""

import signal
import subprocess
import sys
import textwrap

import pytest

from mfrsvlm.output_folders import FolderInUse, clean_up, locked, whole_folder


pytest.importorskip("fcntl")
pytestmark = pytest.mark.integration

# Writes a new output, and is killed at the given call of `os.replace`, before or after it.
WRITER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from mfrsvlm.output_folders import whole_folder
    output, kill_at, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
    replace, calls = os.replace, []
    def replace_and_die(*names):
        calls.append(names)
        if len(calls) == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace_and_die
    with whole_folder(output) as folder:
        (folder / "config.json").write_text("new")
        if kill_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    """
)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("had_output", [False, True])
@pytest.mark.parametrize("point", ["0 before", "1 before", "1 after", "2 before", "2 after", "9 after"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_output(tmp_path, had_output, point):
    output = tmp_path / "out"
    if had_output:
        output.mkdir()
        (output / "config.json").write_text("old")
    command = [sys.executable, "-c", WRITER, str(output), *point.split()]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60).returncode
    last = 2 if had_output else 1  # calls of os.replace
    assert killed == (-signal.SIGKILL if int(point[0]) <= last else 0)
    clean_up(output)
    is_new = int(point[0]) > last or point == f"{last} after"
    expected = {"config.json": "new" if is_new else "old"} if is_new or had_output else None
    assert (content(output) if output.exists() else None) == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    with whole_folder(output) as folder:  # and the next run goes through
        (folder / "config.json").write_text("next")
    assert content(output) == {"config.json": "next"} and len(list(tmp_path.iterdir())) == 1


def test_two_runs_do_not_write_one_folder(tmp_path):
    output = tmp_path / "out"
    with whole_folder(output):
        with pytest.raises(FolderInUse, match=rf"{output} is being written by another run.*choose another"):
            with whole_folder(output):
                pass
        with whole_folder(tmp_path / "other"):
            pass
    assert output.is_dir() and {path.name for path in tmp_path.iterdir()} == {"out", "other"}
    with locked(output):
        for second in (whole_folder, locked):
            with pytest.raises(FolderInUse, match=rf"{output} is being written"), second(output):
                pass
    with locked(output):
        pass


def test_the_process_that_holds_a_lock_is_named_and_its_death_frees_it(tmp_path):
    script = "import sys, time; from pathlib import Path; from mfrsvlm.output_folders import locked\n"
    script += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            with pytest.raises(FolderInUse, match=str(tmp_path / "run")) as caught, locked(tmp_path / "run"):
                pass
            if sys.platform == "linux":
                assert f"process {process.pid}" in str(caught.value)
        finally:
            process.kill()
            process.wait()
    with locked(tmp_path / "run"):
        pass


def test_without_locks_folders_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("mfrsvlm.output_folders.fcntl", None)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
    with locked(tmp_path / "out"):
        assert content(tmp_path / "out") == {"config.json": "new"}


def test_an_error_removes_the_temporary_folder_only(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())


def test_a_locked_folder_is_cleaned(tmp_path):
    for name in (".a.json.123-0a1b2c3d.unfinished", ".checksums.json.4287.unfinished"):
        (tmp_path / name).write_text("{")
    kept = [".unfinished", "a.json", "b.12.unfinished", ".notes.unfinished"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_new_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "file").exists()
