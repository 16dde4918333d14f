"""Images of more than three bands, which several benchmarks hold, as bands by name.

A benchmark of this kind takes the option `bands`: red, green and blue alone give an image in color, for any model; other
names give `{band: array}` for a model with these `image_bands`. Files are read with rasterio, and stretched alike in every
image: reflectance from 0 to 0.3 in red, green and blue, and from 0 to 0.6 in other bands.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .reading import require_inside
from .sample import Benchmark, BenchmarkError


RGB = ("red", "green", "blue")
# Bands of Sentinel-2 by their common names in STAC.
SENTINEL_2 = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge071", "B06": "rededge075",
    "B07": "rededge078", "B08": "nir", "B8A": "nir08", "B09": "nir09", "B10": "cirrus", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
UNIT = 10_000  # stored for a reflectance of 1
WHITE = dict.fromkeys(RGB, 0.3)  # reflectance; 0.6 for others
DECIBELS = (-30.0, 6.0)  # of radar, black and white


def choose_bands(bands: Sequence[str] | None, known: Sequence[str], name: str) -> list[str]:
    """The bands to read; red, green and blue for `None`.

    Raises:
        BenchmarkError: a band that the benchmark lacks, or one twice.
    """
    chosen = list(RGB if bands is None else bands)
    unknown = [band for band in chosen if band not in known]
    if unknown or len(set(chosen)) < len(chosen) or not chosen:
        raise BenchmarkError(f"{name}: bands={chosen} must be different ones of {', '.join(known)}.")
    return chosen


def to_samples(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as 8 bits between two limits."""
    return np.rint((values.astype(np.float32) - low) * np.float32(255 / (high - low))).clip(0, 255).astype(np.uint8)


def as_image(bands: Mapping[str, np.ndarray], unit: float = UNIT) -> Any:
    """Bands as an image in color if they are red, green and blue, else as 8 bits by band.

    Args:
        bands: reflectance times `unit`; of radar (vv, vh), dB.
        unit: what is stored for a reflectance of 1.
    """
    made = {}
    for name, values in bands.items():
        limits = DECIBELS if name in ("vv", "vh") else (0.0, unit * WHITE.get(name, 0.6))
        made[name] = to_samples(values, *limits)
    if set(made) == set(RGB):
        return Image.fromarray(np.stack([made[name] for name in RGB], axis=2))
    return made


def read_files(places: Mapping[str, tuple[Path, int]]) -> dict[str, np.ndarray]:
    """Bands by name from (file, number of the band), on the grid of the finest.

    Raises:
        BenchmarkError: rasterio is missing, or a file is missing, broken, or has another number of bands.
    """
    try:
        import rasterio
        from rasterio.enums import Resampling
    except ImportError as error:
        raise BenchmarkError("Images of more than three bands need rasterio: pip install 'mfrsvlm[geospatial]'") from error
    read = {}
    for name, (path, index) in places.items():
        try:
            with rasterio.open(path) as file:
                if index > file.count:
                    raise BenchmarkError(f"{path} has {file.count} bands, so it has no band {index} ({name}).")
                read[name] = file.read(index)
        except rasterio.errors.RasterioError as error:
            raise BenchmarkError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    shape = max((values.shape for values in read.values()), key=lambda shape: shape[0] * shape[1])
    for name, values in read.items():
        if values.shape != shape:
            with rasterio.open(places[name][0]) as file:
                read[name] = file.read(places[name][1], out_shape=shape, resampling=Resampling.cubic)
    return read


def with_bands(
    benchmark: Benchmark, places: Callable[[str], Mapping[str, tuple[Path, int]]], allow_outside: bool
) -> Benchmark:
    """The benchmark, whose images are read as bands. `places` gives the file and number of each band of an image."""
    root = Path(benchmark.root or ".")

    def open_image(name: str) -> Any:
        try:
            files = places(name)
            if not allow_outside:
                require_inside(root, [os.path.relpath(path, root) for path, _ in files.values()])
            return as_image(read_files(files))
        except BenchmarkError as error:
            sample = next((sample.id for sample in benchmark.samples if name in sample.images), None)
            raise BenchmarkError(f"Image {name} of sample {sample!r} of {benchmark.name} cannot be read: {error}") from error

    benchmark.root, benchmark.open_image = None, open_image
    return benchmark
