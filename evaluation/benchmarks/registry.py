"""Finds the benchmarks of this folder, and loads one of them."""

import inspect
import os
import pkgutil
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from .info import BenchmarkInfo
from .reading import SHOWN, check_boxes, require_images, require_size, require_sizes_of_annotations
from .sample import Benchmark, BenchmarkError


PASSED = 4  # arguments that every loader is called with


def find_benchmarks(folders: Iterable[str] = (str(Path(__file__).parent),)) -> dict[str, BenchmarkInfo]:
    """The `BENCHMARK` of every file that has one, by the name of the file with hyphens."""
    names = sorted(info.name for info in pkgutil.iter_modules(folders) if info.name != "registry")
    modules = {name.replace("_", "-"): import_module(f".{name}", __package__) for name in names}
    return {name: module.BENCHMARK for name, module in modules.items() if hasattr(module, "BENCHMARK")}


# docs/benchmarks.md says where each number comes from.
BENCHMARKS = find_benchmarks()


def load_benchmark(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str | None = None,
    check_counts: bool = True,
    check_images: bool = True,
    allow_outside_images: bool = False,
    check_sizes: bool = True,
    **options: Any,
) -> Benchmark:
    """Loads one split of a benchmark from disk, and checks that it is whole.

    Args:
        name: a key of `BENCHMARKS`.
        root: folder of its files (see docs/benchmarks.md); `None` only for `scenes`, which are then drawn.
        split: the official test split by default.
        check_counts: `False` for a deliberate subset.
        check_images: `False` if missing images are no error yet. Their size is then not checked either.
        allow_outside_images: whether images may lie outside of `root`, also by a link.
        check_sizes: `False` if images are not as large as published, on purpose.
        options: what only some benchmarks take: `classes`, a list of classes to load, all others being left out on purpose;
            `broken_rows="skip"` to leave out rows that cannot be asked; `count` of `scenes`; `annotations` of boxes.

    Raises:
        BenchmarkError: an unknown name, split or option, a file that is missing or broken, a row that lacks a field or has
            one of the wrong type, an id that occurs twice, a number of samples that is not the published one, missing
            images, images of another size than published, or a box outside of its image. Nothing is left out to make the
            rest load, unless an option says so.
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
    known = list(inspect.signature(info.loader).parameters)[PASSED:]
    if unknown := sorted(options.keys() - set(known)):
        raise BenchmarkError(f"{name} takes no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}.")

    benchmark = info.loader(name, None if root is None else Path(root), split, check_counts, **options)
    benchmark.allow_outside_images = allow_outside_images
    benchmark.metrics, benchmark.numeric_types = info.metrics, info.numeric_types
    benchmark.complete_prompts = info.complete_prompts
    found, expected = len(benchmark.samples), info.splits.get(split)
    # Rows that were left out are counted; how many samples other classes have is not known.
    whole = None if options.get("classes") is not None else found + sum(benchmark.left_out.values())
    if not found:
        raise BenchmarkError(f"{name}: split {split!r} under {root} holds no samples.")
    repeated = [sample_id for sample_id, n in Counter(sample.id for sample in benchmark.samples).items() if n > 1]
    if repeated:
        raise BenchmarkError(
            f"{name}: {len(repeated)} ids of split {split!r} occur more than once, such as {', '.join(repeated[:SHOWN])}."
        )
    if check_counts and expected is not None and whole not in (None, expected):
        raise BenchmarkError(
            f"{name}: split {split!r} under {root} holds {whole} samples, not the published {expected}. Figures would not "
            "be comparable with published ones. Complete the files, or set check_counts=False for a deliberate subset."
        )
    check_boxes(name, benchmark.samples)
    if benchmark.root is not None and check_images:
        images = [image for sample in benchmark.samples for image in sample.images]
        require_images(benchmark.root, images)
        if check_sizes and info.image_size:
            require_size(benchmark.root, images, info.image_size, info.size_tolerance)
        if check_sizes:
            require_sizes_of_annotations(benchmark.root, benchmark.samples)
    return benchmark
