"""EuroSAT, the release with all 13 bands of Sentinel-2: land use, 10 classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .class_folders import ALL, ClassFolders
from .eurosat import BENCHMARK as EUROSAT
from .eurosat import CLASSES
from .info import BenchmarkInfo
from .reading import require_inside
from .sample import Benchmark
from .spectral import SENTINEL_2, choose_bands, with_bands


# The order in the files: B8A comes last.
ORDER = [name for label, name in SENTINEL_2.items() if label != "B8A"] + [SENTINEL_2["B8A"]]
FOLDERS = ClassFolders(
    classes=CLASSES, inside=("EuroSAT_MS", "EuroSATallBands", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif")
)


def load(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    allow_outside_images: bool = False,
) -> Benchmark:
    """See `ClassFolders.load` and `spectral`."""
    chosen = choose_bands(bands, ORDER, name)
    benchmark = FOLDERS.load(name, root, split, check_counts, classes)
    if not allow_outside_images:
        require_inside(root, [image for sample in benchmark.samples for image in sample.images])

    def places(image: str) -> dict[str, tuple[Path, int]]:
        return {band: (root / image, ORDER.index(band) + 1) for band in chosen}

    return with_bands(benchmark, places, allow_outside_images)


BENCHMARK: BenchmarkInfo = replace(EUROSAT, loader=load, splits={ALL: 27000})
