"""Pictures made of a raster's bands: three bands as colours, or numbers of a formula as grey or as colours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import RasterError


@dataclass(frozen=True)
class Composite:
    """One way to show bands.

    Attributes:
        title: what it is called in a prompt.
        bands: for each band needed, the common names that serve, best first.
        formula: from the bands, each (height, width), to numbers (height, width), or (3, height, width) to be shown as
            colours; `None` shows the bands themselves.
        limits: the numbers shown as black and white, if they follow from the formula.
        scaled: the formula needs reflectance where scale and offset are known.
        channels: of what the formula gives.
    """

    title: str
    bands: tuple[tuple[str, ...], ...]
    formula: Callable[..., np.ndarray] | None = None
    limits: tuple[float, float] | None = None
    scaled: bool = False
    channels: int = 1


def normalised_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a - b) / (a + b), NaN where the sum is not positive."""
    total = a + b
    return np.divide(a - b, total, out=np.full_like(total, np.nan), where=total > 0)


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 of a backscatter power. What is not positive becomes -inf and is shown black.

    Of an amplitude, 20 log10 is usual. A percentile stretch of both gives the same picture.
    """
    return 10 * np.log10(power, out=np.full_like(power, -np.inf), where=power > 0)


def ratio_of_polarisations(co: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Both backscatters in dB and their ratio, which is the difference in dB; (3, height, width)."""
    co, cross = decibels(co), decibels(cross)
    known = np.isfinite(co) & np.isfinite(cross)
    return np.stack([co, cross, np.subtract(co, cross, out=np.full_like(co, -np.inf), where=known)])


NIR, SWIR = ("nir", "nir08"), ("swir22", "swir16")
COMPOSITES = {
    "true_color": Composite("true color", (("red",), ("green",), ("blue",))),
    "false_color": Composite("false color (near infrared, red, green)", (NIR, ("red",), ("green",))),
    "swir": Composite("false color (short-wave infrared, near infrared, red)", (SWIR, NIR[::-1], ("red",))),
    "ndvi": Composite("NDVI", (NIR, ("red",)), normalised_difference, (-1.0, 1.0), scaled=True),
    "ndwi": Composite("NDWI", (("green",), NIR), normalised_difference, (-1.0, 1.0), scaled=True),
    "sar": Composite("radar backscatter", (("vv", "hh", "vh", "hv"),), decibels),
    "sar_ratio": Composite(
        "radar (co-polarised, cross-polarised, their ratio)",
        (("vv", "hh"), ("vh", "hv")),
        ratio_of_polarisations,
        channels=3,
    ),
}
ALL_BANDS = Composite("all bands", ())  # of a model with more than three
# Bands of a model beside red, green and blue, which `open_views` shows as an image of their own.
NEW_BANDS = "new_bands"


def compose(name: str, bands: Mapping[str, np.ndarray]) -> np.ndarray:
    """The numbers that a composite shows, before any stretch.

    Args:
        name: key in `COMPOSITES`.
        bands: arrays (height, width) by common name. Formulas of indices take reflectance, those of radar power.

    Returns:
        (channels, height, width), float32: three channels, or one for an index.

    Raises:
        RasterError: there is no such composite, or a band that it needs is missing.
    """
    key = find_composite(name)
    composite = COMPOSITES[key]
    found = [next((band for band in names if band in bands), None) for names in composite.bands]
    if None in found:
        missing = [" or ".join(names) for names, band in zip(composite.bands, found, strict=True) if band is None]
        raise RasterError(f"{key} needs {', '.join(missing)}, and the bands are {', '.join(bands)}.")
    values = [np.asarray(bands[band], np.float32) for band in found if band is not None]
    if composite.formula is None:
        return np.stack(values)
    made = composite.formula(*values)
    return made.reshape(composite.channels, *values[0].shape)


def composite_key(name: str) -> str:
    """The name in the spelling of `COMPOSITES` and `NEW_BANDS`, whether or not it is one of them."""
    return name.strip().lower().replace("-", "_").replace("colour", "color")


def find_composite(name: str | None) -> str:
    """The key in `COMPOSITES`.

    Raises:
        RasterError: there is none of that name.
    """
    key = "true_color" if name is None else composite_key(name)
    if key not in COMPOSITES:
        raise RasterError(f"unknown composite {name!r}. Composites are {', '.join(COMPOSITES)}.")
    return key
