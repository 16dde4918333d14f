"""Figures of groups of samples, such as the types of questions or the classes, and the mean over groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mfrsvlm.evaluation.intervals import QUANTILES, figure


def by_group(groups: Sequence[str], scores: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The mean score of each group, sorted by name."""
    members: dict[str, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        members.setdefault(group, []).append(score)
    return {group: figure(members[group]) for group in sorted(members)}


def mean_over_groups(groups: Sequence[str], scores: Sequence[float], seed: int = 0, draws: int = 2000) -> dict[str, Any]:
    """The unweighted mean of the mean scores of the groups.

    For the interval, samples are drawn from all groups together. If a draw has no sample of a group, it is the mean over the
    other groups.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    # Draw how often each pair of group and score occurs, instead of which samples: equivalent, and small.
    cells, counts = np.unique(np.stack([group_of, np.asarray(scores, np.float64)], axis=1), axis=0, return_counts=True)
    group_of_cell = (cells[:, 0].astype(int)[:, None] == np.arange(len(names))).astype(np.float64)  # (cells, groups)

    def means(drawn: np.ndarray) -> np.ndarray:  # (draws, cells) -> (draws,)
        sizes = drawn @ group_of_cell  # (draws, groups)
        sums = (drawn * cells[:, 1]) @ group_of_cell
        return (sums / np.maximum(sizes, 1)).sum(axis=1) / (sizes > 0).sum(axis=1)

    drawn = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), size=draws)
    low, high = np.quantile(means(drawn), QUANTILES)
    return {"value": float(means(counts[None])[0]), "low": float(low), "high": float(high), "n": len(scores)}


def check_groups(metric: str, setting: str, groups: Any, n: int) -> None:
    """Raises ValueError unless there are n groups, each a non-blank text."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise ValueError(f"{metric}: {setting} must be a list, got {type(groups).__name__}.")
    if len(groups) != n:
        raise ValueError(f"{metric}: {len(groups)} {setting} but {n} predictions.")
    for index, group in enumerate(groups):
        if not isinstance(group, str) or not group.strip():
            raise ValueError(f"{metric}: {setting}[{index}] is {group!r}, but must be text that is not blank.")
