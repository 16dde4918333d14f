"""F1 of the facts in captions of synthetic scenes: the class of the scene, and the count of each kind of object.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("caption_facts")
    >>> figures = metric.compute(
    ...     predictions=["A harbor scene with 2 ships and 1 car.", "A desert scene with no objects."],
    ...     references=[["A harbor scene with 2 ships and 3 cars."], ["A desert scene with no objects."]],
    ...     class_names=["harbor", "desert"],
    ...     kinds={"ship": ["ship", "ships"], "car": ["car", "cars"]},
    ... )
    >>> round(figures["caption_facts"]["value"], 4), figures["caption_exact"]["value"]
    (0.8333, 0.5)
    >>> figures["parsed"]
    ['1 car, 2 ship, harbor scene', 'desert scene']

Limitations:
- Facts are parsed from fixed forms: "harbor scene" and "2 ships". The same fact in other words is not recognized.
- Words that state no fact are ignored, so that other text does not change the score.

Citation:
None: the metric belongs to the synthetic scenes of this package.
"""

import re

from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.metrics._answers import tidy
from mfrsvlm.evaluation.metrics._checked import SOME_TEXTS, TEXT, CheckedMetric


Facts = set[tuple[str, int]]


class CaptionFacts(CheckedMetric):
    """F1 score of the facts in captions.

    A fact is the class of the scene, or a kind of object with its count. A caption that names a kind twice with two counts
    states two facts, of which at most one is true. A caption without a fact scores 0.
    """

    prediction, reference = TEXT, SOME_TEXTS

    def _compute(self, predictions, references, class_names, kinds):
        """
        Args:
            predictions: list of captions, as generated.
            references: list of lists of true captions.
            class_names: classes of scenes; captions name them as "harbor scene".
            kinds: nouns for each kind of object: `{"ship": ["ship", "ships"]}`.

        Returns:
            caption_facts: mean F1 of the facts of each caption; of several references, the best.
            caption_exact: share of captions that equal a reference, except for case, surrounding space and a full stop.
            parsed: the parsed facts, in alphabetical order.
            scores: the F1 of each caption.
        """
        if not class_names or not kinds or not all(kinds.values()):
            raise ValueError(f"{self.name}: class_names and kinds must name at least one class, kind and noun each.")
        nouns = {noun.lower(): kind for kind, names in kinds.items() for noun in names}
        counts = re.compile(rf"\b([0-9]{{1,6}}) ({alternatives(nouns)})\b")
        classes = re.compile(rf"\b({alternatives(name.lower() for name in class_names)}) scene\b")

        def read(caption: str) -> Facts:
            text = caption.lower()
            found = {(nouns[noun], int(number)) for number, noun in counts.findall(text)}
            # The word "scene" distinguishes classes from kinds of objects.
            return found | {(f"{name} scene", 1) for name in classes.findall(text)}

        truths = [[read(text) for text in texts] for texts in references]
        for index, facts in enumerate(truths):
            if not all(facts):
                raise ValueError(f"{self.name}: references[{index}] states no fact: {references[index]}.")
        predicted = [read(caption) for caption in predictions]
        scores = [max(f1(facts, true) for true in group) for facts, group in zip(predicted, truths, strict=True)]
        exact = [
            float(bool(tidy(caption)) and tidy(caption) in map(tidy, texts))
            for caption, texts in zip(predictions, references, strict=True)
        ]
        return {
            "caption_facts": figure(scores),
            "caption_exact": figure(exact),
            "parsed": [", ".join(sorted(map(in_words, facts))) for facts in predicted],
            "scores": scores,
        }


def alternatives(words) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def f1(predicted: Facts, true: Facts) -> float:
    return 2 * len(predicted & true) / (len(predicted) + len(true)) if predicted else 0.0


def in_words(fact: tuple[str, int]) -> str:
    name, number = fact
    return name if name.endswith(" scene") else f"{number} {name}"
