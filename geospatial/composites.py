"""Pictures made of a raster's bands: three bands as colours, or one number a pixel as grey."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import RasterError


@dataclass(frozen=True)
class Composite:
    """One way to show bands.

    Attributes:
        bands: for each band needed, the common names that serve, best first.
        formula: from the bands, each (height, width), to one number a pixel; `None` shows three bands as red, green, blue.
        limits: the numbers shown as black and white, if they follow from the formula.
        scaled: the formula needs reflectance where scale and offset are known.
    """

    bands: tuple[tuple[str, ...], ...]
    formula: Callable[..., np.ndarray] | None = None
    limits: tuple[float, float] | None = None
    scaled: bool = False


def normalised_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a - b) / (a + b), NaN where the sum is not positive."""
    total = a + b
    return np.divide(a - b, total, out=np.full_like(total, np.nan), where=total > 0)


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 of a backscatter power. What is not positive becomes -inf and is shown black.

    Of an amplitude, 20 log10 is usual. A percentile stretch of both gives the same picture.
    """
    return 10 * np.log10(power, out=np.full_like(power, -np.inf), where=power > 0)


NIR, SWIR = ("nir", "nir08"), ("swir22", "swir16")
COMPOSITES = {
    "true_color": Composite((("red",), ("green",), ("blue",))),
    "false_color": Composite((NIR, ("red",), ("green",))),
    "swir": Composite((SWIR, NIR[::-1], ("red",))),
    "ndvi": Composite((NIR, ("red",)), normalised_difference, (-1.0, 1.0), scaled=True),
    "ndwi": Composite((("green",), NIR), normalised_difference, (-1.0, 1.0), scaled=True),
    "sar": Composite((("vv", "hh", "vh", "hv"),), decibels),
}


def find_composite(name: str | None) -> str:
    """The key in `COMPOSITES`.

    Raises:
        RasterError: there is none of that name.
    """
    key = "true_color" if name is None else name.strip().lower().replace("-", "_").replace("colour", "color")
    if key not in COMPOSITES:
        raise RasterError(f"unknown composite {name!r}. Composites are {', '.join(COMPOSITES)}.")
    return key
