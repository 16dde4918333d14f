"""Conversations to train on: rows of a JSON or JSONL file or of a `datasets` object, checked, as chat messages.

A row holds one conversation about any number of images:

    {"id": "7", "image": "a.png", "source_dataset": "...", "conversations": [
        {"from": "human", "value": "<image>\\nIs there a river?"}, {"from": "gpt", "value": "Yes."}]}

or the same in the format of chat templates, with `messages`, each of a `role` and a `content` (text with `<image>`
markers, or a list of parts). `image` or `images` is a path or a list of paths; in a `datasets` object also an image.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset

from ..image_sources_mfrsvlm import open_image


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"  # the marker in the text of a row, whatever the tokenizer calls its own
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row that cannot be trained on. The message says why, and in a dataset also which row."""


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Any], list[int] | None]:
    """Reads a JSON list or, if the name ends in `.jsonl`, one JSON value a line.

    Returns:
        The rows and, for JSONL, the line number of each. A line that is no JSON stands as the error it gave.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, not a list, or holds no rows.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Convert it first.") from error
    lines = None
    if path.suffix == ".jsonl":
        rows, lines = [], []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            lines.append(number)
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(BadRow(f"it is not JSON: {error}"))
    else:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}. For one JSON value a line, name the file *.jsonl.") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of conversations.")
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows, lines


def to_messages(row: Any) -> list[dict[str, Any]]:
    """Brings a row to chat messages whose images are parts of the content, first in their turn.

    That is where training of the published model moved `<image>`, wherever it stood in the turn, and where the chat
    template puts it in inference.

    Returns:
        Messages with content parts `{"type": "image", "image": ...}` (as the row names the image, not yet opened) and
        `{"type": "text", "text": ...}`.

    Raises:
        BadRow: the row has no turns, an unknown role or shape, turns out of order, a question without an answer, an
            image outside a user's turn, or another number of images than of markers.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {type(row).__name__}, not an object.")
    keys = ("from", "value") if row.get("conversations") is not None else ("role", "content")
    turns = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRow(f"it has no conversation: `conversations` or `messages` must be a list of turns, got {turns!r}.")

    # Tables have every column in every row, so a row without images has an empty list or an empty path.
    images = next((row[key] for key in ("images", "image") if row.get(key) not in (None, "", [])), [])
    if not isinstance(images, (list, tuple)):
        images = [images]
    unused = list(images)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or any(turn.get(key) is None for key in keys):
            raise BadRow(f"turn {number} must be an object with `{keys[0]}` and `{keys[1]}`, got {turn!r}.")
        role = ROLES.get(turn[keys[0]])
        if role is None:
            raise BadRow(f"turn {number} is of {turn[keys[0]]!r}; known roles are {', '.join(ROLES)}.")
        parts, text = _split_content(turn[keys[1]], number)
        if parts and role != "user":
            raise BadRow(f"turn {number} of the {role} holds an image: only a user's turn may.")
        if role == "assistant" and not text.strip():
            raise BadRow(f"the answer in turn {number} is empty.")
        for part in parts:
            if part["image"] is None:
                if not unused:
                    markers = len(images) + sum(p["image"] is None for p in parts[parts.index(part) :])
                    raise BadRow(f"it has {len(images)} images, but at least {markers} {IMAGE_TOKEN} markers.")
                part["image"] = unused.pop(0)
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
    if unused:
        raise BadRow(f"it has {len(images)} images, but {len(images) - len(unused)} {IMAGE_TOKEN} markers.")

    roles = [message["role"] for message in messages if message is not messages[0] or message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise BadRow(f"user and assistant must take turns and each question have an answer, but the turns are {roles}.")
    return messages


def open_images(messages: list[dict[str, Any]], folder: str | os.PathLike[str] | None, allow_outside: bool = False) -> None:
    """Puts an opened image into every image part of chat messages. Arguments and errors are those of `open_image`."""
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image", "image": open_image(part, folder, allow_outside)} if part["type"] == "image" else part
                for part in message["content"]
            ]


def _split_content(content: Any, number: int) -> tuple[list[dict[str, Any]], str]:
    """Image parts (`None` for one that the row's own list names) and text of the content of turn `number`."""
    parts: list[dict[str, Any]] = []
    texts = []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, (list, tuple)):
        raise BadRow(f"turn {number} holds {content!r}: text, or a list of parts of type image and text, is needed.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
            parts.append({"type": "image", "image": given[0] if given else None})
        elif kind == "text" and isinstance(part.get("text"), str):
            text = part["text"]
            markers = text.count(IMAGE_TOKEN)
            parts += [{"type": "image", "image": None} for _ in range(markers)]
            texts.append(text.replace(IMAGE_TOKEN, "").strip() if markers else text)
        else:
            raise BadRow(f"turn {number} holds {part!r}: text, or a list of parts of type image and text, is needed.")
    return parts, "".join(texts)


class ConversationDataset(Dataset):
    """Conversations of a file or of a `datasets` object, by index.

    The form of every row is checked at once. Images are opened when a row is used. What happens to a bad row is
    `on_bad_row`: `"fail"` raises; `"skip"` logs it, counts it in `num_bad_rows`, and the next good row stands in for it,
    so that batches stay full and the number of steps does not change.

    Args:
        rows: path of a JSON or JSONL file, a `datasets.Dataset`, or another sequence of rows (see the module).
        image_root: folder of the images; the current one if `None`. An image that a row names must be a local file in it.
        allow_outside_images: whether rows may name addresses, and files outside of `image_root`. By default they may only
            where the rows are no file and no `image_root` is given, since the caller has made them.
        on_bad_row: `"fail"` or `"skip"`.
        encode: what makes a sample of messages, usually `ConversationCollator.encode`. Without it, a sample is
            `{"messages": messages}`.

    Raises:
        BadRow: a row is bad and `on_bad_row="fail"`, or no row is good. Names the file and the row.
    """

    def __init__(
        self,
        rows: str | os.PathLike[str] | Sequence[Any],
        image_root: str | os.PathLike[str] | None = None,
        on_bad_row: str = "fail",
        encode: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        allow_outside_images: bool | None = None,
    ) -> None:
        if on_bad_row not in ("fail", "skip"):
            raise ValueError(f"on_bad_row={on_bad_row!r} must be 'fail' or 'skip'.")
        self.name, self.lines = type(rows).__name__, None
        from_file = isinstance(rows, (str, os.PathLike))
        self.allow_outside_images = (
            image_root is None and not from_file if allow_outside_images is None else allow_outside_images
        )
        if isinstance(rows, (str, os.PathLike)):
            self.name = os.fspath(rows)
            rows, self.lines = read_rows(rows)
        elif not hasattr(rows, "__len__"):
            raise TypeError(f"{self.name} has no length: load it without streaming.")
        self.rows = _without_decoding(rows) if hasattr(rows, "features") else rows
        self.image_root = Path(image_root or ".")
        self.on_bad_row = on_bad_row
        self.encode = encode
        # Shared memory, so that rows found bad in the workers of a DataLoader count here as well.
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
        self.good: list[int] = []
        self._sizes: list[tuple[int, int]] = []  # (words, images) of every good row
        self.sources: Counter[str] = Counter()
        for index, row in enumerate(self.rows):
            try:
                messages = to_messages(row)
            except BadRow as error:
                self._reject(index, error)
                continue
            parts = [part for message in messages for part in message["content"]]
            words = sum(len(part["text"].split()) for part in parts if part["type"] == "text")
            self.good.append(index)
            self._sizes.append((words, sum(part["type"] == "image" for part in parts)))
            self.sources[str(row.get("source_dataset") or "unknown")] += 1
        if not self.good:
            raise BadRow(f"{self.name}: none of {len(self.rows)} rows can be used.")

    @property
    def num_bad_rows(self) -> int:
        """Rows found bad so far: by their form at once, by their images and length when they are used."""
        return int(self.bad.sum())

    def modality_lengths(self, tokens_per_image: int) -> list[int]:
        """Rough length of every sample, words and visual tokens, negative for one without an image."""
        return [words + tokens_per_image * images if images else -max(words, 1) for words, images in self._sizes]

    def where(self, index: int) -> str:
        """Where row `index` stands, for a message."""
        number = f"row {index}" if self.lines is None else f"line {self.lines[index]}"
        row = self.rows[index]
        identity = row.get("id") if isinstance(row, Mapping) else None
        return f"{self.name}, {number}" + (f" (id {identity!r})" if identity is not None else "")

    def _reject(self, index: int, error: Exception) -> None:
        if self.on_bad_row == "fail":
            raise BadRow(f"{self.where(index)}: {error} To leave such rows out, set on_bad_row='skip'.") from error
        if not self.bad[index]:
            self.bad[index] = True
            logger.warning(f"Skipped {self.where(index)}: {error}")

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"{self.name} has {len(self)} good rows, so there is no number {position}.")
        for offset in range(len(self)):
            index = self.good[(position + offset) % len(self)]
            if self.bad[index]:
                continue
            try:
                messages = to_messages(self.rows[index])
                open_images(messages, self.image_root, self.allow_outside_images)
                return {"messages": messages} if self.encode is None else self.encode(messages)
            except (ValueError, OSError, TemplateError) as error:  # an unreadable image, a text that does not fit
                self._reject(index, error)
        raise BadRow(f"{self.name}: none of {len(self.rows)} rows can be used.")


def _without_decoding(dataset: Any) -> Any:
    """A `datasets.Dataset` whose images stay encoded until they are used, so that a pass over its rows is cheap."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset
