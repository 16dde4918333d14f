"""Reads the files of benchmarks and says what is wrong with them: the file, the row, the value, and what was expected."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...image_sources_mfrsvlm import image_size, open_image
from .sample import BenchmarkError


SHOWN = 5  # names in a message about many


def find(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` that exists under `root`.

    Raises:
        BenchmarkError: none does; the message lists them.
    """
    names = tuple(names)
    for name in names:
        if (root / name).exists():
            return root / name
    raise BenchmarkError(f"{root} holds no {what}: looked for {' or '.join(names)}. See docs/benchmarks.md for the layout.")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BenchmarkError(f"There is no {path}. docs/benchmarks.md says which files the benchmark needs.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} cannot be read as UTF-8: {error}.") from error


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is a `kind`, `list` or `dict`."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path} is no JSON, or its end is missing: {error}. Download it again.") from error
    if not isinstance(value, kind):
        raise BenchmarkError(f"{path} holds a {type(value).__name__} where a {kind.__name__} is expected.")
    return value


def take(row: Any, key: str, kind: type | tuple[type, ...], path: Path, number: int | str) -> Any:
    """`row[key]`, checked to be there and to be of that type. A bool is no number."""
    if not isinstance(row, dict):
        raise BenchmarkError(f"{path}, row {number}: a {type(row).__name__} where an object is expected: {str(row)[:80]!r}.")
    value = row.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = f"is {value!r:.80}, a {type(value).__name__}" if key in row else "is missing"
        raise BenchmarkError(
            f"{path}, row {number}: {key!r} {found}; expected {' or '.join(k.__name__ for k in kinds)}. "
            f"The row has {sorted(row)}."
        )
    return value


def take_text(row: Any, key: str, path: Path, number: int | str, numbers: bool = False) -> str:
    """`row[key]` as text that is not blank, without the space around it.

    Args:
        numbers: also a number, as JSON writes it.
    """
    text = str(take(row, key, (str, int, float) if numbers else str, path, number)).strip()
    if not text:
        raise BenchmarkError(f"{path}, row {number}: {key!r} is blank. The row has {sorted(row)}.")
    return text


def take_box(values: Any, counts: tuple[int, ...], path: Path, number: int | str) -> tuple[float, ...]:
    """The numbers of one box, checked to be as many as one of `counts`, finite, and numbers."""
    try:
        box = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        box = ()
    if len(box) not in counts or not all(abs(value) < 1e6 for value in box):
        raise BenchmarkError(
            f"{path}, row {number}: {values!r:.120} is no box: expected {' or '.join(map(str, counts))} finite numbers."
        )
    return box


def require_images(root: Path, names: Iterable[str]) -> None:
    """Raises a `BenchmarkError` that counts and names the images which do not exist."""
    unique = list(dict.fromkeys(names))
    missing = [name for name in unique if not (root / name).is_file()]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise BenchmarkError(
            f"{len(missing)} of {len(unique)} images are missing under {root}: {shown}. "
            "Unpack all images: a sample without its image cannot be asked, and leaving it out would change the score."
        )


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image in pixels, upright as its EXIF data say."""
    try:
        height, width = image_size(open_image(path))
    except ValueError as error:
        raise BenchmarkError(f"Image {path} cannot be read: {error} Unpack it again.") from error
    return width, height


def inside(box: tuple[float, ...], size: tuple[int, int], path: Path, number: int | str) -> tuple[float, ...]:
    """A box (x1, y1, x2, y2) cut to its image (width, height). One that is more than a pixel beyond is refused.

    Pixels counted from one reach that far; farther, the box is written in other units, or belongs to another image.
    """
    limits = size * 2
    if not all(-1 <= value <= limit + 1 for value, limit in zip(box, limits, strict=True)):
        raise BenchmarkError(
            f"{path}, row {number}: box {list(box)} reaches out of its image, {size[0]} pixels wide and {size[1]} high."
        )
    return tuple(min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits, strict=True))
