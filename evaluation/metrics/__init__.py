"""Metrics as local modules of the `evaluate` library: one folder each, which can be pushed as a metric Space.

    from mfrsvlm.evaluation.metrics import load_metric

    load_metric("counting").compute(predictions=["3", "none"], references=[3, 0])

Every figure is a dictionary of value, low, high (the 95 % bootstrap interval) and n. Beside the figures, `parsed` and
`scores` tell what was read from each prediction and what it scored, in the order of the predictions.
"""

from pathlib import Path
from typing import Any

import evaluate


METRICS = (
    "captioning",
    "classification_accuracy",
    "counting",
    "rsvqa_accuracy",
    "visual_grounding",
    "vqa_accuracy",
    "yes_no_calibration",
)


def load_metric(name: str) -> Any:
    """A metric of this folder, without network.

    Raises:
        ValueError: no metric has this name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
