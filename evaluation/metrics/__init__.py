"""Metrics for the `evaluate` library, one file each: `evaluate.load("…/metrics/counting.py")` takes it as it is.

    from mfrsvlm.evaluation.metrics import load_metric

    load_metric("counting").compute(predictions=["3", "none"], references=[3, 0])

Every figure is a dictionary of `value`, `low` and `high` (its 95 % bootstrap interval) and `n`, the number of samples.
Beside
the figures, `parsed` holds what was read from each prediction and `scores` what it scored, in the order of the predictions.

`evaluate` copies a metric to its cache and imports the copy. A metric therefore imports the package by its name, and never
relatively. Files whose name begins with `_` are shared by metrics.
"""

from pathlib import Path
from typing import Any

import evaluate


FOLDER = Path(__file__).parent
METRICS = tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.py")))


def load_metric(name: str) -> Any:
    """A metric of this folder, without network.

    Raises:
        ValueError: no metric has this name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return evaluate.load(str(FOLDER / f"{name}.py"), keep_in_memory=True)
