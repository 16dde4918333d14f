"""Encodes conversations to batches: ids, labels of the answers, and pixels."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .data import BadRow, open_images, to_messages


IGNORED = -100  # label of a position without loss


class ConversationCollator:
    """Encodes conversations with a processor and pads them to a batch.

    Labels cover the answers, from the space after "ASSISTANT:" to the end-of-sequence token, as in training of the
    published model. For a prompt and its completion, they cover the completion only. Samples with and without images may be
    mixed.

    Args:
        processor: an `MFRSVLMProcessor`.
        template: `"chat"`, the processor's chat template; or `"plain"`, for captions: the image tokens, the answer and a
            line break, with the loss on the last two. The user message is dropped.
        prompt_version: version of the prompt in the chat template; `"v1"` is that of the published training. `None`: the
            default of the template.
        max_length: maximum length of a sample in tokens, including image tokens. Longer text is truncated; image tokens
            never are. `None`: no limit.
        pad_to_multiple_of: pads the length of batches to a multiple of this.
        image_root: folder that must contain the images of rows, see `open_image`. `None`: no restriction.
    """

    def __init__(
        self,
        processor: Any,
        template: str = "chat",
        prompt_version: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        if template not in ("chat", "plain"):
            raise ValueError(f"template={template!r} must be 'chat' or 'plain'.")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} leaves no space for an answer.")
        self.processor = processor
        self.template = template
        self.prompt_version = prompt_version
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.image_root = image_root

    def encode(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Encodes one conversation.

        Args:
            messages: chat messages; images as parts that `open_image` takes, or opened by `ConversationDataset`.
                Assistant messages with `"learn": False` have no labels.

        Returns:
            `input_ids` and `labels`, lists of S numbers, and for N > 0 images `pixel_values` (N, L), one row per image.

        Raises:
            BadRow: the images alone exceed `max_length`, all answers are truncated, or the conversation does not fit the
                template.
            ValueError: an image cannot be read.
        """
        learned = [message.get("learn", True) for message in messages if message["role"] == "assistant"]
        messages = [{key: value for key, value in message.items() if key != "learn"} for message in messages]
        open_images(messages, self.image_root)
        if self.template == "plain":
            ids, answer, outputs = self._encode_plain(messages)
        else:
            version = {} if self.prompt_version is None else {"prompt_version": self.prompt_version}
            outputs = self.processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **version
            )
            ids, answer = np.array(outputs["input_ids"][0]), np.array(outputs["assistant_masks"][0], dtype=bool)
            answer = _keep_runs(answer, learned)

        is_image = ids == self.processor.image_token_id
        if self.max_length is not None and len(ids) > self.max_length:
            room = self.max_length - is_image.sum()
            if room < 1:
                raise BadRow(
                    f"its images alone have {is_image.sum()} tokens, so max_length={self.max_length} leaves no space for "
                    "text. Raise max_length."
                )
            keep = is_image | (np.cumsum(~is_image) <= room)
            ids, answer = ids[keep], answer[keep]
        if not answer.any():
            raise BadRow(f"max_length={self.max_length} truncates all answers. Raise it or shorten the text.")
        sample = {"input_ids": ids.tolist(), "labels": np.where(answer, ids, IGNORED).tolist()}
        for name in self.processor.image_processor.model_input_names:
            if outputs.get(name) is not None:
                sample[name] = torch.from_numpy(np.stack(outputs[name]))
        return sample

    def _encode_plain(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Ids and answer mask of images and a caption, with what the processor returned."""
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            raise BadRow(f"template='plain' takes one caption, a question and its answer, but the turns are {roles}.")
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        if not images:
            raise BadRow("template='plain' takes a caption of an image, but there is no image.")
        caption = "".join(part["text"] for part in messages[1]["content"])
        outputs = self.processor(images=images, text=self.processor.image_token * len(images) + caption + "\n")
        ids = np.array(outputs["input_ids"][0])
        return ids, ~np.isin(ids, [self.processor.image_token_id, self.processor.tokenizer.bos_token_id]), outputs

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pads samples on the right.

        Args:
            samples: what `encode` returns, or rows (see `training.data`), which are encoded here.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, S), and the pixels of all images of the batch, if it has any.
        """
        samples = [sample if "input_ids" in sample else self.encode(to_messages(sample)) for sample in samples]
        batch = self.processor.tokenizer.pad(
            {"input_ids": [sample["input_ids"] for sample in samples]},
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, sample in zip(labels, samples, strict=True):
            row[: len(sample["labels"])] = torch.tensor(sample["labels"])
        tensors = {**batch, "labels": labels}
        for name in self.processor.image_processor.model_input_names:
            images = [sample[name] for sample in samples if name in sample]
            if images:
                tensors[name] = torch.cat(images)
        return tensors


def _keep_runs(mask: np.ndarray, kept: Sequence[bool]) -> np.ndarray:
    """A copy of a mask in which only the runs of true values with `kept[i]` remain."""
    if all(kept):
        return mask
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    if starts.sum() != len(kept):
        raise BadRow(f"the chat template marks {starts.sum()} answers, but the conversation has {len(kept)}.")
    return mask & np.concatenate([[False], kept])[np.cumsum(starts)]
