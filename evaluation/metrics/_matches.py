"""Figures of lists of objects, from how many of them were found in each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mfrsvlm.evaluation.intervals import corpus_figure, figure


def list_figures(matched: Sequence[int], predicted: Sequence[int | None], true: Sequence[int]) -> dict[str, Any]:
    """Precision, recall and F1 over the objects of all images, the agreement of the counts, and the score of each image.

    Args:
        matched: number of predicted objects of each image that match a true one.
        predicted: number of predicted objects; `None` if the answer cannot be parsed.
        true: number of true objects.
    """
    counts = np.array([matched, [number or 0 for number in predicted], true], dtype=np.int64)  # (3, images)

    def pooled(part: slice) -> dict[str, Any]:
        # Intervals are over images, since the objects of an image are found or missed together.
        return corpus_figure(lambda drawn: share(*(counts @ drawn), part), counts.shape[1])

    pairs = list(zip(predicted, true, strict=True))
    errors = [max(wanted, 1) if number is None else abs(number - wanted) for number, wanted in pairs]
    scores = [0.0 if pairs[i][0] is None else share(*column, BOTH) for i, column in enumerate(counts.T)]
    return {
        "precision": pooled(PREDICTED),
        "recall": pooled(TRUE),
        "f1": pooled(BOTH),
        "exact_count": figure([float(number == wanted) for number, wanted in pairs]),
        "count_mae": figure(errors),
        "scores": scores,
    }


# What the matched objects are a share of.
PREDICTED, TRUE, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)


def share(matched: int, predicted: int, true: int, part: slice) -> float:
    """The matched objects as a share of the predicted ones, the true ones, or both (F1).

    A share of no objects is 1 if there are neither predicted nor true objects, else 0.
    """
    objects = (predicted, true)[part]
    if sum(objects):
        return float(len(objects) * matched / sum(objects))
    return float(predicted == true == 0)
