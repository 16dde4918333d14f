"""Small rasters with known pixels, in every form that their pixels can take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine


NORTH_UP = Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 4_000_000.0)
CRS = "EPSG:32631"
RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


def pixels(dtype: str = "uint8", bands: int = 3, height: int = 61, width: int = 90, seed: int = 0) -> np.ndarray:
    """Noise on slopes, (bands, height, width), without zeros, which stand for no data."""
    random = np.random.default_rng(seed)
    top = 255 if dtype == "uint8" else 4000
    slope = np.linspace(0.1, 0.8, width)[None, None] * np.linspace(0.5, 1, height)[None, :, None]
    values = top * np.clip(
        slope * np.linspace(0.6, 1, bands)[:, None, None] + random.normal(0, 0.1, (bands, height, width)), 0, 1
    )
    return np.maximum(values, 1).astype(dtype)


def write(
    path: Path, values: np.ndarray, colours: Any = RGB, transform: Any = NORTH_UP, crs: Any = CRS, **profile: Any
) -> str:
    """Writes (bands, height, width) and returns the path as text."""
    mask, names, driver = profile.pop("mask", None), profile.pop("names", None), profile.pop("driver", "GTiff")
    if colours == RGB and len(values) >= 3:
        profile.setdefault("photometric", "RGB")
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver=driver, crs=crs, transform=transform, **shape, **profile) as dataset:
        if colours and colours != RGB:
            dataset.colorinterp = colours
        dataset.write(values)
        for index, name in enumerate(names or (), start=1):
            dataset.set_band_description(index, name)
        if mask is not None:
            dataset.write_mask(mask)
    return str(path)


def unnamed(path: Path, values: np.ndarray, **profile: Any) -> str:
    """A TIFF that says nothing about its bands."""
    return write(path, values, colours=None, photometric="MINISBLACK", **profile)


def data_array(values: np.ndarray, names: Any = None, rio: bool = True, nodata: Any = None) -> Any:
    """What xarray, and rioxarray if `rio`, give of a raster."""
    height, width = values.shape[1:]
    x = NORTH_UP.c + NORTH_UP.a * (np.arange(width) + 0.5)
    y = NORTH_UP.f + NORTH_UP.e * (np.arange(height) + 0.5)
    coords = {"x": x, "y": y} | ({"band": np.array(names)} if names else {})
    known = SimpleNamespace(crs=CRS, transform=lambda: NORTH_UP, nodata=nodata)
    return SimpleNamespace(dims=("band", "y", "x"), values=values, coords=coords, attrs={}, rio=known if rio else None)
