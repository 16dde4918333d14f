"""Counts that are answered in words: how often they are exact, and how far off they are.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("counting")
    >>> figures = metric.compute(predictions=["There are 3 ships.", "twelve", "many"], references=[3, 10, 4])
    >>> figures["exact"]["value"], figures["mae"]["value"]
    (0.3333333333333333, 2.0)
    >>> figures["parsed"]
    ['3', '12', '']

Limitations:
- "Of the 5 ships, 3 are moored" is read as 5, and "one of the 3 ships" as 1.
- The mean absolute error is ruled by scenes with many objects and by wild answers; numbers above a thousand million are
  taken as that.
- Saying nothing costs less error than a wild guess, so look at both figures.

Citation:
Willmott and Matsuura: Advantages of the mean absolute error. Climate Research 30, 2005.
"""

import re

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._checked import COUNT, TEXT, CheckedMetric


UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
UNITS += "eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(UNITS.split())}
WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), start=2)}
WORDS |= {"hundred": 100, "thousand": 1000, "none": 0}
WORD = rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})\b"
MINUS = "\N{MINUS SIGN}"
DIGITS = rf"[-+{MINUS}]?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?"
# A number does not begin within a word or another number, and a sign follows neither: "3-5" is 3, and then 5.
FIRST = re.compile(rf"(?<!\w)(?<!\d[.,])(?:({DIGITS})|({WORD}(?:[\s-]+(?:and\s+)?{WORD})*))", re.IGNORECASE)
LARGEST = 10**9


class Counting(CheckedMetric):
    """How often a count that is answered in words is exact, and its mean absolute error.

    The first number of an answer counts, whatever stands around it: in digits ("3", "1,234", "2.5", "-1") or in English
    words up to thousands ("twenty-three", "none" for 0). Numbers above a thousand million are taken as that, so that one
    answer cannot drown the mean.

    An answer without a number is not exact, and its error is the true count, as if 0 had been said, but at least 1, so that
    saying nothing is never as good as being right.
    """

    prediction, reference = TEXT, COUNT

    def _compute(self, predictions, references):
        """
        Args:
            predictions: list of answers, as the model gave them.
            references: list of true counts, whole numbers.

        Returns:
            exact: share of answers whose number is the true one.
            mae: mean absolute error, in objects.
            parsed: the number that was read as text, "" if none.
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


def read_number(text: str) -> float | None:
    """The first number in a text, or `None`."""
    match = FIRST.search(text)
    if not match:
        return None
    if match[1]:
        return max(-LARGEST, min(float(match[1].replace(",", "").replace(MINUS, "-")), LARGEST))
    total = current = 0
    for word in re.findall(WORD, match[2].lower()):
        value = WORDS[word]
        if value == 100:
            current = max(current, 1) * 100
        elif value == 1000:
            total, current = total + max(current, 1) * 1000, 0
        else:
            current += value
    return float(min(total + current, LARGEST))
