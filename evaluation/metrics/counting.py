"""Accuracy and mean absolute error of counts in text answers.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("counting")
    >>> figures = metric.compute(predictions=["There are 3 ships.", "twelve", "many"], references=[3, 10, 4])
    >>> figures["exact"]["value"], figures["mae"]["value"]
    (0.3333333333333333, 2.0)
    >>> figures["parsed"]
    ['3', '12', '']

Limitations:
- "Of the 5 ships, 3 are moored" is parsed as 5, and "one of the 3 ships" as 1.
- Scenes with many objects and extreme answers dominate the mean absolute error. Numbers are clipped at 10^9.
- An answer without a number has a smaller error than an extreme guess, so report both figures.

Citation:
Willmott and Matsuura: Advantages of the mean absolute error. Climate Research 30, 2005.
"""

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._checked import COUNT, TEXT, CheckedMetric
from mfrsvlm.evaluation.numbers import read_number


class Counting(CheckedMetric):
    """Share of exact counts in text answers, and their mean absolute error.

    The first number of an answer is scored: in digits ("3", "1,234", "2.5", "-1") or in English words up to thousands
    ("twenty-three", "none" for 0). Numbers are clipped at 10^9, so that a single answer does not dominate the mean.

    An answer without a number is not exact. Its error is the true count, as for the answer 0, but at least 1, so that it is
    always worse than a correct answer.
    """

    prediction, reference = TEXT, COUNT

    def _compute(self, predictions, references):
        """
        Args:
            predictions: list of answers, as generated.
            references: list of true counts, integers.

        Returns:
            exact: share of answers whose number is the true count.
            mae: mean absolute error, in objects.
            parsed: the parsed number as text, "" if none.
            scores: 1.0 or 0.0, whether it is exact.
        """
        numbers = [read_number(answer) for answer in predictions]
        errors = [
            float(max(truth, 1)) if number is None else abs(number - truth)
            for number, truth in zip(numbers, references, strict=True)
        ]
        exact = [float(error == 0) for error in errors]
        parsed = ["" if number is None else f"{number:.12g}" for number in numbers]
        return {"exact": figure(exact), "mae": figure(errors), "parsed": parsed, "scores": exact}
