"""DIOR-RSVG: referring expressions in the VOC annotations of the objects, and splits that list objects by their number."""

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from .reading import SHOWN, find, inside, read_text, take_box
from .sample import Benchmark, BenchmarkError, Sample


OBJECTS = 38320  # in all annotations: with another number of them, the numbers in the lists mean other objects
SIDES = ("xmin", "ymin", "xmax", "ymax")


def load_dior_rsvg(name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """The objects that `ROOT/SPLIT.txt` names, counted from 0 over all annotations in the order of their file names.

    The group is the class of the object.

    Raises:
        BenchmarkError: an annotation that is no XML or lacks a field, another number of objects than published, or a list
            with a line that is no number of an object, or that is there twice.
    """
    folder = find(root, ("JPEGImages",), "folder of images").name
    paths = sorted(find(root, ("Annotations",), "folder of annotations").glob("[!.]*.xml"))
    objects = [sample for path in paths for sample in _objects(path, folder)]
    if check_counts and len(objects) != OBJECTS:
        raise BenchmarkError(
            f"{name}: {len(paths)} files in {root / 'Annotations'} hold {len(objects)} objects, not the published "
            f"{OBJECTS}. The lists of the splits count objects over all files, so none may be missing. For a subset with "
            "lists of its own, set check_counts=False."
        )
    path = root / f"{split}.txt"
    lines = read_text(path).split()
    wrong = [line for line in lines if not (line.isdecimal() and int(line) < len(objects))]
    if wrong:
        raise BenchmarkError(
            f"{path}: {len(wrong)} lines are no number from 0 to {len(objects) - 1}, such as {', '.join(wrong[:SHOWN])}."
        )
    repeated = [line for line, count in Counter(map(int, lines)).items() if count > 1]
    if repeated:
        raise BenchmarkError(f"{path}: {len(repeated)} objects are listed more than once, such as {repeated[:SHOWN]}.")
    return Benchmark(name, split, root, [objects[int(line)] for line in lines])


def _objects(path: Path, folder: str) -> list[Sample]:
    try:
        annotation = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise BenchmarkError(f"{path} is no XML, or its end is missing: {error}. Download it again.") from error

    def text(element: ElementTree.Element, tag: str) -> str:
        found = (element.findtext(tag) or "").strip()
        if not found:
            raise BenchmarkError(f"{path}: <{element.tag}> has no <{tag}>, or it is blank.")
        return found

    width, height = take_box([text(annotation, f"size/{side}") for side in ("width", "height")], (2,), path, "size")
    size = int(width), int(height)

    def box(item: ElementTree.Element, number: int) -> tuple[float, ...]:
        where = f"object {number}"
        return inside(take_box([text(item, f"bndbox/{side}") for side in SIDES], (4,), path, where), size, path, where)

    return [
        Sample(
            id=f"{path.stem}-{number}",
            images=(f"{folder}/{text(annotation, 'filename')}",),
            task="grounding",
            question=text(item, "description"),
            references=(),
            group=text(item, "name"),
            boxes=(box(item, number),),
            image_size=size,
        )
        for number, item in enumerate(annotation.findall("object"))
    ]
