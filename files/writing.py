"""Writes files atomically: a reader finds the old file or the new file, never a part of one."""

import os
import shutil
from pathlib import Path


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a temporary file in the same folder and renames it when it is complete.

    Args:
        path: file to write or to replace. A symbolic link is followed.
        content: bytes, or text, which is written as UTF-8 with its line endings unchanged.

    Raises:
        OSError: it cannot be written. An existing file is not changed.
    """
    path = Path(path).resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, so {path} was not written", str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
