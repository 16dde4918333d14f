"""Calibration of the probability of "yes": expected calibration error, Brier score and accuracy.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("yes_no_calibration")
    >>> figures = metric.compute(predictions=[0.9, 0.75, 0.25, 0.5], references=["yes", "no", "no", "yes"])
    >>> {name: round(figures[name]["value"], 5) for name in ("ece", "brier", "accuracy")}
    {'ece': 0.4, 'brier': 0.22125, 'accuracy': 0.5}

Limitations:
- The bins are those of the probability of "yes". Binning the probability of the given answer gives other values.
- The calibration error is biased upwards for few samples, and resampling adds to the bias. Its interval may lie above the
  value.
- A model that always predicts the share of "yes" is calibrated but useless. Report the accuracy too.

Citation:
Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks. ICML 2017. Brier: Verification of forecasts expressed
in terms of probability. Monthly Weather Review 78, 1950.
"""

import numpy as np

from mfrsvlm.evaluation.intervals import corpus_figure, figure
from mfrsvlm.evaluation.metrics._checked import PROBABILITY, YES_OR_NO, CheckedMetric


class YesNoCalibration(CheckedMetric):
    """Calibration of the probabilities that a model gives to "yes".

    The expected calibration error uses bins of equal width of the probability of "yes". Some papers use the probability of
    the given answer instead, which gives other values. Resampling adds noise to every bin, which increases the error. The
    interval is therefore biased upwards, and may lie above the value.
    """

    prediction, reference = PROBABILITY, YES_OR_NO

    def _compute(self, predictions, references, bins=10):
        """
        Args:
            predictions: list of probabilities of "yes", 0 to 1.
            references: list of "yes" and "no".
            bins: number of bins of the calibration error. A probability on an edge belongs to the bin above, 1 to the last.

        Returns:
            ece: expected calibration error: absolute difference between mean probability and share of "yes" in each bin,
                weighed by the number of samples in the bin.
            brier: mean squared difference between the probability and the truth, 1 for "yes" and 0 for "no".
            accuracy: share of samples whose probability is on the correct side of 0.5; exactly 0.5 is wrong.
            parsed: "yes", "no", or "" at 0.5.
            scores: 1.0 or 0.0, whether the side is correct.
        """
        if not isinstance(bins, int) or bins < 1:
            raise ValueError(f"{self.name}: bins={bins!r} must be a whole number of at least 1.")
        probabilities = np.asarray(predictions, dtype=np.float64)
        truth = np.asarray([reference == "yes" for reference in references], dtype=np.float64)
        gaps = probabilities - truth
        bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)

        def ece(drawn: np.ndarray) -> float:
            # The share of samples in a bin times the difference of its two means.
            return float(np.abs(np.bincount(bin_of, drawn * gaps)).sum() / drawn.sum())

        parsed = ["yes" if p > 0.5 else "no" if p < 0.5 else "" for p in predictions]
        right = [float(answer == reference) for answer, reference in zip(parsed, references, strict=True)]
        return {
            "ece": corpus_figure(ece, len(predictions)),
            "brier": figure(gaps**2),
            "accuracy": figure(right),
            "parsed": parsed,
            "scores": right,
        }
