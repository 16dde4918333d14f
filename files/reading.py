"""Reads text, JSON rows and folders of images. Nothing is skipped or changed silently."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


IMAGE_SUFFIXES = frozenset({".bmp", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SHOWN = 80  # characters of a value in a message
# UTF-32 before UTF-16, which starts with the same bytes.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class NotJSON:
    """A line of a JSONL file that is not JSON, with the message of the parser."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def shorten(value: Any, length: int = SHOWN) -> str:
    """`repr` of a value for a message. A long one is truncated, and its size is added."""
    # The `repr` of a long text takes seconds, so text is truncated first.
    text = repr(value[: length + 1] if isinstance(value, (str, bytes)) else value)
    if len(text) <= length:
        return text
    size = f"{len(value)} characters" if isinstance(value, (str, bytes)) else f"{len(text)} characters as text"
    return f"{text[: length - 1]}… ({size})"


def read_text(path: str | os.PathLike[str]) -> str:
    r"""The text of a UTF-8 file, without a byte order mark and with `\n` at the end of every line.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8. The message names the encoding if a byte order mark shows it.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is not None:
        raise ValueError(f"{path} is {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Convert it first.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        OSError, ValueError: see `read_text`; or the text is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or it is truncated: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """The rows of a JSON list or, if the name ends in `.jsonl`, one JSON value per line.

    Returns:
        The number of each row, counted from one (for JSONL, the number of its line), and its value. A line that is not JSON
        becomes a `NotJSON`, so that the caller can reject or skip it.

    Raises:
        OSError, ValueError: see `read_json`; or the file is not a list, or has no rows.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        rows = list(_parse_lines(read_text(path)))
    else:
        values = read_json(path)
        if not isinstance(values, list):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a list. For one value per line, name it *.jsonl.")
        rows = list(enumerate(values, start=1))
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def _parse_lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`, which also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, NotJSON(str(error))


def is_hidden(path: Path) -> bool:
    """Whether this is a hidden file, or one that an operating system adds: `._x.jpg`, `__MACOSX`, `Thumbs.db`."""
    return path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db")


def list_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden ones."""
    return sorted(path for path in Path(folder).iterdir() if path.is_dir() and not is_hidden(path))


def list_images(folder: str | os.PathLike[str], recursive: bool = False) -> list[Path]:
    """The image files in a folder, sorted by path, without hidden ones. The case of suffixes does not matter.

    Args:
        recursive: include subfolders.
    """
    images = [p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not is_hidden(p)]
    if recursive:
        images += [image for below in list_folders(folder) for image in list_images(below, recursive=True)]
    return sorted(images)
