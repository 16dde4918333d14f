"""Finds the benchmarks of this folder and loads them."""

import inspect
import os
import pkgutil
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from .info import BenchmarkInfo
from .reading import SHOWN, check_boxes, require_images, require_inside, require_size, require_sizes_of_annotations
from .sample import Benchmark, BenchmarkError


PASSED = 4  # number of arguments that every loader takes
OUTSIDE = "allow_outside_images"  # argument of the loaders that open images


def find_benchmarks(folders: Iterable[str] = (str(Path(__file__).parent),)) -> dict[str, BenchmarkInfo]:
    """The `BENCHMARK` of every file that defines one, by the name of the file with hyphens."""
    names = sorted(info.name for info in pkgutil.iter_modules(folders) if info.name != "registry")
    modules = {name.replace("_", "-"): import_module(f".{name}", __package__) for name in names}
    return {name: module.BENCHMARK for name, module in modules.items() if hasattr(module, "BENCHMARK")}


# docs/benchmarks.md lists the source of each number.
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
    """Loads one split of a benchmark from disk, and checks that it is complete.

    Args:
        name: a key of `BENCHMARKS`.
        root: folder of its files (see docs/benchmarks.md); `None` only for `scenes`, which are then drawn.
        split: default: the official test split.
        check_counts: `False` accepts another number of samples than published.
        check_images: `False` skips the checks that images exist and have the published size.
        allow_outside_images: whether images may be outside of `root`, also through symbolic links.
        check_sizes: `False` accepts images of another size than published or than annotated.
        options: options of some benchmarks: `classes`, a list of the classes to load; `broken_rows="skip"` to skip rows that
            cannot be used; `count`, the number of `scenes`; `annotations`, the format of boxes; `max_objects`, the largest
            number of boxes that `detection-all` asks for.

    Raises:
        BenchmarkError: an unknown name, split or option; a missing or broken file; a row with a missing field or a field of
            the wrong type; a repeated id; another number of samples than published; missing images; images outside of
            `root`; images of another size than published or annotated; or a box outside of its image. No sample is
            skipped unless an option says so.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"Unknown benchmark {name!r}. Benchmarks are {', '.join(BENCHMARKS)}.")
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
    passed = {OUTSIDE: allow_outside_images} if OUTSIDE in known else {}
    known = [option for option in known if option != OUTSIDE]
    if unknown := sorted(options.keys() - set(known)):
        raise BenchmarkError(f"{name} takes no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}.")

    benchmark = info.loader(name, None if root is None else Path(root), split, check_counts, **options, **passed)
    benchmark.allow_outside_images = allow_outside_images
    benchmark.metrics, benchmark.numeric_types = info.metrics, info.numeric_types
    benchmark.complete_prompts = info.complete_prompts
    found, expected = len(benchmark.samples), info.splits.get(split)
    # Skipped rows count. With some classes left out, the complete number of samples is unknown.
    total = None if options.get("classes") is not None else found + sum(benchmark.left_out.values())
    if not found:
        raise BenchmarkError(f"{name}: split {split!r} in {root} has no samples.")
    repeated = [sample_id for sample_id, n in Counter(sample.id for sample in benchmark.samples).items() if n > 1]
    if repeated:
        raise BenchmarkError(
            f"{name}: {len(repeated)} ids of split {split!r} occur more than once, such as {', '.join(repeated[:SHOWN])}."
        )
    if check_counts and expected is not None and total not in (None, expected):
        raise BenchmarkError(
            f"{name}: split {split!r} in {root} has {total} samples, not the published {expected}. Figures would not be "
            "comparable with published ones. Complete the files, or set check_counts=False for a deliberate subset."
        )
    check_boxes(name, benchmark.samples)
    if benchmark.root is not None:
        images = [image for sample in benchmark.samples for image in sample.images]
        if not allow_outside_images:
            require_inside(benchmark.root, images)
        if check_images:
            require_images(benchmark.root, images, allow_outside_images)
            if check_sizes and info.image_size:
                require_size(benchmark.root, images, info.image_size, info.size_tolerance)
        if check_sizes:
            require_sizes_of_annotations(benchmark.root, benchmark.samples)
    return benchmark
