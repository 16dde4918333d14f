"""The base class of all metrics. It rejects input that `evaluate` would accept, or reject without a clear error."""

import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
from datasets import Features, List, Value

from mfrsvlm.files.reading import shorten


# The first characters of an answer that are scored. Alignments of captions take time that grows faster than their length.
SCORED_CHARACTERS = 4_000


@dataclass(frozen=True)
class Kind:
    """The type of predictions or references.

    Attributes:
        name: description for errors.
        feature: feature of `datasets` for storage.
        accepts: function that returns whether a value has this type.
    """

    name: str
    feature: Any
    accepts: Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether this is a finite number. `True` and `False` do not count as numbers."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_box(value: Any) -> bool:
    return is_list(value) and len(value) in (4, 8) and all(map(is_number, value))


def is_point(value: Any) -> bool:
    return is_list(value) and len(value) == 2 and all(map(is_number, value))


TEXT = Kind("text", Value("string"), is_text)
SOME_TEXT = Kind("text that is not blank", Value("string"), lambda value: is_text(value) and bool(value.strip()))
SOME_TEXTS = Kind(
    "a list of at least one text, none of them blank",
    List(Value("string")),
    lambda value: is_list(value) and len(value) > 0 and all(map(SOME_TEXT.accepts, value)),
)
BOXES = Kind(
    "a list of boxes, each of 4 or 8 finite numbers",
    List(List(Value("float64"))),
    lambda value: is_list(value) and all(map(is_box, value)),
)
SOME_BOXES = Kind(
    "a list of at least one box, each of 4 or 8 finite numbers",
    BOXES.feature,
    lambda value: BOXES.accepts(value) and len(value) > 0,
)
BOXES_OR_NONE = Kind(f"{BOXES.name}, or None", BOXES.feature, lambda value: value is None or BOXES.accepts(value))
POINTS_OR_NONE = Kind(
    "a list of points, each of 2 finite numbers, or None",
    BOXES.feature,
    lambda value: value is None or (is_list(value) and all(map(is_point, value))),
)
COUNT = Kind(
    "a whole number from 0 to a thousand million",
    Value("int64"),
    lambda value: is_number(value) and value == int(value) and 0 <= value <= 10**9,
)
PROBABILITY = Kind("a number from 0 to 1", Value("float64"), lambda value: is_number(value) and 0 <= value <= 1)
YES_OR_NO = Kind("'yes' or 'no'", Value("string"), lambda value: is_text(value) and value in ("yes", "no"))


# Abstract, so that `evaluate`, which takes the first class of a module that is not abstract, skips it.
class CheckedMetric(evaluate.Metric, ABC):
    """A metric whose predictions and references are non-empty lists of the same length.

    Of a predicted text, the first `SCORED_CHARACTERS` are scored.

    The docstring of its module is its documentation: an example, limitations, and the citation at the end.
    """

    prediction: Kind
    reference: Kind

    def _info(self) -> evaluate.MetricInfo:
        page, _, citation = inspect.getmodule(type(self)).__doc__.partition("\nCitation:\n")
        return evaluate.MetricInfo(
            description=f"{page}\n{inspect.getdoc(type(self))}\n",
            citation=citation,
            inputs_description=inspect.getdoc(self._compute),
            features=Features(predictions=self.prediction.feature, references=self.reference.feature),
        )

    @abstractmethod
    def _compute(self, predictions: list[Any], references: list[Any], **settings: Any) -> dict[str, Any]: ...

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one prediction and its reference. Call `compute()` without arguments afterwards.

        Raises:
            ValueError: see `compute`.
        """
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds predictions and their references. Call `compute()` without arguments afterwards.

        Raises:
            ValueError: see `compute`.
        """
        kinds = {"predictions": self.prediction, "references": self.reference}
        given = {"predictions": predictions, "references": references}
        for name, values in given.items():
            if not is_list(values):
                raise ValueError(f"{self.name}: {name} must be a list, got {type(values).__name__}.")
        if not predictions:
            raise ValueError(f"{self.name}: there are no predictions.")
        if len(predictions) != len(references):
            raise ValueError(f"{self.name}: {len(predictions)} predictions but {len(references)} references.")
        for name, values in given.items():
            for index, value in enumerate(values):
                if not kinds[name].accepts(value):
                    raise ValueError(
                        f"{self.name}: {name}[{index}] is {shorten(value)}, not {kinds[name].name}.{hint(value)}"
                    )
        scored = [value[:SCORED_CHARACTERS] if is_text(value) else value for value in predictions]
        super().add_batch(predictions=scored, references=list(references), **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> dict[str, Any]:
        """Figures, `parsed` and `scores`, see `mfrsvlm.evaluation.metrics`.

        Raises:
            ValueError: no predictions, another number of references, a value that is `None` or of the wrong type, or an
                unknown or invalid setting.
        """
        if predictions is None and references is None and not len(self):
            raise ValueError(f"{self.name}: there are no predictions.")
        known = list(inspect.signature(self._compute).parameters)[2:]
        for setting in settings:
            if setting not in known:
                raise ValueError(f"{self.name}: unknown setting {setting!r}; settings are {', '.join(known) or 'none'}.")
        return super().compute(predictions=predictions, references=references, **settings)

    def one_of(self, setting: str, value: Any, known: Sequence[str]) -> None:
        """Raises ValueError if a setting has an unknown value."""
        if value not in known:
            raise ValueError(f"{self.name}: {setting}={value!r} is not one of {', '.join(known)}.")


def hint(value: Any) -> str:
    return " Pass '' for an empty answer." if value is None else ""
