"""So2Sat LCZ42: 17 local climate zones in patches of Sentinel-1 and Sentinel-2, 32 pixels of 10 metres a side.

Layout: `training.h5`, `validation.h5` and `testing.h5`, with `sen1` (n, 32, 32, 8), `sen2` (n, 32, 32, 10) in reflectance,
and `label` (n, 17), 1 for the class. They are read with h5py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .info import BenchmarkInfo
from .reading import chosen_classes
from .sample import Benchmark, BenchmarkError, Sample
from .spectral import SENTINEL_2, as_image, choose_bands


CLASSES = (
    "compact high-rise", "compact mid-rise", "compact low-rise", "open high-rise", "open mid-rise", "open low-rise",
    "lightweight low-rise", "large low-rise", "sparsely built", "heavy industry", "dense trees", "scattered trees",
    "bush or scrub", "low plants", "bare rock or paved", "bare soil or sand", "water",
)  # fmt: skip
SPLITS = {"train": "training.h5", "validation": "validation.h5", "test": "testing.h5"}
OPTICAL = [SENTINEL_2[label] for label in ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")]
RADAR = {"vh": 4, "vv": 5}  # channels of the intensity after a Lee filter


def load(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    classes: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
) -> Benchmark:
    """See `spectral` for `bands`, which may also be vv and vh, in dB from -30 to 6.

    Raises:
        BenchmarkError: h5py or the file is missing, or its arrays are not as above.
    """
    chosen, asked = choose_bands(bands, [*OPTICAL, *RADAR], name), chosen_classes(classes, CLASSES, name)
    path = root / SPLITS[split]
    labels = np.asarray(read(path, "label", slice(None)))
    if labels.ndim != 2 or labels.shape[1] != len(CLASSES) or not (labels.sum(axis=1) == 1).all():
        raise BenchmarkError(
            f"{path}: label of shape {labels.shape} does not mark one of {len(CLASSES)} classes in each row."
        )
    samples = [
        Sample(f"{index}", (f"{index}",), "classification", "", (CLASSES[label],), CLASSES[label])
        for index, label in enumerate(labels.argmax(axis=1).tolist())
        if CLASSES[label] in asked
    ]

    def open_image(image: str) -> Any:
        optical, radar = (read(path, array, int(image)) for array in ("sen2", "sen1"))
        power = {band: np.maximum(radar[..., channel], 1e-6) for band, channel in RADAR.items()}
        return as_image(
            {band: 10 * np.log10(power[band]) if band in RADAR else optical[..., OPTICAL.index(band)] for band in chosen},
            unit=1.0,
        )

    left = {} if classes is None else {"classes": len(CLASSES) - len(asked)}
    return Benchmark(name, split, None, samples, asked, open_image, left_out=left)


def read(path: Path, name: str, index: Any) -> np.ndarray:
    """Rows of an array of a file."""
    try:
        import h5py
    except ImportError as error:
        raise BenchmarkError(f"{path} needs h5py: pip install h5py") from error
    try:
        with h5py.File(path) as file:
            values: np.ndarray = file[name][index]
    except (KeyError, OSError, IndexError) as error:
        raise BenchmarkError(f"{path} cannot be read, or has no {name} {index}: {' '.join(str(error).split())}") from error
    return values


BENCHMARK = BenchmarkInfo(
    loader=load,
    splits=dict.fromkeys(SPLITS),
    tasks=("classification",),
    source="https://doi.org/10.14459/2018mp1483140",
)
