"""Numbers with their bootstrap over scenes, and means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


RESAMPLES = 1000


@dataclass
class Estimate:
    """A number (or an array of them) and its bootstrap over scenes.

    Attributes:
        value: (...).
        resampled: (RESAMPLES, ...). All estimates resample the same scenes in the same way, so that the difference of two
            models' estimates is a paired one.
    """

    value: np.ndarray
    resampled: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def __rsub__(self, number: float) -> "Estimate":
        return Estimate(number - self.value, number - self.resampled)

    def numbers(self) -> dict[str, Any]:
        """The value and its 95 % interval, ready for JSON."""
        low, high = np.quantile(self.resampled, [0.025, 0.975], axis=0)
        return {"mean": self.value, "low": low, "high": high}


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Ratio of two sums over scenes, (n, ...) each; not a number where the denominators are all zero."""
    num_scenes = len(numerators)
    chosen = np.random.default_rng(0).multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(denominators.any(0), numerators.sum(0) / denominators.sum(0), np.nan)
        resampled = np.tensordot(chosen, numerators, 1) / np.tensordot(chosen, denominators, 1)
    return Estimate(value, np.where(np.isfinite(resampled), resampled, value))


def sums_by_scene(values: np.ndarray, scene_of_row: np.ndarray, num_scenes: int) -> np.ndarray:
    """(rows, ...) to (n, ...)."""
    sums = np.zeros((num_scenes, *values.shape[1:]))
    np.add.at(sums, scene_of_row, values)
    return sums


def r_squared(predicted: np.ndarray, targets: np.ndarray, scene_of_row: np.ndarray) -> Estimate:
    """R² with its bootstrap over scenes; (rows, ...) and (rows, ...) to (...).

    The value is that of `sklearn.metrics.r2_score`; not a number where targets do not vary.
    """
    num_scenes = int(scene_of_row.max()) + 1
    errors = sums_by_scene(np.square(predicted - targets), scene_of_row, num_scenes)
    deviations = sums_by_scene(np.square(targets - targets.mean(0)), scene_of_row, num_scenes)
    return 1 - ratio(errors, deviations)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def plain(value: Any) -> Any:
    """Estimates, arrays and numbers as JSON has them: rounded, and null where there is no number."""
    if isinstance(value, Estimate):
        value = value.numbers()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 5) if math.isfinite(value) else None
    return value
