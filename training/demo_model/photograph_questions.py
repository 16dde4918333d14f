"""Questions about photographs as rows to train on, with cached features of rotated and mirrored copies."""

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...evaluation.protocols import PROTOCOLS
from ...modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..branches import BranchCollator
from ..image_features import cache_image_features
from .photographs import PROTOCOL, TRANSFORMS, Photograph, Photographs, read_pixels, transform, transform_answer


# Other wordings than those of the harness, for people.
CLASS_WORDINGS = (
    "What is the class of this scene?",
    "What is the land use of this scene? Answer with one class.",
    "What kind of place is this?",
)
CAPTION_WORDINGS = ("Describe this image.", "What does this image show?", "Caption this image.")
OTHER_WORDING = 0.25  # share of questions that get one
LABELS = 5  # questions about labels in a row, of 17
# Weight of the answers in the loss, 1 for the others. The loss of an answer is the mean over its tokens.
ANSWER_WEIGHT = {"caption": 2.0, "count": 2.0, "location": 2.0}
ENCODED_AT_ONCE = 4


def turn(question: str, answer: str, weight: float = 1.0) -> list[dict[str, Any]]:
    """A question and its answer as chat messages."""
    return [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}], "weight": weight},
    ]


def make_turns(photograph: Photograph, photographs: Photographs, number: int, rng: random.Random) -> list[dict[str, Any]]:
    """One set of questions about a photograph that was transformed by `number`, see `transform`, as chat messages.

    Counts, labels and captions hold for every transform. Answers that name places change with it, see `transform_answer`.
    """

    def reword(prompt: str, wordings: Sequence[str]) -> str:
        return rng.choice(wordings) if rng.random() < OTHER_WORDING else prompt

    def bare(prompt: str) -> str:
        return reword(prompt, [prompt.split("\n")[0]])

    turns = turn(reword(photographs.class_prompt, CLASS_WORDINGS), photograph.scene_class)
    captions = Counter(photograph.captions)
    for caption, times in captions.items():
        turns += turn(reword(photographs.caption_prompt, CAPTION_WORDINGS), caption, ANSWER_WEIGHT["caption"] * times)
    labels = list(photograph.labels.items())
    for prompt, answer in rng.sample(labels, min(LABELS, len(labels))):
        turns += turn(bare(prompt), answer)
    for kind, prompt, answer in photograph.questions:
        there = transform_answer(answer, number, photographs.place_names)
        if there is not None:
            turns += turn(bare(prompt), there, ANSWER_WEIGHT.get(kind, 1.0))
    turns[0]["content"].insert(0, {"type": "image"})
    return turns


def photograph_dialogues(photographs: Photographs) -> Iterator[tuple[str, str]]:
    """All questions with their answers, in all wordings, once for every photograph that they are asked of."""
    suffix = f"\n{PROTOCOLS[PROTOCOL]().short_answer}"
    for item in photographs.items:
        yield photographs.class_prompt, item.scene_class
        yield from ((wording, item.scene_class) for wording in CLASS_WORDINGS)
        yield from ((photographs.caption_prompt, caption) for caption in item.captions)
        yield from ((wording, caption) for wording, caption in zip(CAPTION_WORDINGS, item.captions, strict=False))
        yield from ((prompt.removesuffix(suffix), answer) for prompt, answer in item.labels.items())
        yield from ((prompt, answer) for _, prompt, answer in item.questions)


def choose_transforms(count: int, copies: int, seed: int = 0) -> np.ndarray:
    """(count, copies): transforms of each photograph, all different; the first is the photograph itself."""
    rng = np.random.default_rng(seed)
    others = np.stack([1 + rng.permutation(TRANSFORMS - 1) for _ in range(count)])
    return np.concatenate([np.zeros((count, 1), dtype=np.int64), others], axis=1)[:, :copies]


class PhotographQuestions(Dataset[dict[str, Any]]):
    """Every copy of every photograph, with other questions in each of `rounds`.

    Args:
        photographs: the photographs.
        collator: encodes the rows.
        model: its encoder computes the features, unless they are in the file.
        path: cache file of the features, see `cache_image_features`.
        copies: rotated and mirrored copies of each photograph, the photograph itself included; at most 8.
        rounds: different sets of questions about each copy.
        side: of the photographs in pixels before the processor; default: that of the global view.
    """

    def __init__(
        self,
        photographs: Photographs,
        collator: BranchCollator,
        model: MFRSVLMForConditionalGeneration,
        path: Path,
        copies: int = 4,
        rounds: int = 8,
        side: int | None = None,
    ) -> None:
        self.side = side or model.config.image_size
        self.photographs, self.collator, self.copies, self.rounds = photographs, collator, copies, rounds
        self.transforms = choose_transforms(len(photographs.items), copies)
        # Rounding to bfloat16 changes features less than the augmentation does, and halves the time.
        with torch.autocast("cpu", torch.bfloat16):
            self.features = cache_image_features(model, self._pixels(), self.transforms.size, path)

    def _pixels(self) -> Iterator[torch.Tensor]:
        # All photographs at once: 21 classes of 100 take 400 MB.
        pixels = read_pixels(self.photographs.items, self.side)
        copies = [(index, number) for index, row in enumerate(self.transforms) for number in row]
        for start in range(0, len(copies), ENCODED_AT_ONCE):
            images = [
                Image.fromarray(transform(pixels[index], int(number)))
                for index, number in copies[start : start + ENCODED_AT_ONCE]
            ]
            packed = self.collator.processor.image_processor(images, return_tensors="np")["pixel_values"]
            yield torch.from_numpy(np.stack(list(packed)))

    def seen_by(self, collator: BranchCollator, features: np.ndarray) -> "PhotographQuestions":
        """The same questions with other features (N, 1 + K, T, C) of the same copies, for another model."""
        rows = copy.copy(self)
        rows.collator, rows.features = collator, features
        return rows

    def __len__(self) -> int:
        return self.transforms.size * self.rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} rows, so there is no number {index}.")
        place = index % self.transforms.size
        number, which = divmod(place, self.copies)
        turns = make_turns(
            self.photographs.items[number], self.photographs, int(self.transforms[number, which]), random.Random(index)
        )
        features = torch.from_numpy(np.array(self.features[place : place + 1])).float()
        return self.collator.encode(turns, image_features=features)
