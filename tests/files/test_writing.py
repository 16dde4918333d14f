"""A file that replaces another is there whole, or the old one is."""

import errno
import os
import stat

import pytest

from mfrsvlm.files.writing import write_file


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    write_file(tmp_path / "a.txt", "ß\r\n")
    write_file(tmp_path / "b.bin", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\x9f\r\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"


def test_links_are_followed_and_permissions_kept(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_survives_a_full_disk(tmp_path, monkeypatch, step):
    path = tmp_path / "card.md"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"No space left on device, so .*card\.md was not written"):
        write_file(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.md"]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing.* was not written"):
        write_file(tmp_path / "missing" / "a.txt", "x")
