"""Photographs with classes, captions, labels and questions: UC Merced and what others published about it.

    DIR/ucm/Images/airplane/airplane00.jpg ...      21 classes
    DIR/ucm/captions.json                           [{"image", "split": "train" or "test", "captions": [...]}, ...]
    DIR/ucm/LandUse_Multilabeled.txt                17 labels, see `benchmarks.ucm_multilabel`
    DIR/ucm/rsivqa.json                             [{"image", "question", "answer", "broken", "split"}, ...]

The official test split is held out. `split_photographs` also holds out a validation split, and drops every photograph that
shows the same place as one of the held-out ones. It writes one folder for each split, in the layouts of the benchmarks, so
that the rows to train on and those to evaluate on are read by the same code.
"""

import json
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ...evaluation.benchmarks import Benchmark, BenchmarkError, load_benchmark
from ...evaluation.protocols import PROTOCOLS
from ...files.reading import read_json
from ...files.writing import write_file
from .near_duplicates import SAME_PLACE, same_places


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
GROUND_RESOLUTION = (0.3, 0.3)  # finest and coarsest pixel in metres
VALIDATION = 9  # photographs of each class
# Benchmarks of a split, and the options that they are loaded with.
BENCHMARKS: dict[str, dict[str, str]] = {
    "uc-merced": {},
    "ucm-captions": {},
    "ucm-multilabel": {},
    "rsivqa-ucm": {"broken_rows": "skip"},
}
CAPTION_SPLITS = {"train": "train", "validation": "val", "test": "test"}  # of `ucm-captions`
SUMMARY = "splits.json"
PROTOCOL = "strict-without-java"
TRANSFORMS = 8  # rotations by quarter turns of the image and of its mirror image
# Answers with these words are wrong for a rotated or mirrored image.
DIRECTIONS = ("left", "right", "up", "bottom", "top", "upper", "lower", "diagonal", "down")
# Places that answers name, as cells of three rows and three columns.
PLACES = {
    "center": [(1, 1)],
    **{name: [(0, 1)] for name in ("up", "top")},
    "bottom": [(2, 1)],
    "left": [(1, 0)],
    "right": [(1, 2)],
    "upper left": [(0, 0)],
    "upper right": [(0, 2)],
    "lower left": [(2, 0)],
    "lower right": [(2, 2)],
    "four corners": [(0, 0), (0, 2), (2, 0), (2, 2)],
    "main diagonal": [(0, 0), (1, 1), (2, 2)],
    "minor diagonal": [(0, 2), (1, 1), (2, 0)],
    "everywhere": [(row, column) for row in range(3) for column in range(3)],
}


def split_photographs(real: Path, output: Path, seed: int = 0) -> Path:
    """Writes `output/{train,validation,test}`, once, and `output/splits.json`, which says what was dropped.

    Raises:
        BenchmarkError: a file of the data is missing.
    """
    if (output / SUMMARY).exists():
        return output
    root = real / "ucm"
    for name in ("Images", "captions.json", "LandUse_Multilabeled.txt", "rsivqa.json"):
        if not (root / name).exists():
            raise BenchmarkError(f"{root} has no {name}. The docstring of {__name__} describes the layout of real_data.")
    captions = read_json(root / "captions.json")
    split_of = {row["image"]: "test" for row in captions if row["split"] == "test"}
    by_class = defaultdict(list)
    for row in captions:
        if row["image"] not in split_of:
            by_class[Path(row["image"]).parent.name].append(row["image"])
    chosen = random.Random(seed)
    for images in by_class.values():
        split_of |= dict.fromkeys(chosen.sample(sorted(images), min(VALIDATION, len(images) // 2)), "validation")
    dropped = {}
    for held_out in ("test", "validation"):
        kept = [row["image"] for row in captions if row["image"] not in split_of and row["image"] not in dropped]
        kept += [image for image, split in split_of.items() if split == "validation" and held_out == "test"]
        paths = [root / image for image, split in split_of.items() if split == held_out]
        for path, (twin, similarity) in same_places(paths, [root / image for image in kept]).items():
            image = path.relative_to(root).as_posix()
            dropped[image] = {"same_place_as": twin.relative_to(root).as_posix(), "in": held_out, "similarity": similarity}
            split_of.pop(image, None)
    split_of |= {row["image"]: "train" for row in captions if row["image"] not in split_of and row["image"] not in dropped}
    for split in SPLITS:
        _write_split(root, output / split, split, [image for image, name in split_of.items() if name == split])
    if "train" not in split_of.values():
        raise BenchmarkError(f"{root}: no photograph is left to train on; all are held out or resemble one that is.")
    counts = {split: sum(name == split for name in split_of.values()) for split in SPLITS}
    summary = {"counts": counts, "threshold": SAME_PLACE, "dropped": dropped}
    write_file(output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    logger.info("photographs: %s, %d dropped as near-duplicates of held-out ones", counts, len(dropped))
    return output


def _write_split(root: Path, folder: Path, split: str, images: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Images", "imgs"):
        if not (folder / name).exists():
            (folder / name).symlink_to((root / "Images").resolve())
    kept = set(images)
    rows = [
        {
            "filename": row["image"].removeprefix("Images/"),
            "split": CAPTION_SPLITS[split],
            "sentences": [{"raw": caption} for caption in row["captions"]],
        }
        for row in read_json(root / "captions.json")
        if row["image"] in kept
    ]
    write_file(folder / "dataset.json", json.dumps({"images": rows}))
    write_file(folder / f"{split}.txt", "".join(f"{image.removeprefix('Images/')}\n" for image in sorted(kept)))
    head, *lines = (root / "LandUse_Multilabeled.txt").read_text().splitlines()
    stems = {Path(image).stem for image in kept}
    table = [line for line in lines if line.split() and line.split()[0] in stems]
    write_file(folder / "LandUse_Multilabeled.txt", "\n".join([head, *table]) + "\n")
    questions = [
        f"{Path(row['image']).stem}:{row['question'].rstrip('?')}?{row['answer']}\n"
        for row in read_json(root / "rsivqa.json")
        if row["image"] in kept
    ]
    write_file(folder / "ucm_res.txt", "".join(questions))


def load_split(splits: Path, split: str) -> list[Benchmark]:
    """The benchmarks of one split, in the order of `BENCHMARKS`; those without samples are left out."""
    loaded = []
    for name, options in BENCHMARKS.items():
        own = split if name == "uc-merced" else CAPTION_SPLITS[split] if name == "ucm-captions" else None
        if name == "rsivqa-ucm" and not (splits / split / "ucm_res.txt").read_text():
            continue
        benchmark = load_benchmark(
            name, splits / split, own, check_counts=False, check_sizes=False, allow_outside_images=True, **options
        )
        loaded.append(benchmark)
    return loaded


@dataclass
class Photograph:
    """One photograph and what is known of it.

    Attributes:
        path: the file.
        scene_class: readable name.
        captions: its captions.
        labels: yes or no by the wording of each label's question.
        questions: (kind, question, answer) of RSIVQA.
    """

    path: Path
    scene_class: str
    captions: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    questions: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Photographs:
    """The photographs of one split and the prompts of their classes and captions, as the harness asks for them.

    `place_names` says how answers of this split write the cells of `place_cells`.
    """

    items: list[Photograph]
    class_names: list[str]
    class_prompt: str
    caption_prompt: str
    place_names: dict[bytes, str] = field(default_factory=dict)


def read_photographs(splits: Path, split: str) -> Photographs:
    """Reads one folder of `split_photographs` through the benchmarks."""
    protocol = PROTOCOLS[PROTOCOL]()
    items: dict[Path, Photograph] = {}
    class_names: list[str] = []
    prompts = {}
    for benchmark in load_split(splits, split):
        for sample in benchmark.samples:
            path = (splits / split / sample.images[0]).resolve()
            prompt = protocol.prompt(sample, benchmark)
            if sample.task == "classification":
                class_names = list(benchmark.class_names)
                items[path] = Photograph(path, sample.references[0])
                prompts["class"] = prompt
            elif sample.task == "captioning":
                items[path].captions = list(sample.references)
                prompts["caption"] = prompt
            elif benchmark.name == "ucm-multilabel":
                items[path].labels[prompt] = sample.references[0]
            else:
                items[path].questions.append((sample.group, prompt, sample.references[0]))
    written = Counter(answer for item in items.values() for kind, _, answer in item.questions if kind == "location")
    place_names: dict[bytes, str] = {}
    for answer, _ in written.most_common():
        cells = place_cells(answer)
        if cells is not None:
            place_names.setdefault(cells.tobytes(), answer)
    return Photographs(list(items.values()), class_names, prompts["class"], prompts["caption"], place_names)


def place_cells(answer: str) -> np.ndarray | None:
    """(3, 3) bool: the cells of an image that an answer such as "upper left and center" names. `None`: it names others."""
    cells = np.zeros((3, 3), dtype=bool)
    for name in re.split(r", and |, | and ", answer.lower()):
        if name not in PLACES:
            return None
        cells[tuple(zip(*PLACES[name], strict=True))] = True
    return cells


def transform_answer(answer: str, number: int, place_names: dict[bytes, str]) -> str | None:
    """The answer for an image that was transformed by `number`. `None`: no answer of the split names these places."""
    if number == 0 or not names_direction(answer):
        return answer
    cells = place_cells(answer)
    return None if cells is None else place_names.get(transform(cells, number).tobytes())


def transform(image: np.ndarray, number: int) -> np.ndarray:
    """(h, w, ...) rotated by `number % 4` quarter turns, and mirrored first from number 4 on. 0 is the image itself."""
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if number >= TRANSFORMS // 2 else image, number % 4))


def read_pixels(photographs: Sequence[Photograph], side: int) -> np.ndarray:
    """(N, side, side, 3) uint8."""
    pixels = np.empty((len(photographs), side, side, 3), dtype=np.uint8)
    for index, photograph in enumerate(photographs):
        with Image.open(photograph.path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels[index] = upright.resize((side, side), Image.Resampling.BICUBIC)
    return pixels


def names_direction(answer: str) -> bool:
    return any(word in DIRECTIONS for word in answer.lower().replace(",", " ").split())
