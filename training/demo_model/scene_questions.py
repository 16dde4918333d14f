"""Questions about synthetic scenes as rows to train on."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...scenes import KINDS, Question, Scene, ask
from ...scenes.questions import PLURALS
from ..branches import BranchCollator
from .guidance import known_objects
from .scene_images import SceneImages


# How often a task is asked of a scene; counts and boxes are learned last.
MIX = {
    "classification": 1,
    "area": 1,
    "presence": 1,
    "count": 3,
    "comparison": 1,
    "position": 2,
    "grounding": 6,
    "caption": 1,
}
# The same with lists of boxes and points, which are long: a row has twice as many tokens.
MIX_WITH_LISTS = MIX | {"count": 3, "position": 1, "grounding": 2, "detection": 2, "pointing": 1}
# Weight of a task's answer in the loss, 1 for the others.
ANSWER_WEIGHT = {"grounding": 4.0, "caption": 3.0, "detection": 8.0, "pointing": 3.0}
NOUNS = {noun: number for number, kind in enumerate(KINDS) for noun in (kind, PLURALS[kind])}
NOUN = re.compile(rf"\b({'|'.join(sorted(NOUNS, key=len, reverse=True))})\b")


def dialogues(scenes: Iterable[Scene]) -> Iterator[tuple[str, str]]:
    """One question of every task about each scene, and its answer."""
    return ((question.text, question.answer) for scene in scenes for question in ask(scene))


def to_turns(question: Question) -> list[dict[str, Any]]:
    """Question and answer as chat messages, with the nouns marked by their kind and the weight of the task."""
    marks = [(noun.end(), NOUNS[noun.group()]) for noun in NOUN.finditer(question.text)]
    return [
        {"role": "user", "content": [{"type": "text", "text": question.text}], "marks": marks},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": question.answer}],
            "weight": ANSWER_WEIGHT.get(question.task, 1.0),
        },
    ]


class SceneQuestions(Dataset):
    """Every scene `rounds` times, each time with other questions.

    Args:
        images: the scenes.
        collator: encodes the rows.
        config: of the model.
        features: (scenes, 1 + K, T, C) of `cache_image_features`; without them, rows hold pixels.
        rounds: different sets of questions about each scene.
        mix: how often each task is asked of a scene.
        canvas_source: see `MFRSVLMImageProcessor`; used without features.
    """

    def __init__(
        self,
        images: SceneImages,
        collator: BranchCollator,
        config: Any,
        features: np.ndarray | None = None,
        rounds: int = 3,
        mix: dict[str, int] = MIX,
        canvas_source: str = "image",
    ) -> None:
        self.images, self.collator, self.config, self.features, self.rounds = images, collator, config, features, rounds
        self.tasks = [task for task, times in mix.items() for _ in range(times)]
        self.canvas_source = canvas_source

    def __len__(self) -> int:
        return len(self.images) * self.rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} rows, so there is no number {index}.")
        round_, number = divmod(index, len(self.images))
        scene = self.images.scenes[number]
        turns = [turn for question in ask(scene, self.tasks, seed=round_) for turn in to_turns(question)]
        turns[0]["content"].insert(0, {"type": "image"})
        if self.features is None:
            pixels = self.images.pixel_values(number, number + 1, self.config, self.canvas_source)
            inputs = {"pixel_values": pixels}
        else:
            inputs = {"image_features": torch.from_numpy(np.array(self.features[number : number + 1])).float()}
        return self.collator.encode(turns, objects=known_objects(scene, self.config.tokens_per_side), **inputs)
