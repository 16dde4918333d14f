"""VRSBench: captions, questions and referring expressions about the validation images.

They are read from the three evaluation files (`VRSBench_EVAL_*.json`) or, if these are missing, from the annotations of
single images (`Annotations_val/*.json`), from which the files were made.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.reading import is_hidden, shorten
from .reading import find, read_json, read_size, require_images, take, take_box, take_text
from .sample import Benchmark, BenchmarkError, Sample


SOURCE = "https://huggingface.co/datasets/xiang709/VRSBench"
IMAGE_SIZE = (512, 512)
ANNOTATIONS = "Annotations_val"
IMAGES = ("Images_val", "images/Images_val")
BOX_SCALE = 100  # boxes are scaled to 0-100

_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


@dataclass(frozen=True)
class Row:
    """A row of an evaluation file, or a part of an annotation, with its file and number."""

    path: Path
    number: int
    sample_id: str
    image: str
    content: Any
    annotated: bool

    def text(self, in_file: str, in_annotation: str, numbers: bool = False) -> str:
        """The text of a field, by its name in an evaluation file or in an annotation."""
        return take_text(self.content, in_annotation if self.annotated else in_file, self.path, self.number, numbers)


def load_captions(name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """One sample, with one caption, for each image."""
    samples = [
        Sample(row.sample_id, (row.image,), "captioning", "", (row.text("ground_truth", "caption"),))
        for row in _rows(root, "Cap", None)
    ]
    return Benchmark(name, split, root, samples)


def load_questions(name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """Every question with its one answer; the group is the type of the question, such as "object quantity"."""
    samples = [
        Sample(
            id=row.sample_id,
            images=(row.image,),
            task="vqa",
            question=row.text("question", "question"),
            references=(row.text("ground_truth", "answer", numbers=True),),
            group=row.text("type", "type").lower(),
        )
        for row in _rows(root, "vqa", "qa_pairs")
    ]
    return Benchmark(name, split, root, samples)


def load_referring(name: str, root: Path, split: str, check_counts: bool, allow_outside_images: bool = False) -> Benchmark:
    """Every referring expression with its axis-aligned box. The group is "unique" or "non unique", by the class in the
    image.

    Both layouts give the boxes of VRSBench's own evaluation: corners truncated to whole hundredths of the sides of the
    image. A few truncated boxes have no area.
    """
    rows = list(_rows(root, "referring", "objects"))
    require_images(root, (row.image for row in rows), allow_outside_images)
    sizes = {image: read_size(root, image, allow_outside_images) for image in {row.image for row in rows}}
    samples = []
    for row in rows:
        box = _box_of_annotation(row) if row.annotated else _box_of_file(row)
        key = "unique" if isinstance(row.content, dict) and "unique" in row.content else "is_unique"
        unique = take(row.content, key, (bool, int), row.path, row.number)
        if unique not in (0, 1):
            raise BenchmarkError(f"{row.path}, row {row.number}: {key!r} is {shorten(unique)}, neither true nor false.")
        pixels = tuple(value * side / BOX_SCALE for value, side in zip(box, sizes[row.image] * 2, strict=True))
        samples.append(
            Sample(
                id=row.sample_id,
                images=(row.image,),
                task="grounding",
                question=row.text("question", "referring_sentence"),
                references=(),
                group="unique" if unique else "non unique",
                boxes=(pixels,),
                image_size=sizes[row.image],
            )
        )
    return Benchmark(name, split, root, samples)


def _rows(root: Path, task: str, parts: str | None) -> Iterator[Row]:
    """Rows of the evaluation file of a task, or of all annotations: one row per item of `parts`, or one per annotation."""
    images = find(root, IMAGES, "folder of images").relative_to(root).as_posix()
    source = find(root, (f"VRSBench_EVAL_{task}.json", f"RSBench_EVAL_{task}.json", ANNOTATIONS), "evaluation file")
    if source.name != ANNOTATIONS:
        for number, content in enumerate(read_json(source, list)):
            image = f"{images}/{take_text(content, 'image_id', source, number)}"
            sample_id = str(take(content, "question_id", (int, str), source, number))
            yield Row(source, number, sample_id, image, content, annotated=False)
        return
    # The folder also contains *input.json, from which the annotations were generated.
    paths = [path for path in sorted(source.glob("*.json")) if not (is_hidden(path) or path.name.endswith("input.json"))]
    for path in paths:
        annotation = read_json(path, dict)
        image = f"{images}/{take_text(annotation, 'image', path, 0)}"
        if parts is None:
            yield Row(path, 0, path.stem, image, annotation, annotated=True)
            continue
        for number, content in enumerate(take(annotation, parts, list, path, 0)):
            yield Row(path, number, f"{path.stem}-{number}", image, content, annotated=True)


def _box_of_file(row: Row) -> tuple[float, ...]:
    written = row.text("ground_truth", "ground_truth")
    numbers = _BOX.fullmatch(written)
    if numbers is None or max(map(int, numbers.groups())) > BOX_SCALE:
        raise BenchmarkError(
            f"{row.path}, row {row.number}: 'ground_truth' {shorten(written)} is not a box; expected "
            f"{{<x1><y1><x2><y2>}} with integers from 0 to {BOX_SCALE}."
        )
    return tuple(map(float, numbers.groups()))


def _box_of_annotation(row: Row) -> tuple[float, ...]:
    """The bounding box of the corners, which are relative to the sides; clipped, and truncated to whole hundredths."""
    corners = take_box(take(row.content, "obj_corner", list, row.path, row.number), (8,), row.path, row.number)
    if not all(-1 <= value <= 2 for value in corners):
        raise BenchmarkError(
            f"{row.path}, row {row.number}: 'obj_corner' {corners} must be relative to the sides of the image, not pixels."
        )
    x, y = corners[::2], corners[1::2]
    return tuple(float(int(min(max(value, 0), 1) * BOX_SCALE)) for value in (min(x), min(y), max(x), max(y)))
