"""Matches predicted boxes with true ones, and counts what fits."""

import numpy as np


def pairwise_iou(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x_min, y_min, x_max, y_max; (N, 4) and (M, 4) to (N, M)."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1) for boxes in (some, others)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def center_distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances between the centers of boxes, (N, 4) and (M, 4) to (N, M)."""
    centers = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (some, others)]
    return np.linalg.norm(centers[0][:, None] - centers[1][None], axis=-1)


def centers_inside(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether the center of one box lies in another, (N, 4) and (M, 4) to (N, M)."""
    centers = (some[:, None, :2] + some[:, None, 2:]) / 2
    return ((others[None, :, :2] <= centers) & (centers <= others[None, :, 2:])).all(-1)


def find_matches(affinity: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
    """Which predictions match a true object, as COCO matches them.

    In the order of their scores, predictions take the true object with the highest affinity that is still free.

    Args:
        affinity: (N, M), of predictions and true objects, such as the IoU.
        scores: (N,)
        least: affinity that a match needs.

    Returns:
        (N,) bool
    """
    matched = np.zeros(len(scores), dtype=bool)
    if not affinity.size:
        return matched
    free = np.where(affinity >= least, affinity, -np.inf)
    for index in np.argsort(-scores, kind="stable"):
        best = int(np.argmax(free[index]))
        if free[index, best] > -np.inf:
            matched[index] = True
            free[:, best] = -np.inf
    return matched


def average_precision(scores: np.ndarray, matched: np.ndarray, true: int) -> float:
    """COCO's average precision: the mean over 101 recalls of the best precision at this recall or a higher one.

    Args:
        scores: (N,), of the predictions of all images.
        matched: (N,) bool, see `find_matches`.
        true: number of true objects.
    """
    if not true:
        return float("nan")
    right = np.cumsum(matched[np.argsort(-scores, kind="stable")])
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / true, np.linspace(0, 1, 101), side="left")
    return float(np.append(best, np.zeros(1))[np.minimum(places, len(best))].mean())
