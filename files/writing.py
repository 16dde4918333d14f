"""Writes files whole: a reader finds the old file or the new one, never a part of one.

No other module of the package opens files for writing, except for those that `tests/files/test_writers.py` lists.
"""

import contextlib
import errno
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LONGEST_NAME = 50  # characters of a file's name in that of its temporary file; file systems allow 255 bytes


class WriteError(OSError):
    """A file or folder that cannot be written. The message is one line with the reason and the path."""

    def __str__(self) -> str:
        return str(self.strerror)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a temporary file in the same folder and renames it when it is complete.

    Args:
        path: file to write or to replace. A symbolic link is followed.
        content: bytes, or text, which is written as UTF-8 with its line endings unchanged.

    Raises:
        WriteError: it cannot be written. An existing file is not changed.
        ValueError: the text has a lone surrogate, which UTF-8 cannot express.
    """
    try:
        content = content.encode() if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} was not written: its text has a lone surrogate at character {error.start}.") from error
    with whole_file(path) as unfinished, open(unfinished, "xb") as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder. Its file gets the name `path` if the block succeeds.

    Args:
        path: file to write or to replace. A symbolic link is followed. A replaced file keeps its permissions.

    Raises:
        WriteError: it cannot be written, or the block raises an OSError. An existing file is not changed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(path, "was not written"))
        target = _target(path)
        name = f".{target.name[:LONGEST_NAME]}.{os.getpid()}-{secrets.token_hex(4)}.unfinished"
        unfinished = target.with_name(name)
        stack.callback(unfinished.unlink, missing_ok=True)
        yield unfinished
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)


@contextlib.contextmanager
def whole_array(path: str | os.PathLike[str], dtype: Any, shape: tuple[int, ...]) -> "Iterator[np.memmap[Any, Any]]":
    """Yields a new memory-mapped array. Its `.npy` file gets the name `path` if the block succeeds.

    Raises:
        WriteError: see `whole_file`. A full disk is reported before the block runs.
    """
    from numpy.lib.format import open_memmap

    with whole_file(path) as unfinished:
        array = open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(unfinished, "r+b") as file:  # a write to a map kills the process if the disk is full
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        yield array
        array.flush()


def write_image(path: str | os.PathLike[str], image: "Image.Image", **options: Any) -> None:
    """Writes an image in the format of the file's suffix.

    Args:
        path: see `write_file`.
        image: the image.
        **options: see `Image.save`.

    Raises:
        WriteError: see `write_file`; or the suffix belongs to no format.
    """
    content = io.BytesIO()
    image.save(content, _image_format(path), **options)
    write_file(path, content.getvalue())


def write_figure(path: str | os.PathLike[str], figure: Any, **options: Any) -> None:
    """Writes a figure of matplotlib in the format of the file's suffix. Options are those of `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or "png", **options)
    write_file(path, content.getvalue())


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Any]) -> None:
    """Writes tensors, or dictionaries of them, as `torch.save` does."""
    import torch

    content = io.BytesIO()
    torch.save(tensors, content)
    write_file(path, content.getvalue())


def check_file(path: str | os.PathLike[str], is_image: bool = False) -> None:
    """Checks, before long work, that a file can be written. Nothing is changed.

    Args:
        path: the file.
        is_image: also check that its suffix belongs to an image format.

    Raises:
        WriteError: see `write_file` and `write_image`.
    """
    if is_image:
        _image_format(path)
    with _explained(path, "cannot be written"):
        _try_to_write(_target(path).parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Checks, before long work, that files can be written to a folder, which is made later if it does not exist.

    Raises:
        WriteError: the path or a part of it is a file or a link that leads nowhere, or nothing can be written there.
    """
    path = Path(path)
    with _explained(path, "cannot be written"):
        existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not existing.is_dir():
            kind = "a file" if existing.exists() else "a link that leads nowhere"
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is {kind}, not a folder")
        _try_to_write(existing)


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str], outcome: str) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise WriteError(error.errno or errno.EIO, f"{reason}, so {os.fspath(path)} {outcome}") from error


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to write, without links.

    Raises:
        OSError: it is no regular file, or its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "The link leads nowhere")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "It is a folder")
    if target.exists() and not target.is_file():  # a device or a pipe must not be replaced by a file
        raise OSError(errno.EINVAL, "It is not a regular file")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "It is write-protected")
    if not target.parent.is_dir():
        kind = "is not a folder" if target.parent.exists() else "does not exist"
        raise FileNotFoundError(errno.ENOENT, f"The folder {target.parent} {kind}")
    return target


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _image_format(path: str | os.PathLike[str]) -> str:
    from PIL import Image

    suffix = os.path.splitext(path)[1].lower()
    name = Image.registered_extensions().get(suffix)
    if name not in Image.SAVE:
        found = f"The suffix {suffix}" if suffix else "A missing suffix"
        advice = "Use .png or .jpg"
        raise WriteError(errno.EINVAL, f"{found} names no image format, so {os.fspath(path)} cannot be written. {advice}")
    return str(name)
