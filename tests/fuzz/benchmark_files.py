"""Mutated files of all benchmarks: annotations, lists and images.

The stand-ins count as complete, so that a lost row is found wherever the number of rows is published. What is accepted must
hold every sample, equal but for those of the mutated row, and open no file outside of the folder.
"""

import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from fuzz._mutations import BYTE_MUTATIONS, edit_json, edit_lines, edit_xml, restored
from fuzz.harness import Case, outcome, random_of
from PIL import Image
from tiny_benchmarks import MAKERS, make_boxes_json, make_csv, make_voc, make_vrsbench_annotations

from mfrsvlm.evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkInfo, load_benchmark
from mfrsvlm.evaluation.benchmarks.class_folders import ClassFolders
from mfrsvlm.evaluation.benchmarks.karpathy_captions import CaptionFiles
from mfrsvlm.evaluation.benchmarks.sample import LIST_TASKS
from mfrsvlm.files.reading import IMAGE_SUFFIXES


AREA = "benchmark files"
TEST_COUNT = 300
LARGE = 20  # images read of one benchmark

BINARY = ("bigearthnet", "eurosat-ms", "so2sat")  # whose files Pillow does not open
# Further layouts of some benchmarks.
LAYOUTS: list[tuple[str, Callable[[Path], None]]] = [
    *(maker for maker in MAKERS.items() if maker[0] not in BINARY),
    *((f"vrsbench-{task}", make_vrsbench_annotations) for task in ("captions", "vqa", "referring")),
    *(
        (f"detection-{task}", make)
        for task in ("grounding", "counting", "all")
        for make in (make_voc, make_csv, make_boxes_json)
    ),
]
SPLITS = {"vhm-eval": ("cls_AID", "RSVQA_LR-rural_urban_RSVQA", "VG_DOIR_RSVG_test", "counting_dota-test_open")}


@dataclass(frozen=True)
class StandIn:
    """A benchmark on disk, and what it loads as."""

    name: str
    root: Path
    split: str | None
    options: dict[str, Any]
    whole: Benchmark

    @property
    def counted(self) -> bool:
        """Whether a lost row can be found, because the number of rows is published."""
        info = BENCHMARKS[self.name]
        is_total = self.name == "nwpu-captions" or isinstance(getattr(info.loader, "__self__", None), CaptionFiles)
        return is_total or info.splits.get(self.whole.split) is not None

    @property
    def most_changed(self) -> int:
        """Samples that one row can change. A label of a box also decides which other boxes are asked for."""
        return 17 if self.name == "ucm-multilabel" else 6 if self.name.startswith("detection-") else 1


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    made: dict[tuple[int, str | None], StandIn] = {}
    for number in range(count):
        random = random_of(seed, number)
        layout = number % len(LAYOUTS)
        split = random.choice(SPLITS[LAYOUTS[layout][0]]) if LAYOUTS[layout][0] in SPLITS else None
        if (layout, split) not in made:
            made[layout, split] = make(layout, split, folder / f"{layout}-{split}")
        yield mutated(made[layout, split], number, random)


def make(layout: int, split: str | None, folder: Path) -> StandIn:
    name, maker = LAYOUTS[layout]
    root = folder / name
    root.mkdir(parents=True)
    maker(root)
    options = {"check_sizes": not name.startswith("vrsbench")}  # whose stand-ins are of other sizes
    whole = load_benchmark(name, root, split, check_counts=False, **options)
    return StandIn(name, root, split, options, whole)


def mutated(stand_in: StandIn, number: int, random: Random) -> Case:
    files = sorted(path for path in stand_in.root.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    named = {stand_in.root / image for sample in stand_in.whole.samples for image in sample.images}
    images = [path for path in files if path in named]
    if texts and random.random() < 0.8:
        path = random.choice(texts)
        kind, content = mutate_text(path, random)
        change: Callable[[], object] = lambda: path.write_bytes(content)  # noqa: E731
    else:
        path = random.choice(images)
        kind, change = mutate_image(path, stand_in.root, random)

    def run() -> str:
        with restored(path), official(stand_in), ExitStack() as stack:
            change()
            stack.callback(lambda: shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None)
            return outcome(lambda: load(stand_in, path), lambda found: is_right(stand_in, found, path), stand_in.name)

    return Case(f"{number} {stand_in.name} {path.relative_to(stand_in.root)} {kind}", run)


def mutate_text(path: Path, random: Random) -> tuple[str, bytes]:
    content = path.read_bytes()
    kind = random.choice((*BYTE_MUTATIONS, "edit", "edit", "edit", "edit", "edit", "mark", "windows", "utf-16", "empty"))
    if not content or kind == "empty":
        return "empty", b""
    if kind in BYTE_MUTATIONS:
        return kind, BYTE_MUTATIONS[kind](content, random)
    if kind == "edit":
        edit = {".json": edit_json, ".jsonl": edit_json, ".xml": edit_xml}.get(path.suffix, edit_lines)
        return edit(content, random)
    return kind, {
        "mark": b"\xef\xbb\xbf" + content,
        "windows": content.replace(b"\n", b"\r\n"),
        "utf-16": content.decode().encode("utf-16"),
    }[kind]


def mutate_image(path: Path, root: Path, random: Random) -> tuple[str, Callable[[], object]]:
    content = path.read_bytes()
    kind = random.choice((*BYTE_MUTATIONS, "missing", "empty", "size", "outside", "folder", "sixteen bits", "text"))
    outside = root.parent / "outside.png"

    def link() -> None:
        shutil.copy(path, outside)
        path.unlink()
        path.symlink_to(outside)

    changes: dict[str, Callable[[], object]] = {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "size": lambda: Image.new("RGB", (33, 7)).save(path),
        "outside": link,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "sixteen bits": lambda: Image.new("I;16", Image.open(path).size).save(path, format="PNG"),
        "text": lambda: path.write_text("no image"),
    }
    if kind in changes:
        return kind, changes[kind]
    new = BYTE_MUTATIONS[kind](content, random)
    return kind, lambda: path.write_bytes(new)


def official(stand_in: StandIn) -> ExitStack:
    """The numbers of the stand-in count as the published ones."""
    stack = ExitStack()
    info: BenchmarkInfo = BENCHMARKS[stand_in.name]
    loader = info.loader
    if isinstance(files := getattr(loader, "__self__", None), CaptionFiles):
        loader = replace(files, total=3).load
    splits = {split: len(stand_in.whole.samples) if count else None for split, count in info.splits.items()}
    stack.enter_context(mock.patch.dict(BENCHMARKS, {stand_in.name: replace(info, loader=loader, splits=splits)}))
    stack.enter_context(mock.patch("mfrsvlm.evaluation.benchmarks.dior_rsvg.OBJECTS", 3))
    stack.enter_context(mock.patch("mfrsvlm.evaluation.benchmarks.nwpu_captions.IMAGES", 6))
    return stack


def load(stand_in: StandIn, path: Path) -> Benchmark:
    """Loads the benchmark and reads its first images, and the mutated one."""
    benchmark = load_benchmark(stand_in.name, stand_in.root, stand_in.split, **stand_in.options)
    images = dict.fromkeys(image for sample in benchmark.samples for image in sample.images)
    for name in images:
        if len(images) <= LARGE or stand_in.root / name == path:
            benchmark.read_image(name)
    return benchmark


def is_right(stand_in: StandIn, found: Benchmark, path: Path) -> bool:
    info, whole = BENCHMARKS[stand_in.name], stand_in.whole
    lost = set(whole.samples) - set(found.samples)
    added = set(found.samples) - set(whole.samples)
    concerns_all = path.name in ("classes.txt", "LandUse_Multilabeled.txt") or isinstance(
        getattr(info.loader, "__self__", None), ClassFolders
    )
    most = len(whole.samples) if concerns_all else stand_in.most_changed
    assert len(lost) <= most and len(added) <= most, f"{len(lost)} samples are lost, {len(added)} added: {[*lost][:2]}"
    if stand_in.counted:
        assert len(found.samples) == len(whole.samples), f"{len(found.samples)} of {len(whole.samples)} samples"
    for sample in found.samples:
        assert sample.task in info.tasks
        assert sample.references or sample.boxes or sample.task in LIST_TASKS
        assert all((stand_in.root / image).resolve().is_relative_to(stand_in.root.resolve()) for image in sample.images)
        if sample.image_size and stand_in.options["check_sizes"]:
            assert Image.open(stand_in.root / sample.images[0]).size == tuple(sample.image_size)
        if stand_in.name.startswith("rsvqa-"):
            assert sample.group in inspect.getattr_static(info.loader.__self__, "types", ())
    return True
