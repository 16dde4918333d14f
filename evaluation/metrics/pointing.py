"""Precision, recall and F1 of a point on every object of a kind.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("pointing")
    >>> figures = metric.compute(
    ...     predictions=[[[5, 5], [6, 6], [25, 5]], [], None],
    ...     references=[[[0, 0, 10, 10], [20, 0, 30, 10]], [], []],
    ... )
    >>> {name: round(figures[name]["value"], 3) for name in ("precision", "recall", "f1", "exact_count", "count_mae")}
    {'precision': 0.667, 'recall': 1.0, 'f1': 0.8, 'exact_count': 0.333, 'count_mae': 0.667}
    >>> figures["scores"]
    [0.8, 1.0, 0.0]

Limitations:
- A point anywhere in the box of an object counts, also beside the object itself.
- Images with many objects dominate precision, recall and F1. The scores of the images weigh all images equally.
- Images without objects affect precision, recall and F1 only through false points, and `exact_count` in any case.
- Four corners without a convex outline are replaced by their convex hull.

Citation:
Deitke et al.: Molmo and PixMo: Open Weights and Open Data for State-of-the-Art Vision-Language Models. CVPR 2025. It scores
points in masks; here, boxes take their place.
"""

from collections.abc import Sequence

import numpy as np
from shapely import intersects_xy

from mfrsvlm.evaluation.metrics._checked import BOXES, POINTS_OR_NONE, CheckedMetric
from mfrsvlm.evaluation.metrics._matches import list_figures
from mfrsvlm.evaluation.metrics.visual_grounding import outline


class Pointing(CheckedMetric):
    """Precision, recall and F1 of predicted points, by the true boxes that contain them.

    A box is [x1, y1, x2, y2], any two opposite corners, or the four corners of an oriented box in any order. It contains
    the points on its edge. Points and boxes are matched one to one, so that there are as many pairs as possible. A second
    point in the same box is a false one.

    The answer for an image without objects is an empty list. An answer that cannot be parsed is `None`: it has no points, it
    is never right, and its count error is the true count, but at least 1.
    """

    prediction, reference = POINTS_OR_NONE, BOXES

    def _compute(self, predictions, references):
        """
        Args:
            predictions: list of lists of points [x, y], one list per image; `None` for an answer that cannot be parsed.
            references: list of lists of true boxes, which may be empty.

        Returns:
            precision: share of the points of all images that match a box.
            recall: share of the boxes of all images that match a point.
            f1: harmonic mean of precision and recall. All three are 1.0 if there are neither points nor boxes.
            exact_count: share of images with as many points as boxes.
            count_mae: mean absolute error of the number of points.
            parsed: the points, or `None`.
            scores: F1 of each image, 1.0 if it has neither points nor boxes.
        """
        matched = [number_of_pairs(points or [], boxes) for points, boxes in zip(predictions, references, strict=True)]
        predicted = [None if points is None else len(points) for points in predictions]
        return {**list_figures(matched, predicted, [len(boxes) for boxes in references]), "parsed": list(predictions)}


def number_of_pairs(points: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]]) -> int:
    """The largest number of pairs of a point and a box that contains it, each in one pair at most."""
    if not points or not boxes:
        return 0
    x, y = np.array(points).T[..., None]  # (points, 1) each
    inside = intersects_xy([outline(box) for box in boxes], x, y)  # (points, boxes)
    boxes_of = [np.flatnonzero(row).tolist() for row in inside]
    point_in: dict[int, int] = {}  # the point that a box is paired with
    for start in range(len(points)):
        # Search for a free box, to which the pairs on the way can move up.
        reached: dict[int, int] = {}  # box -> the point that it was reached from
        waiting = [start]
        while waiting:
            point = waiting.pop()
            free = next((box for box in boxes_of[point] if box not in point_in), None)
            if free is not None:
                box_of = {other: box for box, other in point_in.items()}
                while point != start:
                    point_in[free], free = point, box_of[point]
                    point = reached[free]
                point_in[free] = start
                break
            new = [box for box in boxes_of[point] if box not in reached]
            reached |= dict.fromkeys(new, point)
            waiting += [point_in[box] for box in new]
    return len(point_in)
