"""Which benchmarks there are, how many samples each split must have, and the one function that loads them."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...scenes.drawing import SPLITS as SCENE_SPLITS
from . import class_folders, dior_rsvg, karpathy_captions, nwpu_captions, rsvqa, synthetic_scenes, vhm_eval, vrsbench
from .reading import SHOWN, require_images
from .sample import Benchmark, BenchmarkError


@dataclass(frozen=True)
class BenchmarkInfo:
    """What is known of a benchmark before it is loaded.

    Attributes:
        loader: called with the name, the root, the split and whether to check counts.
        splits: number of samples of every split; `None` where no source for it was found.
        default_split: `None` if the user has to choose.
        tasks: tasks of its samples.
        source: where it is published.
        own_splits: further splits may be listed in `ROOT/SPLIT.txt`.
        needs_root: `False` if it can be loaded without files.
        without_metric: published splits that no metric here can score, and what they ask for.
    """

    loader: Callable[..., Benchmark]
    splits: Mapping[str, int | None]
    default_split: str | None
    tasks: tuple[str, ...]
    source: str
    own_splits: bool = False
    needs_root: bool = True
    without_metric: Mapping[str, str] = field(default_factory=dict)


def load_benchmark(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str | None = None,
    check_counts: bool = True,
    check_images: bool = True,
    allow_outside_images: bool = False,
    **options: Any,
) -> Benchmark:
    """Loads one split of a benchmark from disk, and checks that it is whole.

    Args:
        name: a key of `BENCHMARKS`.
        root: folder of its files (see docs/benchmarks.md); `None` only for `scenes`, which are then drawn.
        split: the official test split by default.
        check_counts: `False` for a deliberate subset.
        check_images: `False` if missing images are no error yet.
        allow_outside_images: whether images may lie outside of `root`, also by a link.
        options: of the loader; `count` of `scenes`.

    Raises:
        BenchmarkError: an unknown name or split, a file that is missing or broken, a row that lacks a field or has one of
            the wrong type, an id that occurs twice, a number of samples that is not the published one, or missing images.
            Nothing is ever left out to make the rest load.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"There is no benchmark {name!r}. Known are {', '.join(BENCHMARKS)}.")
    info = BENCHMARKS[name]
    split = split or info.default_split
    if split is None:
        raise BenchmarkError(f"{name} has no default split; choose one of {', '.join(info.splits)}.")
    if split in info.without_metric:
        raise BenchmarkError(f"{name}: {split} asks for {info.without_metric[split]}; no metric here scores that.")
    if split not in info.splits and not info.own_splits:
        raise BenchmarkError(f"{name} has no split {split!r}; its splits are {', '.join(info.splits)}.")
    if root is None and info.needs_root:
        raise BenchmarkError(f"{name} needs the folder of its files. Download it from {info.source}.")
    if root is not None and not Path(root).is_dir():
        raise BenchmarkError(f"{name}: {root} is no folder. Download the benchmark from {info.source}.")

    benchmark = info.loader(name, None if root is None else Path(root), split, check_counts, **options)
    benchmark.allow_outside_images = allow_outside_images
    found, expected = len(benchmark.samples), info.splits.get(split)
    if not found:
        raise BenchmarkError(f"{name}: split {split!r} under {root} holds no samples.")
    repeated = [sample_id for sample_id, n in Counter(sample.id for sample in benchmark.samples).items() if n > 1]
    if repeated:
        raise BenchmarkError(
            f"{name}: {len(repeated)} ids of split {split!r} occur more than once, such as {', '.join(repeated[:SHOWN])}."
        )
    if check_counts and expected is not None and found != expected:
        raise BenchmarkError(
            f"{name}: split {split!r} under {root} holds {found} samples, not the published {expected}. Figures would not "
            "be comparable with published ones. Complete the files, or set check_counts=False for a deliberate subset."
        )
    if benchmark.root is not None and check_images:
        require_images(benchmark.root, (image for sample in benchmark.samples for image in sample.images))
    return benchmark


def _folders(layout: class_folders.ClassFolders, count: int | None, source: str) -> BenchmarkInfo:
    loader = partial(class_folders.load_class_folders, layout)
    return BenchmarkInfo(loader, {class_folders.ALL: count}, class_folders.ALL, ("classification",), source, own_splits=True)


def _captions(files: karpathy_captions.CaptionFiles, splits: Mapping[str, int | None], source: str) -> BenchmarkInfo:
    loader = partial(karpathy_captions.load_karpathy_captions, files)
    return BenchmarkInfo(loader, splits, "test", ("captioning",), source)


_RSICD = "https://github.com/201528014227051/RSICD_optimal"
_VRSBENCH = "https://huggingface.co/datasets/xiang709/VRSBench"

# docs/benchmarks.md says where each number comes from.
BENCHMARKS: dict[str, BenchmarkInfo] = {
    "rsvqa-lr": BenchmarkInfo(
        partial(rsvqa.load_rsvqa, rsvqa.LOW_RESOLUTION),
        {"train": 57223, "val": 10005, "test": 10004},
        "test",
        ("vqa",),
        "https://zenodo.org/records/6344334",
    ),
    "rsvqa-hr": BenchmarkInfo(
        partial(rsvqa.load_rsvqa, rsvqa.HIGH_RESOLUTION),
        {"train": 625340, "val": 102843, "test": 222684, "test_phili": 105647},
        "test",
        ("vqa",),
        "https://zenodo.org/records/6344367",
    ),
    "aid": _folders(class_folders.AID, 10000, "https://captain-whu.github.io/AID/"),
    "nwpu-resisc45": _folders(class_folders.NWPU_RESISC45, 31500, "https://gcheng-nwpu.github.io/#Datasets"),
    "whu-rs19": _folders(class_folders.WHU_RS19, 1005, "https://captain-whu.github.io/BED4RS/"),
    "siri-whu": _folders(class_folders.SIRI_WHU, 2400, "http://www.lmars.whu.edu.cn/prof_web/zhongyanfei/e-code.html"),
    "eurosat": _folders(class_folders.EUROSAT, 27000, "https://github.com/phelber/EuroSAT"),
    "uc-merced": _folders(class_folders.UC_MERCED, 2100, "http://weegee.vision.ucmerced.edu/datasets/landuse.html"),
    "meter-ml": _folders(class_folders.METER_ML, None, "https://stanfordmlgroup.github.io/projects/meter-ml"),
    "rsicd": _captions(karpathy_captions.RSICD, {"train": 8734, "val": 1094, "test": 1093}, _RSICD),
    "sydney-captions": _captions(karpathy_captions.SYDNEY, {"train": None, "val": None, "test": 58}, _RSICD),
    "ucm-captions": _captions(karpathy_captions.UCM, {"train": None, "val": None, "test": 210}, _RSICD),
    "rsitmd": _captions(karpathy_captions.RSITMD, {"train": None, "test": None}, "https://github.com/xiaoyuan1996/AMFMN"),
    "nwpu-captions": BenchmarkInfo(
        nwpu_captions.load_nwpu_captions,
        {"train": None, "val": None, "test": None},
        "test",
        ("captioning",),
        "https://github.com/HaiyanHuang98/NWPU-Captions",
    ),
    "vrsbench-captions": BenchmarkInfo(vrsbench.load_captions, {"val": 9350}, "val", ("captioning",), _VRSBENCH),
    "vrsbench-vqa": BenchmarkInfo(vrsbench.load_questions, {"val": 37409}, "val", ("vqa",), _VRSBENCH),
    "vrsbench-referring": BenchmarkInfo(vrsbench.load_referring, {"val": 16159}, "val", ("grounding",), _VRSBENCH),
    "dior-rsvg": BenchmarkInfo(
        dior_rsvg.load_dior_rsvg,
        {"train": 26991, "val": 3829, "test": 7500},
        "test",
        ("grounding",),
        "https://github.com/ZhanYang-nwpu/RSVG-pytorch",
    ),
    "vhm-eval": BenchmarkInfo(
        vhm_eval.load_vhm_eval,
        dict.fromkeys(vhm_eval.LISTS),
        None,
        ("classification", "vqa", "grounding", "counting"),
        "https://huggingface.co/datasets/FitzPC/VHM_eval_dataset",
        without_metric=vhm_eval.WITHOUT_METRIC,
    ),
    "scenes": BenchmarkInfo(
        synthetic_scenes.load_scenes,
        dict.fromkeys(SCENE_SPLITS),
        "test",
        ("classification", "vqa", "counting", "grounding", "captioning"),
        "docs/scenes.md",
        needs_root=False,
    ),
}
