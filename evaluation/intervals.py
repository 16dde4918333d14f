"""Figures with 95 % bootstrap intervals, which show how much a value depends on the choice of the samples.

The bootstrap resamples the samples with replacement and computes the value again. The interval contains the middle 95 % of
these values. A seed makes it reproducible.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


QUANTILES = (0.025, 0.975)


def mean_interval(scores: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of the scores and its 95 % interval: (mean, low, high).

    Raises:
        ValueError: no scores, scores that are not finite, or no draws.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores must be a flat list of at least one finite number, got {str(scores)[:200]}.")
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1.")
    # Draw how often each distinct score occurs, instead of which samples: equivalent, and small for any number of samples.
    levels, counts = np.unique(values, return_counts=True)
    rng, means = np.random.default_rng(seed), np.empty(draws)
    block = max(1, 2**22 // levels.size)  # of draws that are held at once
    for start in range(0, draws, block):
        part = means[start : start + block]
        drawn = rng.multinomial(values.size, counts / values.size, size=part.size)  # (block, levels)
        part[:] = drawn @ levels / values.size
    low, high = np.quantile(means, QUANTILES)
    return float(values.mean()), float(low), float(high)


def figure(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of one score a sample, as metrics report it: value, low, high and n."""
    value, low, high = mean_interval(scores)
    return {"value": value, "low": low, "high": high, "n": len(scores)}


def corpus_figure(statistic: Callable[[np.ndarray], float], n: int, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """As `figure`, for a value that is not a mean over samples, such as BLEU or a mean over classes.

    Args:
        statistic: computes the value from how often each of the n samples is drawn, (n,) integers that sum to n. A draw
            for which it returns NaN is skipped.
        n: number of samples.
        seed: seed of the draws.
        draws: number of draws.
    """
    if n < 1:
        raise ValueError("There are no samples to compute a figure from.")
    rng = np.random.default_rng(seed)
    values = [statistic(rng.multinomial(n, np.full(n, 1 / n))) for _ in range(draws)]
    low, high = np.nanquantile(values, QUANTILES)
    return {"value": float(statistic(np.ones(n, dtype=np.int64))), "low": float(low), "high": float(high), "n": n}
