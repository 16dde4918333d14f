"""Folders that one run at a time writes, and that are whole or absent when a run is killed.

A lock is one of the operating system (`flock` on the folder), so it ends with its process and leaves no file behind. Where
there is none (Windows, some network disks), runs are not kept apart, and what killed runs leave is not removed.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = re.compile(r"\..+\.\d+(-[0-9a-f]+)?\.unfinished")  # names of temporary files, see `files.writing.whole_file`
WHOLE, REPLACED = "whole", "replaced"  # in the temporary folder: the new output, and the old one while it is exchanged


class FolderInUse(OSError):
    """Another run writes the folder. The message names the folder and, if it is known, the process."""


def unwritten(error: BaseException) -> str | None:
    """One line about a file that could not be written, with the notes of the error. `None` for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        file = error.filename2 or error.filename
        line = f"{error.strerror}: {file}" if file else str(error.strerror)
    elif isinstance(error, SafetensorError):
        line = str(error)
    elif isinstance(error, RuntimeError) and ("inline_container" in str(error) or "iostream" in str(error)):  # `torch.save`
        line = "A file could not be written, since the disk may be full."
    else:
        return None
    return " ".join(" ".join([line, *getattr(error, "__notes__", ())]).split())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it does not exist. Removes the temporary files of killed runs in it.

    A folder that was made here and is empty at the end, as after an error about the settings, is removed again.

    Raises:
        FolderInUse: another run holds it.
        OSError: the folder cannot be made.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder)
    try:
        if descriptor is not None:
            for path in folder.iterdir():
                if UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the lock, or `None` where there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise FolderInUse(
            f"{folder} is being written by another run{f' (process {holder})' if holder else ''}. Wait until it ends, or "
            "choose another folder."
        ) from error
    except OSError:  # a disk without locks
        os.close(descriptor)
        return None
    return descriptor


def _holder(descriptor: int) -> int | None:
    """Process that holds the lock, on Linux."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = os.fstat(descriptor).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and int(words[5].rpartition(":")[2]) == inode and int(words[4]) > 0:
                return int(words[4])
    return None


def clean_up(output: Path, own: Path | None = None) -> None:
    """Removes what killed runs have left beside `output`, and puts back an output that a killed run was exchanging.

    Args:
        output: the folder that a run writes, see `whole_folder`.
        own: the temporary folder of this run.

    Raises:
        FolderInUse: another run is writing the output.
    """
    if fcntl is None:
        return
    for scratch in output.parent.glob(f".{output.name}.partial-*"):
        if scratch == own or not scratch.is_dir():
            continue
        try:
            descriptor = _lock(scratch)
        except FileNotFoundError:  # its run has just ended
            continue
        except FolderInUse as error:
            raise FolderInUse(str(error).replace(str(scratch), str(output))) from error
        if descriptor is None:
            return
        try:
            if (scratch / REPLACED).is_dir() and not output.exists():
                os.replace(scratch / REPLACED, output)
            shutil.rmtree(scratch, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that replaces `output` if the block succeeds, and is removed if it raises.

    It is in a hidden folder next to `output`, which may also contain other temporary files. The next run removes what a
    killed run has left, see `clean_up`.

    Raises:
        FolderInUse: another run is writing the output.
        OSError: the output cannot be written. An old one is not changed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if output.is_dir():
            stack.enter_context(locked(output))
        scratch = stack.enter_context(_scratch(output))
        clean_up(output, scratch)
        whole, replaced = scratch / WHOLE, scratch / REPLACED
        whole.mkdir()
        had_output = output.exists()
        yield whole
        os.umask(umask := os.umask(0))
        for path in whole.iterdir():  # safetensors makes what only its owner can read, but model folders are shared
            path.chmod(0o666 & ~umask)
        try:
            if had_output and output.exists():
                os.replace(output, replaced)
            os.replace(whole, output)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, output)
            raise


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A locked temporary folder next to `output`, removed at the end."""
    for _ in range(20):
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        # Another run may clean up between the two lines above and below.
        with contextlib.suppress(FolderInUse, FileNotFoundError):
            descriptor = _lock(scratch)
            if scratch.is_dir():
                break
            if descriptor is not None:
                os.close(descriptor)
        time.sleep(0.05)
    else:
        raise FolderInUse(f"{output} is being written by another run. Wait until it ends, or choose another folder.")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


__all__ = ["FolderInUse", "clean_up", "locked", "unwritten", "whole_folder"]
