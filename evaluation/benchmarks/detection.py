"""Questions from annotations of object detection: YOLO, Pascal VOC, CSV (DeepForest), or one JSON file.

    ROOT/images/*.jpg, ROOT/labels/*.txt, ROOT/classes.txt    YOLO; or the names in ROOT/data.yaml
    ROOT/JPEGImages/*.jpg, ROOT/Annotations/*.xml             VOC
    ROOT/*.csv                                                image_path, xmin, ymin, xmax, ymax, label
    ROOT/boxes.json                                           [{"image", "objects": [{"class", "box": [x1, y1, x2, y2]}]}]

Images may also be in the root or in `images/`, and annotations in the same folder.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...files.reading import is_hidden, list_images, shorten
from .reading import (
    as_index,
    chosen_classes,
    find_images,
    inside,
    read_json_rows,
    read_lines,
    read_size,
    read_text,
    take,
    take_box,
    take_text,
)
from .sample import Benchmark, BenchmarkError, Sample
from .voc import read_voc, xml_files


ALL = "all"
FOLDERS = ("JPEGImages", "images", "")  # of images
CSV_FIELDS = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")


@dataclass
class ImageObjects:
    """The objects of one image: classes and boxes in pixels. `size` is (width, height) in pixels."""

    image: str
    size: tuple[int, int]
    objects: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)


def load_grounding(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    allow_outside_images: bool = False,
) -> Benchmark:
    """One sample for each object that is the only one of its class in its image, with the expression "the CLASS".

    Args: see `_read`.
    """
    samples = []
    items, chosen, left = _read(name, root, split, classes, annotations, allow_outside_images)
    for item in items:
        numbers = Counter(label for label, _ in item.objects)
        samples += [
            Sample(
                id=f"{item.image}-{label}",
                images=(item.image,),
                task="grounding",
                question=f"the {readable(label)}",
                references=(),
                group=label,
                boxes=(box,),
                image_size=item.size,
            )
            for label, box in item.objects
            if numbers[label] == 1 and label in chosen
        ]
    return Benchmark(name, split, root, samples, left_out=left)


def load_counting(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    allow_outside_images: bool = False,
) -> Benchmark:
    """One question for each class that is present in an image. Absent classes are not asked about.

    Args: see `_read`.
    """
    samples = []
    items, chosen, left = _read(name, root, split, classes, annotations, allow_outside_images)
    for item in items:
        samples += [
            Sample(
                id=f"{item.image}-{label}",
                images=(item.image,),
                task="counting",
                question=f"How many objects of the class {readable(label)!r} are there in this image?",
                references=(str(number),),
                group=label,
            )
            for label, number in sorted(Counter(label for label, _ in item.objects).items())
            if label in chosen
        ]
    return Benchmark(name, split, root, samples, left_out=left)


def load_all(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    allow_outside_images: bool = False,
    max_objects: int = 10,
) -> Benchmark:
    """One sample for each class that is present in an image, with the boxes of all its objects. Absent classes are not asked
    about.

    Args: see `_read`; and
        max_objects: a class with more objects in an image is not asked about there, since the answer would be cut off.
            `left_out` counts these questions.

    Raises:
        BenchmarkError: see `_read`; or `max_objects` is below 1.
    """
    if max_objects < 1:
        raise BenchmarkError(f"{name}: max_objects={max_objects} must be at least 1.")
    samples, crowded = [], 0
    items, chosen, left = _read(name, root, split, classes, annotations, allow_outside_images)
    for item in items:
        boxes: dict[str, list[tuple[float, ...]]] = {}
        for label, box in item.objects:
            boxes.setdefault(label, []).append(box)
        for label in sorted(boxes.keys() & chosen):
            if len(boxes[label]) > max_objects:
                crowded += 1
                continue
            samples.append(
                Sample(
                    id=f"{item.image}-{label}",
                    images=(item.image,),
                    task="detection",
                    question=readable(label),
                    references=(),
                    group=label,
                    boxes=tuple(sorted(boxes[label])),
                    image_size=item.size,
                )
            )
    left |= {f"questions about more than {max_objects} objects": crowded} if crowded else {}
    return Benchmark(name, split, root, samples, left_out=left)


def _read(
    name: str, root: Path, split: str, classes: Sequence[str] | None, annotations: str | None, allow_outside: bool
) -> tuple[list[ImageObjects], list[str], dict[str, int]]:
    """The objects of every image of the split, the selected classes, and `Benchmark.left_out`.

    Args:
        split: "all", or the name of a list `ROOT/SPLIT.txt` with one image per line.
        classes: class names as in the files; default: all.
        annotations: "yolo", "voc", "csv" or "json", if the folder contains several formats.

    Raises:
        BenchmarkError: no annotations or several formats, a row that is not an object, a box outside of its image, or an
            annotation without its image.
    """
    there = [kind for kind, (holds, _) in READERS.items() if holds(root)]
    if annotations is not None and annotations not in READERS:
        raise BenchmarkError(f"{name}: annotations={annotations!r} is none of {', '.join(READERS)}.")
    if annotations is None and len(there) != 1:
        found = (
            f"annotations in several formats: {', '.join(there)}. Set annotations={there[0]!r}, or leave only one"
        ) if there else (
            f"no annotations: looked for {', '.join(READERS)}. See docs/benchmarks.md for the layout"
        )  # fmt: skip
        raise BenchmarkError(f"{root} has {found}.")
    items = READERS[annotations or there[0]][1](root, Images(root, allow_outside))
    known = sorted({label for item in items for label, _ in item.objects})
    chosen = chosen_classes(classes, known, name)
    if split != ALL:
        listed = {line.strip() for _, line in read_lines(root / f"{split}.txt")}
        names = {key: item for item in items for key in (item.image, Path(item.image).name, Path(item.image).stem)}
        unknown = sorted(listed - names.keys())
        if unknown:
            raise BenchmarkError(f"{root / split}.txt names {len(unknown)} images without annotations: {unknown[:5]}.")
        items = [item for item in items if any(names[key] is item for key in listed)]
    return items, chosen, {} if classes is None else {"classes": len(known) - len(chosen)}


def readable(label: str) -> str:
    return label.replace("_", " ").replace("-", " ").lower()


class Images:
    """The images of a data set, by their names."""

    def __init__(self, root: Path, allow_outside: bool) -> None:
        self.root, self.allow_outside = root, allow_outside
        self.folder = next(root / name for name in FOLDERS if (root / name).is_dir())
        self.places = find_images(self.folder, root)
        self.items: dict[str, ImageObjects] = {}

    def get(self, image: str, path: Path, number: int | str) -> ImageObjects:
        """The objects of an image read so far. In some releases, the suffix differs from the annotations."""
        name = Path(image.replace("\\", "/")).name
        place = self.places.get(name) or self.places.get(Path(name).stem)
        if place is None:
            raise BenchmarkError(f"{path}, row {number}: there is no image {shorten(image)} in {self.folder}.")
        if place not in self.items:
            self.items[place] = ImageObjects(place, read_size(self.root, place, self.allow_outside))
        return self.items[place]


def _read_yolo(root: Path, images: Images) -> list[ImageObjects]:
    names = _yolo_names(root)
    paths = {path.stem: path for path in _yolo_labels(root)}
    for stem, path in paths.items():
        item = images.get(stem, path, 0)
        for number, line in read_lines(path):
            numbers = take_box(line.split()[1:], (4, 8), path, number)
            index = line.split()[0]
            if as_index(index, len(names)) is None:
                raise BenchmarkError(
                    f"{path}, row {number}: class {shorten(index)} is none of the {len(names)} names of {root}."
                )
            if not all(-0.01 <= value <= 1.01 for value in numbers):
                raise BenchmarkError(f"{path}, row {number}: {shorten(line)} must be relative to the sides, from 0 to 1.")
            if len(numbers) == 4:  # center, width and height
                x, y, width, height = numbers
                numbers = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            pixels = tuple(value * side for value, side in zip(numbers, item.size * (len(numbers) // 2), strict=True))
            box = inside(pixels, item.size, path, number) if len(pixels) == 4 else pixels
            item.objects.append((names[int(index)], box))
    return list(images.items.values())


def _yolo_labels(root: Path) -> list[Path]:
    """Label files: all in `labels/`, or those next to an image of the same name."""
    if (root / "labels").is_dir():
        paths = (root / "labels").rglob("*.txt")
        return sorted(path for path in paths if not is_hidden(path) and path.name != "classes.txt")
    folder = next(root / name for name in FOLDERS if (root / name).is_dir())
    return [path.with_suffix(".txt") for path in list_images(folder, recursive=True) if path.with_suffix(".txt").is_file()]


def _yolo_names(root: Path) -> list[str]:
    for name in ("classes.txt", "labels/classes.txt", "obj.names", "classes.names"):
        if (root / name).is_file():
            return [line.strip() for _, line in read_lines(root / name)]
    for path in sorted(root.glob("*.y*ml")):
        try:
            content = yaml.safe_load(read_text(path))
        except BenchmarkError:
            raise
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
            raise BenchmarkError(f"{path} is not YAML: {error}.") from error
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict) and set(names) == set(range(len(names))):
            names = [names[index] for index in range(len(names))]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise BenchmarkError(f"{root} has labels of YOLO but no class names: add classes.txt with one name per line.")


def _voc_folder(root: Path) -> Path:
    return next((root / name for name in ("Annotations", "annotations") if (root / name).is_dir()), root)


def _read_voc(root: Path, images: Images) -> list[ImageObjects]:
    for path in xml_files(_voc_folder(root)):
        annotation = read_voc(path)
        item = images.get(annotation.image, path, 0)
        if item.size != annotation.size:
            raise BenchmarkError(
                f"{path}: the annotation states {annotation.size[0]} x {annotation.size[1]} pixels, but {item.image} has "
                f"{item.size[0]} x {item.size[1]}. Was it resized?"
            )
        item.objects += [(found.name, found.box) for found in annotation.objects]
    return list(images.items.values())


def _csv_files(root: Path) -> list[Path]:
    paths = [path for path in root.iterdir() if path.suffix.lower() == ".csv" and not is_hidden(path)]
    return sorted(path for path in paths if set(CSV_FIELDS) <= set(read_text(path).split("\n", 1)[0].split(",")))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by the names in the header, with the numbers of their last lines."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise BenchmarkError(
                    f"{path}, row {reader.line_num}: not the {len(reader.fieldnames or ())} fields of the header."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise BenchmarkError(f"{path}, row {reader.line_num} is not CSV: {error}.") from error


def _read_csv(root: Path, images: Images) -> list[ImageObjects]:
    for path in _csv_files(root):
        for number, row in _csv_rows(path):
            item = images.get(take_text(row, "image_path", path, number), path, number)
            box = take_box([row[side] for side in CSV_FIELDS[1:5]], (4,), path, number)
            item.objects.append((take_text(row, "label", path, number), inside(box, item.size, path, number)))
    return list(images.items.values())


def _read_json(root: Path, images: Images) -> list[ImageObjects]:
    path = root / "boxes.json"
    for number, row in read_json_rows(path):
        item = images.get(take_text(row, "image", path, number), path, number)
        for content in take(row, "objects", list, path, number):
            box = take_box(take(content, "box", list, path, number), (4, 8), path, number)
            label = take_text(content, "class", path, number)
            item.objects.append((label, inside(box, item.size, path, number) if len(box) == 4 else box))
    return list(images.items.values())


# Format of annotations -> whether a folder contains them, and the function that reads them.
READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Images], list[ImageObjects]]]] = {
    "yolo": (lambda root: bool(_yolo_labels(root)), _read_yolo),
    "voc": (lambda root: bool(xml_files(_voc_folder(root))), _read_voc),
    "csv": (lambda root: bool(_csv_files(root)), _read_csv),
    "json": (lambda root: (root / "boxes.json").is_file(), _read_json),
}
