"""Linear probes: what can still be read from the hidden states, layer by layer.

From a visual token: how many objects have their center in its cell. From the last position of "How many ... are there?":
that number. Probes are fitted on scenes of the validation split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from ...scenes import KINDS, Scene
from ...scenes.questions import possible_kinds
from ..estimates import Estimate, r_squared
from ..linear_probe import linear_probe
from .reading import COUNT_EACH, Reading


SMALL = 12.0  # objects below this length, in pixels of a scene of 512, count as small


def auc(scores: np.ndarray, present: np.ndarray) -> float:
    """Area under the ROC curve, not a number where all rows are alike; (rows,) and (rows,) bool."""
    return float(roc_auc_score(present, scores)) if present.any() and not present.all() else math.nan


# Which objects a column of the targets counts.
OBJECTS: dict[str, Callable[[Any], bool]] = {
    "all": lambda item: True,
    "small": lambda item: item.length < SMALL,
    **{kind: lambda item, kind=kind: item.kind == kind for kind in KINDS},
}


def cell_counts(scene: Scene, side: int) -> np.ndarray:
    """How many objects have their center in each of side x side cells, row by row; (side * side, len(OBJECTS))."""
    counts = np.zeros((side, side, len(OBJECTS)))
    for item in scene.objects:
        row, column = (min(int(place / scene.size * side), side - 1) for place in (item.y, item.x))
        counts[row, column] += [wanted(item) for wanted in OBJECTS.values()]
    return counts.reshape(side * side, -1)


def probe_tokens(
    readings: Sequence[Reading], scenes: Sequence[Scene], test_readings: Sequence[Reading], test_scenes: Sequence[Scene]
) -> dict[str, Any]:
    """What the visual tokens still tell about their own cells.

    Returns:
        `count`: an estimate of R² (L + 1, len(OBJECTS)) for the number of objects in a token's cell, and `presence_auc`,
        the AUC (L + 1, len(OBJECTS)) for whether there is any.
    """
    layers, tokens = readings[0].visual_states.shape[:2]
    side = math.isqrt(tokens)
    counts, test_counts = (np.concatenate([cell_counts(s, side) for s in group]) for group in (scenes, test_scenes))
    targets = np.concatenate([counts, counts > 0], axis=1)
    scene_of_row = np.repeat(np.arange(len(scenes)), tokens)
    predicted = np.stack(
        [
            linear_probe(
                np.concatenate([reading.visual_states[layer] for reading in readings]),
                targets,
                scene_of_row,
                np.concatenate([reading.visual_states[layer] for reading in test_readings]),
            )
            for layer in range(layers)
        ],
        axis=1,
    )  # (test rows, L + 1, 2 * len(OBJECTS))
    number, presence = np.split(predicted, 2, axis=-1)
    true = np.broadcast_to(test_counts[:, None], number.shape)
    return {
        "count": r_squared(number, true, np.repeat(np.arange(len(test_scenes)), tokens)),
        "presence_auc": np.array(
            [
                [auc(presence[:, layer, column], test_counts[:, column] > 0) for column in range(len(OBJECTS))]
                for layer in range(layers)
            ]
        ),
    }


def probe_prompts(
    readings: Sequence[Reading], scenes: Sequence[Scene], test_readings: Sequence[Reading], test_scenes: Sequence[Scene]
) -> dict[str, Estimate]:
    """What the last position of "How many ... are there?" knows, whichever kind is asked for.

    Returns:
        `asked_count`: R² (L + 1,) for the number of the kind that the question asks for. Numbers are taken relative to the
        mean number of their kind, so that knowing the question is worth nothing. `any_count`: R² (L + 1, kinds) for the
        number of each kind, asked for or not.
    """

    def rows(readings: Sequence[Reading], scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
        states, counts, kinds, indices = [], [], [], []
        for index, (reading, scene) in enumerate(zip(readings, scenes, strict=True)):
            asked = [question.task == COUNT_EACH for question in reading.questions]
            states.append(reading.prompt_states[asked])
            kinds += possible_kinds(scene)
            counts += [list(scene.counts.values())] * sum(asked)
            indices += [index] * sum(asked)
        return np.concatenate(states), np.array(counts, dtype=np.float64), kinds, np.array(indices)

    states, counts, kinds, scene_of_row = rows(readings, scenes)
    test_states, test_counts, test_kinds, test_scene_of_row = rows(test_readings, test_scenes)
    usual = {kind: counts[[k == kind for k in kinds], i].mean() for i, kind in enumerate(KINDS) if kind in kinds}

    def with_asked(counts: np.ndarray, kinds: list[str]) -> np.ndarray:
        asked = [row[KINDS.index(kind)] - usual.get(kind, 0.0) for row, kind in zip(counts, kinds, strict=True)]
        return np.column_stack([asked, counts])

    targets, true = with_asked(counts, kinds), with_asked(test_counts, test_kinds)
    layers = range(states.shape[1])
    predicted = np.stack([linear_probe(states[:, i], targets, scene_of_row, test_states[:, i]) for i in layers], axis=1)
    score = r_squared(predicted, np.broadcast_to(true[:, None], predicted.shape), test_scene_of_row)
    return {
        "asked_count": Estimate(score.value[:, 0], score.resampled[..., 0]),
        "any_count": Estimate(score.value[:, 1:], score.resampled[..., 1:]),
    }
