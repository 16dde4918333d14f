"""Accuracy on RSVQA: by type of question, mean over types (AA), and overall (OA), with the published bins of numbers.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("rsvqa_accuracy")
    >>> figures = metric.compute(
    ...     predictions=["Yes", "7", "12", "rural"],
    ...     references=["yes", "3", "9", "rural"],
    ...     question_types=["presence", "count", "count", "rural_urban"],
    ...     bins="lr",
    ... )
    >>> figures["accuracy"]["value"], figures["per_type"]["count"]["value"]
    (0.75, 0.5)
    >>> figures["parsed"]
    ['yes', 'between 0 and 10', 'between 10 and 100', 'rural']

Limitations:
- Counts in the same bin are equal, such as 11 and 99.
- Papers that skip counts and areas report other averages, which are not comparable.
- A number is parsed only if the answer contains nothing else; "about 7" and "seven" are wrong.

Citation:
Lobry, Marcos, Murray, Tuia: RSVQA: Visual Question Answering for Remote Sensing Data. IEEE Transactions on Geoscience and
Remote Sensing 58(12), 2020. Bins: `VQA_model/VocabEncoder.py` of https://github.com/syvlo/RSVQA.
"""

import re

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._answers import READERS, agrees, tidy
from mfrsvlm.evaluation.metrics._checked import SOME_TEXT, TEXT, CheckedMetric
from mfrsvlm.evaluation.metrics._groups import by_group, check_groups, mean_over_groups


NUMBER = r"(\d{1,3}(?:,\d{3})+|\d{1,12})"
UNIT = r"\s*(m2|m\^2|sqm|sq\.? ?m|square (?:met(?:er|re)s?))"
COUNT = re.compile(NUMBER)
AREA = re.compile(NUMBER + UNIT)
# The names of bins in the published script and in the paper ("between 11 and 100").
RANGE = re.compile(r"between (0|1|10|11|100|101)(?:m2)? and (10|100|1000)(m2)?")
MORE = re.compile(r"more than 1000(m2)?")
LOWER = {10: 0, 100: 10, 1000: 100}


class RSVQAAccuracy(CheckedMetric):
    """Share of correct answers to RSVQA's questions, with numbers compared in the bins of the published script.

    In that script (`VocabEncoder.py` of github.com/syvlo/RSVQA, for Lobry et al. 2020), two numbers are equal if both are 0,
    or both lie in the same bin of (0, 10], (10, 100], (100, 1000] and above 1000. It bins:

    - low resolution: counts;
    - high resolution: areas, which are written "17m2". Counts are compared exactly.

    A prediction may be a number or the name of a bin ("between 10 and 100", or as in the paper, "between 11 and 100"). In
    answers to questions about areas, the unit may be missing. "square meters" and similar units equal m2.
    """

    prediction, reference = TEXT, SOME_TEXT

    def _compute(self, predictions, references, question_types, parsing="exact", bins="lr"):
        """
        Args:
            predictions: list of answers, as generated.
            references: list of answers as published, such as "yes", "rural", "3" or "17m2".
            question_types: one for each question: "presence", "count", "comp", "rural_urban" or "area".
            parsing: how other answers than numbers are compared: "exact", "without_spaces" or "contained", see
                `vqa_accuracy`. Numbers must be equal or in the same bin.
            bins: "lr" or "hr", the data set, which determines what is binned.

        Returns:
            accuracy: share of correct answers, the papers' OA.
            average_accuracy: mean of the accuracies of the types that occur, the papers' AA.
            per_type: accuracy of each type.
            parsed: the bin of the number, or the normalized answer, which may be "".
            scores: 1.0 or 0.0.
        """
        self.one_of("parsing", parsing, [rule for rule in READERS if rule != "letter"])
        self.one_of("bins", bins, ("lr", "hr"))
        check_groups(self.name, "question_types", question_types, len(predictions))
        truths = [self._read(text, kind, parsing, bins) for text, kind in zip(references, question_types, strict=True)]
        for index, (truth, _) in enumerate(truths):
            if not truth:
                raise ValueError(
                    f"{self.name}: references[{index}] is {references[index]!r}, of which {parsing!r} leaves nothing."
                )
        answers = [self._read(text, kind, parsing, bins) for text, kind in zip(predictions, question_types, strict=True)]
        scores = [
            float(answer == truth if answer_is_number or truth_is_number else agrees(parsing, answer, truth))
            for (answer, answer_is_number), (truth, truth_is_number) in zip(answers, truths, strict=True)
        ]
        return {
            "accuracy": figure(scores),
            "average_accuracy": mean_over_groups(question_types, scores),
            "per_type": by_group(question_types, scores),
            "parsed": [answer for answer, _ in answers],
            "scores": scores,
        }

    @staticmethod
    def _read(text: str, question_type: str, parsing: str, bins: str) -> tuple[str, bool]:
        """The normalized answer, and whether it is a number (or the name of a bin)."""
        plain = tidy(text)
        if bins == "hr" and (match := AREA.fullmatch(plain) or (question_type == "area" and COUNT.fullmatch(plain))):
            return interval(int(match[1].replace(",", "")), "m2"), True
        if match := COUNT.fullmatch(plain):
            number = int(match[1].replace(",", ""))
            return interval(number) if bins == "lr" else str(number), True
        unit = "m2" if bins == "hr" else ""  # HR bins areas, LR bins counts
        if match := RANGE.fullmatch(plain):
            upper = int(match[2])
            if int(match[1]) - LOWER[upper] in (0, 1) and (match[3] or unit) == unit:
                return interval(upper, unit), True
        elif (match := MORE.fullmatch(plain)) and (match[1] or unit) == unit:
            return interval(1001, unit), True
        return READERS[parsing](text), False


def interval(number: int, unit: str = "") -> str:
    """The name of the bin of a number in the published script."""
    if number == 0:
        return f"0{unit}"
    for upper, lower in LOWER.items():
        if number <= upper:
            return f"between {lower}{unit} and {upper}{unit}"
    return f"more than 1000{unit}"
