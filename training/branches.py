"""Packs independent questions about one image into one row, so that the image is processed once.

An image has far more tokens than a question. `BranchCollator` packs the turns of a conversation after one copy of the image.
Every question with its answer is a *branch*. It attends to the image and to itself, and to no other branch. The result for a
branch equals that of a separate conversation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from .collator import IGNORED
from .data import BadRow, open_images, to_messages


# Placeholders for question and answer in a rendered prompt. Texts contain no null characters.
QUESTION, ANSWER = "\0question\0", "\0answer\0"


class BranchCollator:
    """Encodes conversations as branches after one image and pads them to a batch.

    Images belong to the first user turn, and all questions share them. Labels cover the answers. The loss of an answer is
    averaged over its tokens and multiplied by the `weight` of its assistant message (default: 1).

    Args:
        processor: an `MFRSVLMProcessor` with inline placement of images.
        image_root: folder that must contain the images of rows, see `open_image`. `None`: no restriction.
        max_length: maximum length of a row in tokens, including visual tokens. `None`: no limit.

    Raises:
        ValueError: the processor puts images before the text ("prefix" placement).
    """

    def __init__(self, processor: Any, image_root: Any = None, max_length: int | None = None) -> None:
        if processor.image_placement != "inline":
            raise ValueError(
                f"image_placement={processor.image_placement!r}: branches share the tokens before the question, which needs "
                '"inline". Use ConversationCollator.'
            )
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_root, self.max_length = image_root, max_length
        self.templates: dict[tuple[str | None, int], tuple[str, ...]] = {}

    def _template(self, system: str | None, num_images: int) -> tuple[str, ...]:
        """The text of the chat template before and after the question, and before and after the answer."""
        if (system, num_images) not in self.templates:
            messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
            content = [*[{"type": "image"}] * num_images, {"type": "text", "text": QUESTION}]
            messages.append({"role": "user", "content": content})
            prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER}]})
            answer = self.processor.apply_chat_template(messages).removeprefix(prompt)
            self.templates[system, num_images] = (*prompt.split(QUESTION), *answer.split(ANSWER))
        return self.templates[system, num_images]

    def encode(self, messages: Sequence[Mapping[str, Any]], **inputs: Any) -> dict[str, Any]:
        """Encodes one conversation.

        Args:
            messages: chat messages of content parts, questions and answers in turn, after at most one system message. A user
                message may have `marks`: (end, number) of words of its text, where `end` is the offset after the word.
            **inputs: added to the sample, such as `image_features` (N, 1 + K, T, C). With them, or with `pixel_values`,
                images are not opened.

        Returns:
            `prefix`, the common ids of all branches; `branches`, a list of (prompt ids, answer ids, weight, marks), with
            marks as (position in the branch, number); for N > 0 images `pixel_values` (N, L) unless given; and `inputs`.

        Raises:
            BadRow: an image outside the first user turn, an answer without loss, or a row longer than `max_length`.
        """
        system = None
        if messages[0]["role"] == "system":
            system = "".join(part["text"] for part in messages[0]["content"])
            messages = messages[1:]
        questions, answers = messages[::2], messages[1::2]
        num_images = sum(part["type"] == "image" for part in questions[0]["content"])
        for number, question in enumerate(questions[1:], start=2):
            if any(part["type"] == "image" for part in question["content"]):
                raise BadRow(f"question {number} has an image: in branches, all images belong to the first question.")
        if not all(answer.get("learn", True) for answer in answers):
            raise BadRow("it has an answer without loss, which branches cannot use as context, since they are independent.")
        before, between, opening, closing = self._template(system, num_images)
        asked = ["".join(part["text"] for part in message["content"] if part["type"] == "text") for message in questions]
        answered = ["".join(part["text"] for part in message["content"]) for message in answers]
        prompts = [f"{before}{question}{between}" for question in asked]
        texts = [f"{p}{opening}{answer}{closing}" for p, answer in zip(prompts, answered, strict=True)]
        written = bool(self.tokenizer.bos_token) and before.startswith(self.tokenizer.bos_token)
        encodings = self.tokenizer(texts, add_special_tokens=not written, return_offsets_mapping=True)

        rows, starts, offsets = encodings["input_ids"], [], encodings["offset_mapping"]
        for prompt, pairs in zip(prompts, offsets, strict=True):
            starts.append(next(i for i, (_, end) in enumerate(pairs) if end > len(prompt)))
        shared = sum(end <= len(before) for _, end in offsets[0])
        while shared and any(row[:shared] != rows[0][:shared] for row in rows):
            shared -= 1  # the token also covers a part of the question
        sample: dict[str, Any] = {"prefix": self._expand(rows[0][:shared]), "branches": [], **inputs}
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            marks = [
                (encodings.char_to_token(index, len(before) + end - 1) - shared, number)
                for end, number in questions[index].get("marks", ())
            ]
            sample["branches"].append((row[shared:start], row[start:], answers[index].get("weight", 1.0), marks))
        length = len(sample["prefix"]) + sum(len(prompt) + len(answer) for prompt, answer, _, _ in sample["branches"])
        if self.max_length is not None and length > self.max_length:
            raise BadRow(f"its {len(rows)} questions have {length} tokens, but max_length={self.max_length}. Split the row.")
        if num_images and not {"pixel_values", "image_features"} & set(inputs):
            opened = [dict(message) for message in questions[:1]]
            open_images(opened, self.image_root)
            images = [part["image"] for part in opened[0]["content"] if part["type"] == "image"]
            pixels = self.processor.image_processor(images, return_tensors="np")["pixel_values"]
            sample["pixel_values"] = torch.from_numpy(np.stack(list(pixels)))
        return sample

    def _expand(self, ids: list[int]) -> list[int]:
        """The ids with each placeholder repeated once per visual token of an image."""
        image, tokens = self.processor.image_token_id, self.processor.image_processor.num_image_tokens
        return [token for each in ids for token in ([each] * tokens if each == image else [each])]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Packs and pads samples on the right.

        Args:
            samples: what `encode` returns, or rows (see `training.data`), which are encoded here.

        Returns:
            `input_ids` and `position_ids` (B, S); `attention_mask` (B, 1, S, S) bool; `labels` (B, S), -100 for positions
            without loss; `loss_weights` (B, S); `marks` (n, 3), row of the batch, position and number of every marked
            word; `prefix_lengths` (B,). `pixel_values` (N, L) or `image_features` (N, 1 + K, T, C) of all images. Further
            inputs of the samples as lists of length B.
        """
        samples = [sample if "branches" in sample else self.encode(to_messages(sample)) for sample in samples]
        lengths = [len(s["prefix"]) + sum(len(p) + len(a) for p, a, _, _ in s["branches"]) for s in samples]
        shape = (len(samples), -(-max(lengths) // 16) * 16)
        ids, labels = np.full(shape, self.tokenizer.pad_token_id), np.full(shape, IGNORED)
        positions, segments = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
        weights = np.zeros(shape, dtype=np.float32)
        marks: list[tuple[int, int, int]] = []
        for row, sample in enumerate(samples):
            at = start = len(sample["prefix"])
            ids[row, :start], segments[row, :start], positions[row, :start] = sample["prefix"], 0, np.arange(start)
            for number, (prompt, answer, weight, marked) in enumerate(sample["branches"], start=1):
                first, end = at + len(prompt), at + len(prompt) + len(answer)
                ids[row, at:first], ids[row, first:end], segments[row, at:end] = prompt, answer, number
                positions[row, at:end] = np.arange(start, start + end - at)
                labels[row, first:end], weights[row, first:end] = answer, weight / len(answer)
                marks += [(row, at + token, number) for token, number in marked]
                at = end
        segment = torch.from_numpy(segments)
        visible = (segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": (visible & torch.ones(shape[1], shape[1], dtype=torch.bool).tril())[:, None],
            "labels": torch.from_numpy(labels),
            "loss_weights": torch.from_numpy(weights),
            "marks": torch.tensor(marks, dtype=torch.long).reshape(-1, 3),
            "prefix_lengths": torch.tensor([len(sample["prefix"]) for sample in samples]),
        }
        for name in dict.fromkeys(name for sample in samples for name in sample if name not in ("prefix", "branches")):
            given = [sample.get(name) for sample in samples]
            images = name in ("pixel_values", "image_features")
            batch[name] = torch.cat([each for each in given if each is not None]) if images else given
        if "pixel_values" in batch and "image_features" in batch:
            raise ValueError("A batch has both pixels and cached features: cache the features of all rows, or of none.")
        return batch


def short_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a few hundred tokens, (B, H, S, d), in the precision of the values. Keys may have fewer heads.

    On CPUs, it takes half the time of `scaled_dot_product_attention`, whose backward pass in bfloat16 is slow there.
    """
    batch, heads = query.shape[:2]
    with torch.autocast(value.device.type, enabled=False):  # autocast would compute the softmax in float32
        bias = torch.zeros_like(attention_mask, dtype=value.dtype).masked_fill(~attention_mask, -torch.inf)
        bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)  # (B * H, S, S)
        if key.shape[1] < heads:
            key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
        query, key, value = (states.to(value.dtype).flatten(0, 1) for states in (query, key, value))
        weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling).softmax(-1)
        states = torch.bmm(weights, value)
    return states.unflatten(0, (batch, heads)).transpose(1, 2), None


AttentionInterface.register("short", short_attention)
