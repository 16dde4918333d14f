"""Whether a model that gives "yes" a probability of 0.7 is right in 7 of 10 such cases.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("yes_no_calibration")
    >>> figures = metric.compute(predictions=[0.9, 0.75, 0.25, 0.5], references=["yes", "no", "no", "yes"])
    >>> {name: round(figures[name]["value"], 5) for name in ("ece", "brier", "accuracy")}
    {'ece': 0.4, 'brier': 0.22125, 'accuracy': 0.5}

Limitations:
- The bins are of the probability of "yes"; papers that bin the probability of the answer given get other values.
- The calibration error of few samples is too high, and drawing samples anew makes it higher still: its interval leans
  upwards and may lie above the value.
- A model that always gives the share of "yes" is calibrated and useless: look at the accuracy too.

Citation:
Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks. ICML 2017. Brier: Verification of forecasts expressed
in terms of probability. Monthly Weather Review 78, 1950.
"""

import numpy as np

from mfrsvlm.evaluation.intervals import corpus_figure, figure
from mfrsvlm.evaluation.metrics._checked import PROBABILITY, YES_OR_NO, CheckedMetric


class YesNoCalibration(CheckedMetric):
    """How far the probabilities that a model gives to "yes" can be trusted.

    The expected calibration error is taken over bins of the probability of "yes", of equal width; some papers take the
    probability of the answer given instead, which gives other values. Drawing samples anew adds noise to every bin, and
    noise adds to the error: its interval leans upwards, and may lie above the value.
    """

    prediction, reference = PROBABILITY, YES_OR_NO

    def _compute(self, predictions, references, bins=10):
        """
        Args:
            predictions: list of probabilities of "yes", 0 to 1.
            references: list of "yes" and "no".
            bins: number of bins of the calibration error. A probability on an edge belongs to the bin above, 1 to the last.

        Returns:
            ece: expected calibration error: the mean over samples of how far, in the sample's bin, the mean probability is
                from the share of "yes".
            brier: mean square of probability minus truth, which is 1 for "yes" and 0 for "no".
            accuracy: share of samples where the probability lies on the right side of a half; at a half it is wrong.
            parsed: "yes", "no", or "" at a half.
            scores: 1.0 or 0.0, whether the side is right.
        """
        if not isinstance(bins, int) or bins < 1:
            raise ValueError(f"{self.name}: bins={bins!r} must be a whole number of at least 1.")
        chance = np.asarray(predictions, dtype=np.float64)
        truth = np.asarray([reference == "yes" for reference in references], dtype=np.float64)
        gaps = chance - truth
        bin_of = np.minimum((chance * bins).astype(int), bins - 1)

        def ece(drawn: np.ndarray) -> float:
            # A bin's share of the samples, times how far its two means are apart.
            return float(np.abs(np.bincount(bin_of, drawn * gaps)).sum() / drawn.sum())

        parsed = ["yes" if p > 0.5 else "no" if p < 0.5 else "" for p in predictions]
        right = [float(said == reference) for said, reference in zip(parsed, references, strict=True)]
        return {
            "ece": corpus_figure(ece, len(predictions)),
            "brier": figure(gaps**2),
            "accuracy": figure(right),
            "parsed": parsed,
            "scores": right,
        }
