"""Precision, recall and F1 of the boxes of all objects of a kind.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("object_detection")
    >>> figures = metric.compute(
    ...     predictions=[[[0, 0, 10, 9], [40, 0, 50, 10]], [], None],
    ...     references=[[[0, 0, 10, 10], [20, 0, 30, 10], [60, 0, 70, 10]], [], []],
    ... )
    >>> {name: round(figures[name]["value"], 3) for name in ("precision", "recall", "f1", "exact_count", "count_mae")}
    {'precision': 0.5, 'recall': 0.333, 'f1': 0.4, 'exact_count': 0.333, 'count_mae': 0.667}
    >>> figures["scores"]
    [0.4, 1.0, 0.0]

Limitations:
- There is no average precision (AP), which ranks boxes by their confidence. Boxes in a text have none.
- Images with many objects dominate precision, recall and F1. The scores of the images weigh all images equally.
- Images without objects affect precision, recall and F1 only through false boxes, and `exact_count` in any case.
- Of boxes that overlap much, the greedy matching may find one less than the best matching.
- The bounding box of an oriented box may overlap it by less than half. Compare only boxes of the same form.

Citation:
Everingham et al.: The PASCAL Visual Object Classes (VOC) Challenge. IJCV 2010, for the IoU of 0.5.
"""

from mfrsvlm.evaluation.metrics._checked import BOXES, BOXES_OR_NONE, CheckedMetric, is_number
from mfrsvlm.evaluation.metrics._matches import list_figures
from mfrsvlm.evaluation.metrics.visual_grounding import in_order, matched_ious


class ObjectDetection(CheckedMetric):
    """Precision, recall and F1 of predicted boxes, by the intersection over union (IoU) with the true boxes.

    Boxes are those of `visual_grounding`, and so is the matching: greedy, one to one, by decreasing IoU. All predicted boxes
    are scored, and their order does not matter. A box is found if its IoU with its match is at least the threshold. A
    second box of the same object is a false one.

    The answer for an image without objects is an empty list. An answer that cannot be parsed is `None`: it has no boxes, it
    is never right, and its count error is the true count, but at least 1.
    """

    prediction, reference = BOXES_OR_NONE, BOXES

    def _compute(self, predictions, references, threshold=0.5):
        """
        Args:
            predictions: list of lists of boxes, one list per image; `None` for an answer that cannot be parsed.
            references: list of lists of true boxes, which may be empty.
            threshold: a box counts as found if its IoU is at least the threshold.

        Returns:
            precision: share of the predicted boxes of all images that match a true box.
            recall: share of the true boxes of all images that match a predicted box.
            f1: harmonic mean of precision and recall. All three are 1.0 if there are no boxes at all.
            exact_count: share of images with as many predicted as true boxes.
            count_mae: mean absolute error of the number of boxes.
            parsed: the boxes, as [left, top, right, bottom], or as the four corners; or `None`.
            scores: F1 of each image, 1.0 if it has neither predicted nor true boxes.
        """
        if not (is_number(threshold) and 0 < threshold <= 1):
            raise ValueError(f"{self.name}: threshold={threshold!r} must be a number above 0 and up to 1.")
        parsed = [None if boxes is None else [in_order(box) for box in boxes] for boxes in predictions]
        matched = [
            sum(iou >= threshold for iou in matched_ious(boxes or [], true))
            for boxes, true in zip(parsed, references, strict=True)
        ]
        predicted = [None if boxes is None else len(boxes) for boxes in parsed]
        return {**list_figures(matched, predicted, [len(true) for true in references]), "parsed": parsed}
