"""From the numbers of a raster to 8 bits: one pair of limits a channel, the same for every window of a scene."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import NoValidPixelError, RasterError


PERCENTILES = (2.0, 98.0)
REFLECTANCE = (0.0, 0.3)  # dark water to bright soil; clouds are white
ADVICE = "Stretches are auto, none, percentile, percentile:LOW,HIGH, physical, physical:LOW,HIGH and LOW,HIGH."


@dataclass(frozen=True)
class Request:
    """What the user wants: `kind` is auto, none, percentile, physical or limits; `values` its two numbers."""

    kind: str
    values: tuple[float, float] | None = None


@dataclass(frozen=True)
class Stretch:
    """Limits of each channel: values at or below `low` are black, those at or above `high` white.

    Attributes:
        kind: how the limits were found.
        low, high: one number a channel.
        unit: of the limits: "stored", "reflectance", "dB" or "index".
    """

    kind: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    unit: str

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Numbers (channels, height, width) to uint8 of that shape. What is not finite becomes the nearer limit, NaN 0."""
        if self.kind == "none":
            return values.astype(np.uint8)
        pixels = np.empty(values.shape, np.uint8)
        for plane, channel, low, high in zip(pixels, values, self.low, self.high, strict=True):  # one at a time: memory
            scaled = channel.astype(np.float32)
            np.nan_to_num(scaled, copy=False, nan=low, posinf=np.inf, neginf=-np.inf)
            scaled -= low
            scaled *= 255 / (high - low)
            plane[...] = np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled)
        return pixels


def parse_stretch(stretch: str | Sequence[float] | None) -> Request:
    """Reads what `--stretch` and `stretch=` take.

    Raises:
        RasterError: it is none of them.
    """
    if stretch is None:
        return Request("auto")
    if not isinstance(stretch, str):
        stretch = ",".join(str(value) for value in stretch)
    kind, colon, numbers = stretch.strip().lower().partition(":")
    if kind in ("auto", "none", "percentile", "physical") and not colon:
        return Request(kind)
    if kind not in ("percentile", "physical") and not colon:
        kind, numbers = "limits", stretch
    try:
        low, high = (float(number) for number in numbers.split(","))
    except ValueError as error:
        raise RasterError(f"unknown stretch {stretch!r}. {ADVICE}") from error
    if kind not in ("percentile", "physical", "limits") or not (np.isfinite([low, high]).all() and low < high):
        raise RasterError(f"stretch {stretch!r} needs two finite numbers, the lower one first. {ADVICE}")
    if kind == "percentile" and not 0 <= low < high <= 100:
        raise RasterError(f"stretch {stretch!r}: percentiles lie between 0 and 100.")
    return Request(kind, (low, high))


def limits_of(
    values: np.ndarray,
    valid: np.ndarray,
    percentiles: tuple[float, float],
    shown: str,
    names: Sequence[str | None] | None = None,
) -> tuple[tuple, tuple]:
    """Percentiles of each channel over its valid, finite values.

    Args:
        values, valid: (channels, ...).
        percentiles: lower and upper, 0 to 100.
        shown: the raster in a message.
        names: of the channels, if they are bands.

    Raises:
        NoValidPixelError: a channel has no valid value.
    """
    low, high = [], []
    for index, (channel, mask) in enumerate(zip(values, valid, strict=True)):
        sample = channel[mask & np.isfinite(channel)]
        if not sample.size:
            band = f" in band {names[index]}" if names and mask.any(axis=None) != valid.any(axis=None) else ""
            raise NoValidPixelError(f"{shown} has no valid pixel{band}: all of them are nodata, masked or not finite.")
        bottom, top = (float(value) for value in np.percentile(sample.astype(np.float64), percentiles))
        if bottom == top:  # a constant channel is shown in middle grey
            margin = abs(bottom) * 1e-3 or 0.5
            bottom, top = bottom - margin, top + margin
        low.append(bottom)
        high.append(top)
    return tuple(low), tuple(high)
