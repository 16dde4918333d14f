"""Accuracy and mean IoU of boxes for referring expressions.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("visual_grounding")
    >>> figures = metric.compute(
    ...     predictions=[[[10, 10, 0, 0]], [[0, 0, 10, 6], [0, 0, 10, 10]], []],
    ...     references=[[[0, 0, 10, 10]], [[0, 0, 10, 10]], [[5, 5, 9, 9]]],
    ... )
    >>> {name: round(figures[name]["value"], 3) for name in ("accuracy_0.5", "accuracy_0.7", "mean_iou")}
    {'accuracy_0.5': 0.667, 'accuracy_0.7': 0.333, 'mean_iou': 0.533}

Limitations:
- The bounding box of an oriented box may overlap it by less than half. Compare only boxes of the same form.
- If one box is asked for, only the first predicted box is scored.
- Boxes are not clipped to the image, whose size the metric does not know.
- Four corners without a convex outline are replaced by their convex hull.

Citation:
Accuracy at 0.5 and 0.7 with mean IoU, as in DIOR-RSVG (Zhan, Xiong, Yuan: RSVG. IEEE TGRS 2023) and VRSBench (Li et al.,
NeurIPS 2024).
"""

from collections.abc import Sequence

from shapely import MultiPoint

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._checked import BOXES, SOME_BOXES, CheckedMetric, is_list, is_number


class VisualGrounding(CheckedMetric):
    """Accuracy of predicted boxes, by the intersection over union (IoU) with the true boxes.

    A box is [x1, y1, x2, y2], any two opposite corners, or the four corners of an oriented box in any order. Sides have no
    extra pixel: [0, 0, 10, 10] has an area of 100. A box without an area has an IoU of 0 with every box.

    Several boxes: if there are n true boxes, only the first n predicted boxes are scored, so that more boxes gain nothing.
    They are matched greedily, one to one, by decreasing IoU. Of equal pairs, the one with the earlier true box is first,
    then the one with the earlier predicted box. A true box without a match has an IoU of 0.
    """

    prediction, reference = BOXES, SOME_BOXES

    def _compute(self, predictions, references, thresholds=(0.5, 0.7)):
        """
        Args:
            predictions: list of lists of boxes; an empty list if the model predicted none.
            references: list of lists of true boxes, at least one each.
            thresholds: a box counts as found if its IoU is at least the threshold.

        Returns:
            accuracy_T, for each threshold T: mean over samples of the share of their true boxes that are found.
            mean_iou: mean over samples of the mean IoU of their true boxes.
            parsed: the scored boxes, as [left, top, right, bottom], or as the four corners.
            scores: the share of the true boxes that are found at the first threshold.
        """
        fits = is_list(thresholds) and all(is_number(threshold) and 0 < threshold <= 1 for threshold in thresholds)
        if not fits or not thresholds:
            raise ValueError(f"{self.name}: thresholds={thresholds!r} must be a list of numbers above 0 and up to 1.")
        pairs = zip(predictions, references, strict=True)
        parsed = [[in_order(box) for box in boxes[: len(true)]] for boxes, true in pairs]
        overlaps = [matched_ious(boxes, true) for boxes, true in zip(parsed, references, strict=True)]
        found = {
            threshold: [sum(iou >= threshold for iou in ious) / len(ious) for ious in overlaps] for threshold in thresholds
        }
        return {
            **{f"accuracy_{threshold:g}": figure(shares) for threshold, shares in found.items()},
            "mean_iou": figure([sum(ious) / len(ious) for ious in overlaps]),
            "parsed": parsed,
            "scores": found[thresholds[0]],
        }


def in_order(box: Sequence[float]) -> list[float]:
    """An axis-aligned box as left, top, right, bottom. An oriented box is returned unchanged."""
    if len(box) == 8:
        return list(box)
    x1, y1, x2, y2 = box
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def matched_ious(predicted: Sequence[Sequence[float]], true: Sequence[Sequence[float]]) -> list[float]:
    """The IoU of each true box with its match, 0 if it has none."""
    pairs = [(iou(a, b), -j, -i) for j, b in enumerate(true) for i, a in enumerate(predicted)]
    matched = [0.0] * len(true)
    taken: set[int] = set()
    left = set(range(len(true)))
    for value, j, i in sorted(pairs, reverse=True):
        if -j in left and -i not in taken:
            matched[-j] = value
            left.remove(-j)
            taken.add(-i)
    return matched


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 if one has no area."""
    if len(one) == len(other) == 4:
        one, other = in_order(one), in_order(other)
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        if width <= 0 or height <= 0:
            return 0.0
        common = width * height
        return common / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - common)
    first, second = outline(one), outline(other)
    common = first.intersection(second).area
    # Computed without the union, which would take as long again.
    return common / (first.area + second.area - common) if common > 0 else 0.0


def outline(box: Sequence[float]):
    """The box as a shape: the convex hull of its corners, which does not depend on their order."""
    if len(box) == 4:
        x1, y1, x2, y2 = box
        box = (x1, y1, x2, y1, x2, y2, x1, y2)
    return MultiPoint([(box[index], box[index + 1]) for index in range(0, 8, 2)]).convex_hull
