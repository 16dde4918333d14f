"""DIOR-RSVG: referring expressions in VOC annotations, and splits as lists of object numbers."""

from collections import Counter
from pathlib import Path

from .info import BenchmarkInfo
from .reading import SHOWN, as_index, find, read_text
from .sample import Benchmark, BenchmarkError, Sample
from .voc import read_voc, text, xml_files


OBJECTS = 38320  # in all annotations; if one is missing, the numbers in the lists refer to other objects


def load_dior_rsvg(name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """The objects listed in `ROOT/SPLIT.txt`, numbered from 0 over all annotations in the order of their file names.

    The group is the class of the object.

    Raises:
        BenchmarkError: an annotation that is not XML or lacks a field, another number of objects than published, or a list
            with an invalid or repeated number.
    """
    folder = find(root, ("JPEGImages",), "folder of images").name
    paths = xml_files(find(root, ("Annotations",), "folder of annotations"))
    objects = [sample for path in paths for sample in _samples(path, folder)]
    if check_counts and len(objects) != OBJECTS:
        raise BenchmarkError(
            f"{name}: {len(paths)} files in {root / 'Annotations'} have {len(objects)} objects, not the published "
            f"{OBJECTS}. The lists of the splits number objects over all files, so none may be missing. For a subset with "
            "its own lists, set check_counts=False."
        )
    path = root / f"{split}.txt"
    lines = read_text(path).split()
    wrong = [line for line in lines if as_index(line, len(objects)) is None]
    if wrong:
        raise BenchmarkError(
            f"{path}: {len(wrong)} lines are not numbers from 0 to {len(objects) - 1}, such as {', '.join(wrong[:SHOWN])}."
        )
    repeated = [line for line, count in Counter(map(int, lines)).items() if count > 1]
    if repeated:
        raise BenchmarkError(f"{path}: {len(repeated)} objects are listed more than once, such as {repeated[:SHOWN]}.")
    return Benchmark(name, split, root, [objects[int(line)] for line in lines])


def _samples(path: Path, folder: str) -> list[Sample]:
    annotation = read_voc(path)
    return [
        Sample(
            id=f"{path.stem}-{number}",
            images=(f"{folder}/{annotation.image}",),
            task="grounding",
            question=text(item.element, "description", path),
            references=(),
            group=item.name,
            boxes=(item.box,),
            image_size=annotation.size,
        )
        for number, item in enumerate(annotation.objects)
    ]


BENCHMARK = BenchmarkInfo(
    loader=load_dior_rsvg,
    splits={"train": 26991, "val": 3829, "test": 7500},
    tasks=("grounding",),
    source="https://github.com/ZhanYang-nwpu/RSVG-pytorch",
)
