"""Finds photographs that show the same ground, also shifted: aerial data sets often sample overlapping crops of one mosaic.

Photographs are reduced to gray, high-pass filtered squares. Two of them are compared at every shift that leaves a share of
the area in common, by the correlation coefficient of what they have in common there.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter


SIDE = 64  # pixels of the squares that are compared
BLUR = 2.0  # pixels; larger structures, such as brightness, say little about the place
LEAST_OVERLAP = 0.2  # share of the area
# Overlapping photographs of UC Merced reach 0.8 and more. Between 0.6 and 0.8 most pairs are parallel edges of different
# places, such as runways. They are dropped as well.
SAME_PLACE = 0.6


def prepare(image: Image.Image) -> torch.Tensor:
    """(SIDE, SIDE) float32, high-pass filtered gray."""
    gray = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    difference = np.asarray(gray, dtype=np.float32) - np.asarray(
        gray.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float32
    )
    return torch.from_numpy(difference)


@torch.inference_mode()
def similarities(ones: torch.Tensor, others: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """The largest correlation coefficient over all shifts.

    Args:
        ones: (n, s, s), from `prepare`.
        others: (m, s, s).
        chunk: how many of `others` are compared at once.

    Returns:
        (n, m), in [-1, 1].
    """
    side, padded = ones.shape[-1], (2 * ones.shape[-1],) * 2
    inside = torch.fft.rfft2(torch.ones(side, side), s=padded)

    def correlate(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(left.conj() * right, s=padded)

    area = correlate(inside, inside).round()
    enough = area >= LEAST_OVERLAP * side**2
    area = area.clamp(min=1)
    result = torch.empty(len(ones), len(others))
    for start in range(0, len(others), chunk):
        right = others[start : start + chunk]
        transformed = torch.fft.rfft2(right, s=padded)
        sums = correlate(inside, transformed)
        spread = (correlate(inside, torch.fft.rfft2(right.square(), s=padded)) - sums.square() / area).clamp(min=1)
        for row, left in enumerate(ones):
            own = torch.fft.rfft2(left, s=padded)
            own_sums = correlate(own, inside)
            own_spread = correlate(torch.fft.rfft2(left.square(), s=padded), inside) - own_sums.square() / area
            scores = (correlate(own, transformed) - own_sums * sums / area) * (own_spread.clamp(min=1) * spread).rsqrt()
            result[row, start : start + chunk] = torch.where(enough, scores, -1.0).flatten(1).max(1).values
    return result.clamp(-1, 1)


def same_places(held_out: Sequence[Path], others: Sequence[Path]) -> dict[Path, tuple[Path, float]]:
    """Of `others`, those that show the same place as a held-out photograph: that photograph, and the similarity."""
    if not held_out or not others:
        return {}
    squares = [torch.stack([prepare(Image.open(path)) for path in paths]) for paths in (held_out, others)]
    best, which = similarities(*squares).max(0)
    return {
        path: (held_out[int(index)], round(float(score), 3))
        for path, index, score in zip(others, which, best, strict=True)
        if score >= SAME_PLACE
    }
