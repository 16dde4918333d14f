"""Accuracy of short answers to open or multiple-choice questions: overall, mean over types, and by type.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("vqa_accuracy")
    >>> figures = metric.compute(
    ...     predictions=["Red.", "two", "", "soccer field"],
    ...     references=[["red", "dark red"], ["2"], ["north"], ["soccer field"]],
    ...     question_types=["color", "quantity", "position", "category"],
    ... )
    >>> figures["accuracy"]
    {'value': 0.5, 'low': 0.0, 'high': 1.0, 'n': 4}
    >>> metric.compute(predictions=["B. forest", "Clearly A"], references=[["B"], ["A"]], parsing="letter")["scores"]
    [1.0, 0.0]

Limitations:
- Paraphrases are wrong, and so is "two" for "2". Scores that a language model gave are higher and not comparable.
- An answer scores 1 or 0. VQA v2 weighs it by how many of ten people gave it.
- With `"letter"`, "A ship" is parsed as option A.

Citation:
Rules: RSEvalKit (https://github.com/fitzpchao/RSEvalKit) for `contained` and `letter`, GeoChat (Kuckreja et al., CVPR
2024) for `without_spaces`.
"""

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._answers import READERS, agrees
from mfrsvlm.evaluation.metrics._checked import SOME_TEXTS, TEXT, CheckedMetric
from mfrsvlm.evaluation.metrics._groups import by_group, check_groups, mean_over_groups


class VQAAccuracy(CheckedMetric):
    """Share of answers that equal one of the reference answers after normalization.

    An answer scores 1 or 0, no matter how many references it equals. This is not the accuracy of VQA v2, which weighs an
    answer by how many of ten people gave it.
    """

    prediction, reference = TEXT, SOME_TEXTS

    def _compute(self, predictions, references, question_types=None, parsing="exact"):
        """
        Args:
            predictions: list of answers, as generated.
            references: list of lists of correct answers.
            question_types: one for each question; `None`: no figures by type.
            parsing: "exact" (except for case, surrounding space and a full stop), "without_spaces" (the same after removal
                of all spaces and full stops), "contained" (a reference contains the answer, in lower case and without
                spaces), or "letter" (the letter of an option at the beginning of the answer).

        Returns:
            accuracy: share of correct answers.
            average_accuracy, per_type: mean of the accuracies of the types, and those accuracies.
            parsed: the normalized answer, which may be "".
            scores: 1.0 or 0.0.
        """
        self.one_of("parsing", parsing, READERS)
        read = READERS[parsing]
        truths = [[read(text) for text in texts] for texts in references]
        for index, texts in enumerate(truths):
            if not all(texts):
                raise ValueError(
                    f"{self.name}: references[{index}] is {references[index]}, of which the rule {parsing!r} leaves nothing."
                )
        parsed = [read(answer) for answer in predictions]
        scores = [
            float(any(agrees(parsing, answer, truth) for truth in texts))
            for answer, texts in zip(parsed, truths, strict=True)
        ]
        figures = {"accuracy": figure(scores)}
        if question_types is not None:
            check_groups(self.name, "question_types", question_types, len(scores))
            figures["average_accuracy"] = mean_over_groups(question_types, scores)
            figures["per_type"] = by_group(question_types, scores)
        return {**figures, "parsed": parsed, "scores": scores}
