"""Attention mass: how much of its attention an answering position gives to the visual tokens, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..estimates import Estimate, ratio, sums_by_scene
from .reading import COUNT_EACH, Reading


def measure_attention(readings: Sequence[Reading]) -> dict[str, Any]:
    """Attention mass on visual tokens: means over all questions of all scenes, by layer, and by task and layer.

    Returns:
        Estimates `first` and `answer` (L,) and `uniform` (), see `Reading`, and `by_task`, a mean of `first` (L,) for
        every task.
    """
    scene_of_row, tasks, rows = [], [], []
    for index, reading in enumerate(readings):
        for question, first, answer, uniform in zip(
            reading.questions, reading.first_mass, reading.answer_mass, reading.uniform_mass, strict=True
        ):
            if question.task != COUNT_EACH:
                scene_of_row.append(index)
                tasks.append(question.task)
                rows.append(np.concatenate([first, answer, [uniform]]))
    values = np.array(rows, dtype=np.float64)  # (questions, 2 L + 1)
    num_layers = values.shape[1] // 2

    def mean(columns: np.ndarray) -> Estimate:
        num_scenes, scenes = len(readings), np.array(scene_of_row)
        return ratio(sums_by_scene(columns, scenes, num_scenes), sums_by_scene(np.ones_like(columns), scenes, num_scenes))

    by_task = {task: values[[t == task for t in tasks], :num_layers].mean(0) for task in dict.fromkeys(tasks)}
    return {
        "first": mean(values[:, :num_layers]),
        "answer": mean(values[:, num_layers:-1]),
        "uniform": mean(values[:, -1]),
        "by_task": by_task,
    }
