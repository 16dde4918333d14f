"""Writes files so that a reader finds the old one or the new one, and never a part."""

import os
import shutil
from pathlib import Path


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside its place and renames it when it is whole.

    Args:
        path: file to write or to replace. A link is followed.
        content: text, written as UTF-8 with the line ends it has; or bytes.

    Raises:
        OSError: it cannot be written. What stood there before is whole.
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
