"""What all metrics have in common: they refuse input that `evaluate` would let through or reject without saying why."""

from collections.abc import Sequence
from typing import Any

import evaluate


class CheckedMetric(evaluate.Metric):
    """A metric whose predictions and references are lists of the same length, with something in them."""

    def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> dict[str, Any]:
        """Figures, `parsed` and `scores`, see `mfrsvlm.evaluation.metrics`.

        Raises:
            ValueError: no predictions, another number of references, or a member that is `None` or of the wrong type.
        """
        for name, values in (("predictions", predictions), ("references", references)):
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ValueError(f"{self.name}: {name} must be a list, got {type(values).__name__}.")
            for index, value in enumerate(values):
                if value is None:
                    raise ValueError(f"{self.name}: {name}[{index}] is None. A model that said nothing said ''.")
        if not predictions:
            raise ValueError(f"{self.name}: there are no predictions.")
        if len(predictions) != len(references):
            raise ValueError(f"{self.name}: {len(predictions)} predictions but {len(references)} references.")
        return super().compute(predictions=list(predictions), references=list(references), **settings)
