"""BigEarthNet v2 (reBEN): 19 classes of land cover in patches of Sentinel-2, asked as "Does this image show pastures?".

Layout: `metadata.parquet` with the columns `patch_id`, `labels` and `split`, and `BigEarthNet-S2/TILE/PATCH/PATCH_B02.tif`,
one file per band of 10, 20 or 60 metres a pixel. TILE is the id of the patch without its last two numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .info import BenchmarkInfo
from .reading import chosen_classes, find
from .sample import Benchmark, BenchmarkError, Sample
from .spectral import SENTINEL_2, choose_bands, with_bands


CLASSES = (
    "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops", "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation", "Agro-forestry areas",
    "Broad-leaved forest", "Coniferous forest", "Mixed forest", "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation", "Transitional woodland, shrub", "Beaches, dunes, sands",
    "Inland wetlands", "Coastal wetlands", "Inland waters", "Marine waters",
)  # fmt: skip
FILES = {name: label for label, name in SENTINEL_2.items() if label != "B10"}  # surface reflectance has no cirrus band
COLUMNS = ("patch_id", "labels", "split")


def load(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    allow_outside_images: bool = False,
) -> Benchmark:
    """One question for each patch and class.

    Args:
        classes: those to ask about; default: all.
        bands: see `spectral`.

    Raises:
        BenchmarkError: no parquet file with these columns, or a label that is no class.
    """
    chosen, asked = choose_bands(bands, list(FILES), name), chosen_classes(classes, CLASSES, name)
    path = find(root, ("metadata.parquet",), "table of patches")
    folder = find(root, ("BigEarthNet-S2", "BigEarthNet-S2/BigEarthNet-S2"), "folder of patches")
    samples = []
    for number, row in enumerate(read_table(path), start=1):
        patch, labels = str(row["patch_id"]), {str(label) for label in row["labels"]}
        if not labels <= set(CLASSES):
            raise BenchmarkError(f"{path}, row {number}: labels {sorted(labels - set(CLASSES))} are none of the 19 classes.")
        if row["split"] != split:
            continue
        samples += [
            Sample(
                id=f"{patch}-{label}",
                images=(patch,),
                task="vqa",
                question=f"Does this image show {label[0].lower()}{label[1:]}?",
                references=("yes" if label in labels else "no",),
                group=label,
            )
            for label in asked
        ]
    left = {} if classes is None else {"classes": len(CLASSES) - len(asked)}

    def places(patch: str) -> Mapping[str, tuple[Path, int]]:
        inside = folder / patch.rsplit("_", 2)[0] / patch
        return {band: (inside / f"{patch}_{FILES[band]}.tif", 1) for band in chosen}

    return with_bands(Benchmark(name, split, root, samples, left_out=left), places, allow_outside_images)


def read_table(path: Path) -> list[dict[str, object]]:
    """Rows of a parquet file with at least `COLUMNS`."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise BenchmarkError(f"{path} needs pyarrow: pip install 'mfrsvlm[geospatial]'") from error
    try:
        rows: list[dict[str, object]] = parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
    except (ArrowException, OSError) as error:
        raise BenchmarkError(f"{path} is no parquet file: {' '.join(str(error).split())}") from error
    if rows and set(rows[0]) != set(COLUMNS):
        raise BenchmarkError(f"{path} has the columns {sorted(rows[0])}, without {sorted(set(COLUMNS) - set(rows[0]))}.")
    return rows


BENCHMARK = BenchmarkInfo(
    loader=load,
    splits={"train": None, "validation": None, "test": None},
    tasks=("vqa",),
    source="https://bigearth.net",
)
