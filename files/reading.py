"""Reads text, JSON rows and folders of images. Nothing is skipped or changed silently."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


IMAGE_SUFFIXES = frozenset({".bmp", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SHOWN = 80  # characters of a value in a message
DEEPEST = 100  # levels of nested JSON; Python itself fails at about 1,000, and at fewer inside of other calls
LONGEST_INT = 308  # digits; longer numbers may exceed float64
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# UTF-32 before UTF-16, which starts with the same bytes.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class NotJSON:
    """A row that is not JSON, or JSON that is not unambiguous, with the reason."""

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
        ValueError: the file is not UTF-8, or has NUL bytes. The message names the encoding if a byte order mark shows it.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is not None:
        raise ValueError(f"{path} is {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Convert it first.") from error
    if "\0" in text:  # UTF-16 without a mark, or what a crash of the system leaves
        raise ValueError(f"{path} is not text: byte {content.index(0)} is NUL. Convert it to UTF-8, or copy it again.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], allow_nan: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        allow_nan: read `NaN` and `Infinity`, which Python writes for such numbers.

    Raises:
        OSError, ValueError: see `read_text` and `parse_json`.
    """
    text = read_text(path)
    try:
        return parse_json(text, allow_nan)
    except ValueError as error:
        raise _named(path, error) from error


def parse_json(text: str, allow_nan: bool = False) -> Any:
    """The value of a JSON text.

    Stricter than `json.loads`: rejects a repeated key, `NaN` and `Infinity`, numbers beyond float64, escapes of lone
    surrogates, and nesting deeper than `DEEPEST`.

    Raises:
        ValueError: the text is not such JSON. The message says what is wrong and, for wrong syntax, where.
    """
    value = _without_flaws(_parse(text, allow_nan), _has_surrogates(text))
    if isinstance(value, NotJSON):
        raise ValueError(value.reason)
    return value


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """The rows of a JSON list or, if the name ends in `.jsonl`, one JSON value per line.

    Returns:
        The number of each row, counted from one (for JSONL, the number of its line), and its value. A row that
        `parse_json` would reject becomes a `NotJSON`, so that the caller can reject or skip it. (Outside of JSONL, wrong
        syntax concerns the whole file.)

    Raises:
        OSError, ValueError: see `read_json`; or the file is not a list, or has no rows.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        rows = list(_parse_lines(read_text(path)))
    else:
        text = read_text(path)
        try:
            values = _parse(text)
        except ValueError as error:
            raise _named(path, error) from error
        if isinstance(values, NotJSON):
            raise _named(path, ValueError(values.reason))
        if not isinstance(values, list):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a list. For one value per line, name it *.jsonl.")
        check_text = _has_surrogates(text)
        rows = list(enumerate((_without_flaws(value, check_text) for value in values), start=1))
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def _parse_lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`, which also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, NotJSON(str(error))


def _parse(text: str, allow_nan: bool = False) -> Any:
    """The value of a JSON text, with a `NotJSON` in place of ambiguous parts, so that their row is known."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_make_object,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=float if allow_nan else lambda name: NotJSON(f"{name} is no number of JSON"),
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be read") from error


def _make_object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return NotJSON(f"the key {shorten(repeated)} occurs more than once in one object")
    return value


def _parse_int(text: str) -> Any:
    return int(text) if len(text) <= LONGEST_INT else _parse_float(text, int)


def _parse_float(text: str, kind: type = float) -> Any:
    if math.isinf(float(text)):
        return NotJSON(f"the number {shorten(text)} is beyond the range of float64")
    return kind(text)


def _named(path: str | os.PathLike[str], error: ValueError) -> ValueError:
    truncated = ", or it is truncated" if isinstance(error, json.JSONDecodeError) else ""
    return ValueError(f"{path} is not JSON{truncated}: {error}.")


def _has_surrogates(text: str) -> bool:
    """Whether a JSON text has escapes of surrogates. Those in pairs are characters."""
    return SURROGATE_ESCAPE.search(text) is not None


def _without_flaws(value: Any, check_text: bool) -> Any:
    """A parsed value, or a `NotJSON` with the reason if it contains one, is nested too deeply or has lone surrogates."""
    level = [value]
    for _ in range(DEEPEST + 1):
        for item in level:
            if isinstance(item, NotJSON):
                return item
            if check_text and isinstance(item, str) and SURROGATE.search(item):
                return NotJSON(f"the text {shorten(item)} has a lone surrogate, which is no character")
        level = [
            child
            for item in level
            if isinstance(item, (list, dict))
            for child in (item if isinstance(item, list) else (*item, *item.values()))
        ]
        if not level:
            return value
    return NotJSON(f"it is nested deeper than {DEEPEST} levels")


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
