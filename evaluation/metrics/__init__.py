"""Metrics for the `evaluate` library, one file each: `evaluate.load("…/metrics/counting.py")` loads one.

    from mfrsvlm.evaluation.metrics import load_metric

    load_metric("counting").compute(predictions=["3", "none"], references=[3, 0])

Every figure is a dictionary of `value`, `low` and `high` (its 95 % bootstrap interval) and `n`, the number of samples. In
addition to the figures, a metric returns `parsed`, the parsed predictions, and `scores`, their scores, in the order of the
predictions.

`evaluate` copies a metric to its cache and imports the copy. A metric therefore uses absolute imports. Files whose name
begins with `_` are shared by metrics.
"""

from pathlib import Path
from typing import Any

import evaluate


FOLDER = Path(__file__).parent
METRICS = tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.py")))


def load_metric(name: str) -> Any:
    """Loads a metric of this folder, without network access.

    Raises:
        ValueError: no metric has this name.
    """
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. Metrics are {', '.join(METRICS)}.")
    return evaluate.load(str(FOLDER / f"{name}.py"), keep_in_memory=True)
