"""Reads the files of benchmarks. Errors name the file, the row, the value, and what was expected."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import reading as files
from ...files.reading import shorten
from ...image_sources_mfrsvlm import image_size, is_inside, open_image
from .sample import BenchmarkError, Sample


SHOWN = 5  # names listed in a message
TURNED = range(5, 9)  # values of EXIF's orientation that swap width and height
ORIENTATION = 0x0112


def find(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` that exists under `root`.

    Raises:
        BenchmarkError: none exists; the message lists them.
    """
    names = tuple(names)
    for name in names:
        if (root / name).exists():
            return root / name
    raise BenchmarkError(f"{root} has no {what}: looked for {' or '.join(names)}. See docs/benchmarks.md for the layout.")


def read_text(path: Path) -> str:
    return _read(files.read_text, path)


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is of type `kind` (`list` or `dict`)."""
    value = _read(files.read_json, path)
    if not isinstance(value, kind):
        raise BenchmarkError(f"{path} holds a {type(value).__name__} where a {kind.__name__} is expected.")
    return value


def read_json_rows(path: Path) -> list[tuple[int, Any]]:
    """Rows of a JSON list or a JSONL file, with their numbers, counted from one."""
    rows = _read(files.read_rows, path)
    for number, row in rows:
        if isinstance(row, files.NotJSON):
            raise BenchmarkError(f"{path}, row {number} is not JSON, or it is truncated: {row.reason}.")
    return rows


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file that are not blank, with their numbers, counted from one."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _read(reader: Any, path: Path) -> Any:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise BenchmarkError(f"{path} does not exist. docs/benchmarks.md lists the files of each benchmark.") from error
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error}.") from error
    except ValueError as error:
        raise BenchmarkError(f"{error} If it was downloaded like this, download it again.") from error


def take(row: Any, key: str, kind: type | tuple[type, ...], path: Path, number: int | str) -> Any:
    """`row[key]`, which must exist and have the type `kind`. A bool does not count as a number."""
    if not isinstance(row, dict):
        raise BenchmarkError(f"{path}, row {number}: a {type(row).__name__} where an object is expected: {shorten(row)}.")
    value = row.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = f"is {shorten(value)}, a {type(value).__name__}" if key in row else "is missing"
        raise BenchmarkError(
            f"{path}, row {number}: {key!r} {found}; expected {' or '.join(k.__name__ for k in kinds)}. "
            f"The row has {shorten(sorted(map(str, row)))}."
        )
    return value


def take_text(row: Any, key: str, path: Path, number: int | str, numbers: bool = False) -> str:
    """`row[key]` as text, stripped of surrounding space. It must not be blank.

    Args:
        numbers: whether the value may also be a number.
    """
    text = str(take(row, key, (str, int, float) if numbers else str, path, number)).strip()
    if not text:
        raise BenchmarkError(f"{path}, row {number}: {key!r} is blank. The row has {shorten(sorted(map(str, row)))}.")
    return text


def take_box(values: Any, counts: tuple[int, ...], path: Path, number: int | str) -> tuple[float, ...]:
    """The numbers of one box. They must be finite, and their number must be one of `counts`."""
    try:
        # Python also takes `True` and "1_0" for numbers.
        box = tuple(float(value) for value in values if not isinstance(value, bool) and "_" not in str(value))
    except (OverflowError, TypeError, ValueError):
        box = ()
    if len(box) not in counts or not all(abs(value) < 1e6 for value in box):
        raise BenchmarkError(
            f"{path}, row {number}: {shorten(values)} is not a box: expected {' or '.join(map(str, counts))} finite numbers."
        )
    return box


def take_size(values: Any, path: Path, number: int | str) -> tuple[int, int]:
    """(width, height) of an image in pixels, two positive integers."""
    size = take_box(values, (2,), path, number)
    if not all(side >= 1 and side == int(side) for side in size):
        raise BenchmarkError(
            f"{path}, row {number}: {shorten(values)} is no width and height in pixels, which are positive."
        )
    return int(size[0]), int(size[1])


def take_known(value: str, known: Iterable[str], what: str, path: Path, number: int | str) -> str:
    """The value, which must be one of those that the benchmark has."""
    known = tuple(known)
    if value not in known:
        raise BenchmarkError(f"{path}, row {number}: {what} {shorten(value)} is none of {', '.join(known)}.")
    return value


def as_index(text: str, count: int) -> int | None:
    """A number from 0 to count - 1 in digits; `None` if it is something else."""
    # Python does not convert thousands of digits.
    return int(text) if len(text) <= 9 and text.isdecimal() and int(text) < count else None


# Images


def find_images(folder: Path, root: Path) -> dict[str, str]:
    """Images in a folder and its subfolders: file names, with and without suffix, and paths relative to `root`.

    A name that several images share is left out, since it is ambiguous.
    """
    found: dict[str, str | None] = {}
    for path in files.list_images(folder, recursive=True):
        for name in {path.name, path.stem}:
            found[name] = None if name in found else path.relative_to(root).as_posix()
    return {name: path for name, path in found.items() if path is not None}


def require_inside(root: Path, names: Iterable[str]) -> None:
    """Raises a `BenchmarkError` if images are outside of `root`: absolute, through "..", or through symbolic links."""
    outside = [name for name in dict.fromkeys(names) if not _is_inside(root, name)]
    if outside:
        raise BenchmarkError(
            f"{len(outside)} images are outside of {root}: {', '.join(map(shorten, outside[:SHOWN]))}. If you trust the "
            "files of the benchmark, set allow_outside_images=True (--allow-outside-images)."
        )


def _is_inside(root: Path, name: str) -> bool:
    try:
        return is_inside(root / name, root)
    except (OSError, ValueError):
        return True  # a name that no file can have; it is missing


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name that no file can have


def require_images(root: Path, names: Iterable[str], allow_outside: bool = False) -> None:
    """Raises a `BenchmarkError` with the number and the first names of missing images, or of images outside of `root`."""
    unique = list(dict.fromkeys(names))
    if not allow_outside:
        require_inside(root, unique)
    missing = [name for name in unique if not _is_file(root / name)]
    if missing:
        shown = ", ".join(shorten(name).strip("'") for name in missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise BenchmarkError(
            f"{len(missing)} of {len(unique)} images are missing in {root}: {shown}. "
            "Unpack all images, since skipping samples would change the score."
        )


def require_size(root: Path, names: Iterable[str], size: tuple[int, int], tolerance: int) -> None:
    """Raises a `BenchmarkError` if images do not have the published size. Broken images are ignored here.

    Args:
        root: folder of the images.
        names: their names.
        size: published (width, height) in pixels.
        tolerance: largest difference in pixels of a published image.
    """
    unique = list(dict.fromkeys(names))
    wrong = {}
    for name in unique:
        try:
            found = stored_size(root / name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if any(abs(side - expected) > tolerance for side, expected in zip(found, size, strict=True)):
            wrong[name] = found
    if wrong:
        shown = ", ".join(f"{name} with {width} x {height}" for name, (width, height) in list(wrong.items())[:SHOWN])
        raise BenchmarkError(
            f"{len(wrong)} of {len(unique)} images in {root} do not have the published size of {size[0]} x {size[1]} "
            f"pixels: {shown}. Use the published images, since resized images lose detail. To accept other sizes, set "
            "check_sizes=False."
        )


def require_sizes_of_annotations(root: Path, samples: Iterable[Sample]) -> None:
    """Raises a `BenchmarkError` if the size of an image differs from its annotation, to which its boxes refer."""
    sizes = {sample.images[0]: sample.image_size for sample in samples if sample.image_size}
    wrong = {}
    for name, size in sizes.items():
        try:
            found = stored_size(root / name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if found != tuple(size):
            wrong[name] = f"{name} has {found[0]} x {found[1]}, not {size[0]} x {size[1]}"
    if wrong:
        raise BenchmarkError(
            f"{len(wrong)} of {len(sizes)} images in {root} do not have the size in pixels of their annotation: "
            f"{', '.join(list(wrong.values())[:SHOWN])}. Were they resized or rotated? "
            "To accept them, set check_sizes=False."
        )


def stored_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image after its EXIF orientation, in pixels. Reads only the header, which is fast."""
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def read_size(root: Path, name: str, allow_outside: bool = False) -> tuple[int, int]:
    """(width, height) of an image after its EXIF orientation, in pixels. Also checks that the image can be opened."""
    try:
        height, width = image_size(open_image(name, root, allow_outside))
    except ValueError as error:
        raise BenchmarkError(f"Image {root / name} cannot be read: {error} Unpack it again.") from error
    return width, height


# Boxes


def inside(box: tuple[float, ...], size: tuple[int, int], path: Path, number: int | str) -> tuple[float, ...]:
    """A box (x1, y1, x2, y2) in pixels, clipped to its image of size (width, height).

    Pixels counted from one and rounded fractions exceed the image by up to a pixel or 1 % of the side. A box that exceeds it
    by more has other units or belongs to another image.

    Raises:
        BenchmarkError: the box exceeds the image by more than that.
    """
    limits = size * 2
    if not all(-_slack(side) <= value <= side + _slack(side) for value, side in zip(box, limits, strict=True)):
        raise BenchmarkError(
            f"{path}, row {number}: box {list(box)} exceeds its image, {size[0]} pixels wide and {size[1]} high. "
            f"{likely_scale(box, size)}"
        )
    # Adding 0 turns -0.0 into 0.0. "-0.0" in an answer would not be parsed.
    cut = tuple(min(max(value, 0.0), float(limit)) + 0.0 for value, limit in zip(box, limits, strict=True))
    if _has_area(box) and not _has_area(cut):
        raise BenchmarkError(
            f"{path}, row {number}: box {list(box)} lies outside of its image, {size[0]} pixels wide and {size[1]} high."
        )
    return cut


def likely_scale(box: Sequence[float], size: tuple[int, int]) -> str:
    """A sentence about the likely scale of a box that exceeds its image."""
    if min(box) < -1:
        return "Negative numbers are no pixels: are its numbers center and extent, or is it of another image?"
    for scale in (100, 1000):
        if max(size) < max(box) <= scale:
            return f"Its numbers fit a scale of 0 to {scale} over the sides: convert them to pixels."
    return f"It fits an image of at least {max(box[::2]):g} x {max(box[1::2]):g} pixels: was the image resized or cropped?"


def check_boxes(name: str, samples: Iterable[Sample]) -> None:
    """Checks that the boxes of all samples are in pixels of their images.

    Raises:
        BenchmarkError: a box lies outside of its image, or all boxes seem to have another scale. Names the sample.
    """
    grounded = [sample for sample in samples if sample.boxes]
    for sample in grounded:
        for box in sample.boxes:
            # Corners of an oriented box may lie outside of the image.
            if len(box) == 4:
                inside(box, sample.image_size, Path(name), f"of sample {sample.id}")
    largest = max((value for sample in grounded for box in sample.boxes for value in box), default=0)
    smallest_side = min((side for sample in grounded for side in sample.image_size), default=0)
    # Twenty boxes in pixels are unlikely to be all in one corner. A single box may be, but not within one pixel.
    scale = (
        1 if largest <= 1 < smallest_side / 8 else 100 if largest <= 100 < smallest_side / 2 and len(grounded) > 20 else None
    )
    if grounded and scale:
        first = grounded[0]
        raise BenchmarkError(
            f"{name}: no number of the {len(grounded)} boxes is above {scale}, such as {list(first.boxes[0])} of sample "
            f"{first.id}, in an image of {first.image_size[0]} x {first.image_size[1]} pixels. They seem to be scaled to "
            f"0-{scale}: convert them to pixels."
        )


def _slack(side: int) -> float:
    return max(1.0, side / 100)


def _has_area(box: Sequence[float]) -> bool:
    return box[0] != box[2] and box[1] != box[3]


# Options


def chosen_classes(classes: Sequence[str] | None, known: Sequence[str], name: str) -> list[str]:
    """The classes that the user selected, in the order of the benchmark; all classes for `None`.

    Raises:
        BenchmarkError: no class, or an unknown class.
    """
    if classes is None:
        return list(known)
    unknown = sorted(set(classes) - set(known))
    if unknown or not classes or isinstance(classes, str):
        wrong = f"has no classes {unknown}" if unknown and not isinstance(classes, str) else f"got classes={classes!r}"
        raise BenchmarkError(f"{name} {wrong}; pass a list of some of {', '.join(known)}.")
    return [label for label in known if label in classes]


def left_out(rows: Mapping[int, str], total: int, path: Path, what: str, broken_rows: str) -> dict[str, int]:
    """The entry of `Benchmark.left_out` for broken rows.

    Args:
        rows: broken rows by their number.
        total: number of rows in the file.
        path: the file, for messages.
        what: what is wrong with the rows.
        broken_rows: "error" or "skip".

    Raises:
        BenchmarkError: there are broken rows and `broken_rows` is "error"; or an unknown value.
    """
    if broken_rows not in ("error", "skip"):
        raise BenchmarkError(f"broken_rows={broken_rows!r} must be 'error' or 'skip'.")
    if not rows:
        return {}
    if broken_rows == "error":
        shown = ", ".join(f"row {number} {shorten(text)}" for number, text in list(rows.items())[:SHOWN])
        raise BenchmarkError(
            f"{path}: {len(rows)} of {total} rows have {what}: {shown}{', ...' if len(rows) > SHOWN else ''}. "
            "Set broken_rows='skip' to skip them; the summary then counts them."
        )
    return {f"rows with {what}": len(rows)}
