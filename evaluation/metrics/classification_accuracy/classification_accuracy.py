"""Accuracy of a scene class that is answered in words: overall, as the mean over classes, and by class."""

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics.answers import ClassReader
from mfrsvlm.evaluation.metrics.checked_metric import SOME_TEXT, TEXT, CheckedMetric
from mfrsvlm.evaluation.metrics.groups import by_group, mean_over_groups


class ClassificationAccuracy(CheckedMetric):
    """How often the class that an answer names is the true one.

    Which class an answer names is read from the answer and the list of all classes by a rule, before the truth is looked at.
    """

    prediction, reference = TEXT, SOME_TEXT

    def _compute(self, predictions, references, class_names=None, parsing="exact"):
        """
        Args:
            predictions: list of answers, as the model gave them.
            references: list of true classes.
            class_names: all classes that could be answered; by default those of the references.
            parsing: how the class is read: "exact", "without_spaces", "contained" or "first_mentioned", see `ClassReader`.

        Returns:
            accuracy: share of right answers.
            macro_accuracy: mean of the accuracies of the classes that occur in the references.
            per_class: accuracy of each of these classes.
            parsed: the class that was read, "" if none; with "contained", all names the answer is part of, joined by " | ".
            scores: 1.0 or 0.0.
        """
        self.one_of("parsing", parsing, ClassReader.RULES)
        names = sorted(set(references)) if class_names is None else list(dict.fromkeys(class_names))
        if strange := sorted(set(references) - set(names)):
            raise ValueError(f"{self.name}: class_names lacks {len(strange)} classes of the references: {strange[:5]}.")
        reader = ClassReader(names, parsing)
        read = [reader.read(answer) for answer in predictions]
        scores = [float(truth in found) for truth, found in zip(references, read, strict=True)]
        return {
            "accuracy": figure(scores),
            "macro_accuracy": mean_over_groups(references, scores),
            "per_class": by_group(references, scores),
            "parsed": [" | ".join(found) for found in read],
            "scores": scores,
        }
