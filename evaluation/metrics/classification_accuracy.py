"""Accuracy of scene classes in text answers: overall, mean over classes, and by class.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("classification_accuracy")
    >>> figures = metric.compute(
    ...     predictions=["Forest.", "This is a beach.", "beach", ""],
    ...     references=["forest", "beach", "beach", "forest"],
    ...     class_names=["forest", "beach", "river"],
    ... )
    >>> figures["accuracy"]
    {'value': 0.5, 'low': 0.0, 'high': 1.0, 'n': 4}
    >>> figures["parsed"]
    ['forest', '', 'beach', '']

Limitations:
- `"contained"` is RSEvalKit's rule: "a" is a part of "baseball field" and therefore correct. Use it only for comparison with
  results of RSEvalKit.
- `"first_mentioned"` parses "not a beach but a forest" as beach.
- Synonyms are wrong, such as "woodland" for "forest".
- Do not compare values of different rules.

Citation:
Rules: RSEvalKit (https://github.com/fitzpchao/RSEvalKit) for `contained`, GeoChat (Kuckreja et al., CVPR 2024) for
`without_spaces`.
"""

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._answers import ClassReader
from mfrsvlm.evaluation.metrics._checked import SOME_TEXT, TEXT, CheckedMetric
from mfrsvlm.evaluation.metrics._groups import by_group, mean_over_groups


class ClassificationAccuracy(CheckedMetric):
    """Share of answers that name the true class.

    The class is parsed from the answer and the list of all classes, without the reference.
    """

    prediction, reference = TEXT, SOME_TEXT

    def _compute(self, predictions, references, class_names=None, parsing="exact"):
        """
        Args:
            predictions: list of answers, as generated.
            references: list of true classes.
            class_names: all possible classes; default: the classes of the references.
            parsing: rule: "exact", "without_spaces", "contained" or "first_mentioned", see `ClassReader`.

        Returns:
            accuracy: share of correct answers.
            macro_accuracy: mean of the accuracies of the classes that occur in the references.
            per_class: accuracy of each of these classes.
            parsed: the parsed class, "" if none; with "contained", all names that contain the answer, joined by " | ".
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
