"""Training data: rows of a file or of a `datasets` object, checked and converted to chat messages.

A row is one conversation about any number of images, in one of three formats. LLaVA's:

    {"id": "7", "image": "a.png", "source_dataset": "...", "conversations": [
        {"from": "human", "value": "<image>\\nIs there a river?"}, {"from": "gpt", "value": "Yes."}]}

TRL's `messages`, whose `content` is text or a list of parts:

    {"images": ["a.png"], "messages": [
        {"role": "user", "content": "Is there a river?"}, {"role": "assistant", "content": "Yes."}]}

TRL's `prompt` and `completion`, each a list of messages, or a text as one turn. The loss covers only the completion:

    {"images": ["a.png"], "prompt": "Is there a river?", "completion": "Yes."}

`image` or `images` is a path or a list of paths; in a `datasets` object also an image. An empty field counts as absent.
"""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..files import reading
from ..files.reading import IMAGE_SUFFIXES, NotJSON, shorten
from ..image_sources_mfrsvlm import open_image


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"  # the marker in the text of a row; the tokenizer may use another token
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
READ = frozenset({"conversations", "messages", "prompt", "completion", "images", "image", "id", "source_dataset"})
# Fields with media or instructions. Ignoring them would change the meaning of a row.
MEDIA_FIELD = re.compile(
    r"(?i)(images?|imgs?|pictures?|photos?|videos?|audios?|clips?|frames?|pixel_values)"
    r"(_(paths?|files?|names?|file_names?|urls?|bytes|base64|list|[0-9a-d]|before|after|pre|post|t[12]))?"
)
INSTRUCTION_FIELDS = frozenset({"system", "system_prompt", "instruction", "instructions", "tools"})
# Markers of media in other projects: <video>, <img>, <image_1>, <|image_pad|>, <ImageHere>. Those of HTML have attributes.
MEDIA_TAG = re.compile(
    r"(?i)<\|?(?:images?|img|video|audio|vision|picture)(?:here|[ _-]?(?:[0-9]+|pad|start|begin|placeholder|token))?\|?>"
)
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".npy", ".npz", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3")
LONGEST_PATH = 1024  # characters
NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
BOX_SCALE = 1000  # value of the right and lower edge in written boxes
LONGEST_MESSAGE = 600  # characters
SHOWN_FIELDS = 8


class BadRow(ValueError):
    """A row that cannot be used for training. The message states the reason, and for a dataset also the row."""


def to_messages(row: Any) -> list[dict[str, Any]]:
    """Converts a row to chat messages with images as content parts, at the beginning of their turn.

    The published training also moved `<image>` to the beginning of the turn, and the chat template does so in inference. If
    `messages` or a `prompt` have no marker, their images go to the first user turn, as in TRL.

    Returns:
        Messages with content parts `{"type": "image", "image": ...}` (as in the row, not yet opened) and
        `{"type": "text", "text": ...}`. Assistant messages in a `prompt` have `"learn": False`.

    Raises:
        BadRow: the row has no turns, an unknown role or format, turns out of order, a question without an answer, an
            image outside a user turn, another number of images than of markers, unsupported media or instructions, or a
            box outside of 0 to 1000.
    """
    if isinstance(row, NotJSON):
        raise BadRow(f"it is not JSON: {row.reason}.")
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {type(row).__name__}, not an object.")
    images = _images_of(row)
    turns, form, num_prompts = _turns_of(row)
    _check_unread(row, READ, images, "it")

    messages = [_to_message(turn, number, TURN_KEYS[form]) for number, turn in enumerate(turns, start=1)]
    for message in messages[:num_prompts]:
        if message["role"] == "assistant":
            message["learn"] = False
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if form == "messages" and images and not parts:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        parts = [{"type": "image", "image": None} for _ in images]
        first["content"] = [*parts, *first["content"]]
    empty = [part for part in parts if part["image"] is None]
    if len(empty) != len(images):
        raise BadRow(f"it has {len(images)} images, but {len(empty)} {IMAGE_TOKEN} markers.")
    for part, image in zip(empty, images, strict=True):
        part["image"] = image

    roles = [message["role"] for message in messages if message is not messages[0] or message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise BadRow(
            f"user and assistant must alternate, and each question needs an answer, but the turns are {shorten(roles)}."
        )
    if parts:
        for box in written_boxes(messages):
            if min(box) < 0 or max(box) > BOX_SCALE:
                scale = "likely in pixels" if max(box) > BOX_SCALE else "partly outside of its image"
                raise BadRow(
                    f"its box {list(box)} is {scale}: boxes must be scaled to 0-{BOX_SCALE}. Write "
                    f"{BOX_SCALE} * x / width and {BOX_SCALE} * y / height, rounded and clipped to the image."
                )
    return messages


def written_boxes(messages: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """The boxes `[x1, y1, x2, y2]` in the answers of chat messages, without conversion."""
    texts = [part["text"] for message in messages if message["role"] == "assistant" for part in message["content"]]
    return [tuple(float(number) for number in match.groups()) for text in texts for match in BOX.finditer(text)]


def open_images(messages: list[dict[str, Any]], folder: str | os.PathLike[str] | None, allow_outside: bool = False) -> None:
    """Opens the image of every image part of chat messages, in place. Arguments and errors are those of `open_image`."""
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image", "image": open_image(part, folder, allow_outside)} if part["type"] == "image" else part
                for part in message["content"]
            ]


def unread_fields(row: Mapping[str, Any]) -> list[str]:
    """Fields of a row that are neither empty nor used."""
    return [str(name) for name, value in row.items() if name not in READ and not _is_empty(value)]


def _is_empty(value: Any) -> bool:
    """Whether a value counts as absent: `None`, "", or a list or mapping of such values, as in rows of tables."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(map(_is_empty, value.values() if isinstance(value, Mapping) else value))
    return value is None or (isinstance(value, (str, bytes)) and not value)


def _images_of(row: Mapping[str, Any]) -> list[Any]:
    given = [row[name] for name in ("images", "image") if not _is_empty(row.get(name))]
    if len(given) > 1:
        raise BadRow("it has both `image` and `images`. Keep one of them.")
    images = given[0] if given else []
    return [image for image in (images if isinstance(images, (list, tuple)) else [images]) if not _is_empty(image)]


def _turns_of(row: Mapping[str, Any]) -> tuple[Sequence[Any], str, int]:
    """The turns of a row, the name of their format, and the number of turns in the prompt of a completion."""
    prompt, completion = row.get("prompt"), row.get("completion")
    forms = [name for name in TURN_KEYS if not _is_empty(row.get(name))]
    if not _is_empty(prompt) or not _is_empty(completion):
        forms.append("prompt")
    if len(forms) > 1:
        raise BadRow(f"it has more than one conversation: {' and '.join(f'`{name}`' for name in forms)}. Keep one of them.")
    if forms == ["prompt"]:
        if _is_empty(prompt) or _is_empty(completion):
            raise BadRow("it has one of `prompt` and `completion`. Both are needed.")
        first, second = (
            [{"role": role, "content": value}] if isinstance(value, str) else value
            for role, value in (("user", prompt), ("assistant", completion))
        )
        for name, value in (("prompt", first), ("completion", second)):
            if not isinstance(value, (list, tuple)):
                raise BadRow(f"its `{name}` must be text or a list of messages, got {shorten(value)}.")
        return [*first, *second], "messages", len(first)
    turns = row[forms[0]] if forms else None
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        raise BadRow(
            "it has no conversation: `conversations`, `messages`, or `prompt` and `completion` must hold turns, got "
            f"{shorten(turns) if forms else f'the fields {shorten(list(row))}'}."
        )
    return turns, forms[0], 0


def _check_unread(values: Mapping[str, Any], known: frozenset[str], images: Sequence[Any], owner: str) -> None:
    """Raises for an unused field that contains media or instructions."""
    for name, value in values.items():
        if name in known or _is_empty(value):
            continue
        if str(name).lower() in INSTRUCTION_FIELDS:
            raise BadRow(
                f"{owner} has instructions in `{name}`, which is not supported. Put them into a first turn with role system."
            )
        is_media = _is_media(value) and not any(_same(value, image) for image in images)
        if is_media or (MEDIA_FIELD.fullmatch(str(name)) and not isinstance(value, (int, float))):
            raise BadRow(
                f"{owner} has media in `{name}`, which is not supported: {shorten(value)}. Use `image` or `images`."
            )


def _same(value: Any, image: Any) -> bool:
    """Whether a value and an image have the same file name."""
    names = [os.path.basename(each) for each in (value, image) if isinstance(each, str)]
    return len(names) == 2 and names[0] == names[1]


def _is_media(value: Any) -> bool:
    """Whether a value is an image, a video or audio, or the name of such a file."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_media, value[:SHOWN_FIELDS]))
    if isinstance(value, Mapping):
        return any(_is_media(value.get(key)) for key in ("bytes", "path"))
    if isinstance(value, str):
        return len(value) <= LONGEST_PATH and "\n" not in value and value.lower().endswith(tuple(MEDIA_SUFFIXES))
    return isinstance(value, (bytes, bytearray, Image.Image, torch.Tensor)) or (
        isinstance(value, np.ndarray) and value.ndim > 1
    )


def _to_message(turn: Any, number: int, keys: tuple[str, str]) -> dict[str, Any]:
    """A turn as a message. An image from the list of the row is `None`."""
    if not isinstance(turn, Mapping) or any(turn.get(key) is None for key in keys):
        raise BadRow(f"turn {number} must be an object with `{keys[0]}` and `{keys[1]}`, got {shorten(turn)}.")
    role = ROLES.get(turn[keys[0]]) if isinstance(turn[keys[0]], str) else None
    if role is None:
        raise BadRow(f"turn {number} has the role {shorten(turn[keys[0]])}; known roles are {', '.join(ROLES)}.")
    _check_unread(turn, frozenset(keys), (), f"turn {number}")
    parts, text = _split_content(turn[keys[1]], number)
    if parts and role != "user":
        raise BadRow(f"turn {number} of the {role} has an image: only user turns may have images.")
    if role == "assistant" and not text.strip():
        raise BadRow(f"the answer in turn {number} is empty.")
    tag = MEDIA_TAG.search(text) if role != "assistant" else None
    if tag:
        raise BadRow(f"turn {number} has the marker {tag[0]}, which is not supported. Use {IMAGE_TOKEN} for images.")
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _split_content(content: Any, number: int) -> tuple[list[dict[str, Any]], str]:
    """Image parts (`None` for an image from the list of the row) and text of the content of turn `number`."""
    parts: list[dict[str, Any]] = []
    texts = []
    wanted = "text, or a list of parts of type image and text, is needed"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, (list, tuple)):
        raise BadRow(f"turn {number} contains {shorten(content)}: {wanted}.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            given = [part[key] for key in ("image", "path", "url") if not _is_empty(part.get(key))]
            _check_unread(part, frozenset({"type", "image", "path", "url"}), (), f"a part of turn {number}")
            parts.append({"type": "image", "image": given[0] if given else None})
        elif kind == "text" and isinstance(part.get("text"), str):
            _check_unread(part, frozenset({"type", "text"}), (), f"a part of turn {number}")
            text = part["text"]
            markers = text.count(IMAGE_TOKEN)
            parts += [{"type": "image", "image": None} for _ in range(markers)]
            texts.append(text.replace(IMAGE_TOKEN, "").strip() if markers else text)
        else:
            raise BadRow(f"turn {number} contains {shorten(part)}: {wanted}.")
    return parts, "".join(texts)


class _Rows:
    """Base class of the two datasets below: conversion of a row to a sample, and handling of bad rows."""

    name: str
    image_root: Path
    allow_outside_images: bool
    on_bad_row: str
    encode: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    has_image_column: bool

    def _set_up(self, rows: Any, image_root: Any, on_bad_row: str, encode: Any, allow_outside_images: bool | None) -> None:
        if on_bad_row not in ("fail", "skip"):
            raise ValueError(f"on_bad_row={on_bad_row!r} must be 'fail' or 'skip'.")
        from_file = isinstance(rows, (str, os.PathLike))
        self.name = os.fspath(rows) if from_file else type(rows).__name__
        self.allow_outside_images = (
            image_root is None and not from_file if allow_outside_images is None else allow_outside_images
        )
        features = getattr(rows, "features", None) or {}
        self.has_image_column = any("Image(" in str(features.get(name)) for name in ("image", "images"))
        self.image_root = Path(image_root or ".")
        self.on_bad_row = on_bad_row
        self.encode = encode

    def _to_sample(self, row: Any) -> dict[str, Any]:
        messages = to_messages(row)
        for message in messages:
            for index, part in enumerate(message["content"]):
                if part["type"] == "image":
                    # `datasets` itself found the files of an image column, so they may be outside of `image_root`.
                    own = self.has_image_column and isinstance(part["image"], Mapping)
                    opened = open_image(part["image"], self.image_root, self.allow_outside_images or own)
                    message["content"][index] = {"type": "image", "image": opened}
        return {"messages": messages} if self.encode is None else self.encode(messages)

    def _describe(self, place: str, row: Any, error: Exception) -> str:
        """A message about a bad row, in one line."""
        shown = ""
        with contextlib.suppress(Exception):  # a row that cannot be read has no id
            shown = f" (id {shorten(row['id'])})" if not _is_empty(row["id"]) else ""
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):  # messages of other types are unclear without the type
            text = f"{type(error).__name__}: {text}"
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[:LONGEST_MESSAGE]}… ({len(text)} characters)"
        return f"{self.name}, {place}{shown}: {text}"


class ConversationDataset(_Rows, Dataset):
    """Conversations of a file or of a `datasets` object, by index.

    The format of every row is checked at once. Images are opened when a row is used. `on_bad_row="fail"` raises for a bad
    row. `"skip"` logs it, counts it in `num_bad_rows`, and uses the next good row instead, so that the number of steps does
    not change.

    Args:
        rows: path of a JSON or JSONL file, a `datasets.Dataset`, or another sequence of rows (see the module).
        image_root: folder of the images; `None`: the current folder. Images must be local files in this folder.
        on_bad_row: `"fail"` or `"skip"`.
        encode: function from messages to a sample, usually `ConversationCollator.encode`. `None`: a sample is
            `{"messages": messages}`.
        allow_outside_images: whether rows may refer to URLs, and to files outside of `image_root`. Default: only if the
            rows are not a file and there is no `image_root`.

    Raises:
        BadRow: a row is bad and `on_bad_row="fail"`, no row is good, or the file holds no list of rows. Names file and row.
        TypeError: the rows have no length. Use `ConversationStream`.
    """

    def __init__(
        self,
        rows: str | os.PathLike[str] | Sequence[Any],
        image_root: str | os.PathLike[str] | None = None,
        on_bad_row: str = "fail",
        encode: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        allow_outside_images: bool | None = None,
    ) -> None:
        self._set_up(rows, image_root, on_bad_row, encode, allow_outside_images)
        self.lines: list[int] | None = None
        if isinstance(rows, (str, os.PathLike)):
            try:
                numbers, rows = zip(*reading.read_rows(rows), strict=True)
            except ValueError as error:  # the whole file: no JSON, no list, no rows
                raise BadRow(str(error)) from error
            self.lines = list(numbers) if self.name.lower().endswith(".jsonl") else None
        elif not hasattr(rows, "__len__"):
            raise TypeError(f"{self.name} has no length: use ConversationStream, or load it without streaming.")
        self.rows = _without_decoding(rows) if hasattr(rows, "features") else rows
        # Shared memory, so that bad rows found in the workers of a DataLoader are counted.
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
        self.good: list[int] = []
        self._sizes: list[tuple[int, int]] = []  # (words, images) of every good row
        self.sources: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()  # number of rows with each unused field
        fractions: list[int] = []
        for index in range(len(self.rows)):
            try:
                row = self.rows[index]
                messages = to_messages(row)
            except Exception as error:  # any error belongs to this row
                self._reject(index, error)
                continue
            parts = [part for message in messages for part in message["content"]]
            words = sum(len(part["text"].split()) for part in parts if part["type"] == "text")
            self.good.append(index)
            self._sizes.append((words, sum(part["type"] == "image" for part in parts)))
            source = row.get("source_dataset")
            self.sources["unknown" if _is_empty(source) else str(source)[:80]] += 1
            self.unread.update(unread_fields(row))
            if self._sizes[-1][1]:
                boxes = written_boxes(messages)
                fractions += [index] if boxes and max(map(max, boxes)) <= 1 else []
        if not self.good:
            raise BadRow(f"{self.name}: none of {len(self.rows)} rows can be used.")
        if self.unread:
            fields = [f"{name} ({count} rows)" for name, count in self.unread.most_common(SHOWN_FIELDS)]
            more = f" and {len(self.unread) - len(fields)} more" if len(self.unread) > len(fields) else ""
            logger.warning(f"{self.name}: these fields are not used: {', '.join(fields)}{more}.")
        if fractions:
            logger.warning(
                f"{self.name}: in {len(fractions)} rows no box exceeds 1, first in {self.where(fractions[0])}. They are "
                f"probably fractions, but boxes must be scaled to 0-{BOX_SCALE}: multiply them by {BOX_SCALE}."
            )

    @property
    def num_bad_rows(self) -> int:
        """Number of bad rows found so far. The format is checked at once, images and length when a row is used."""
        return int(self.bad.sum())

    def modality_lengths(self, tokens_per_image: int) -> list[int]:
        """Approximate length of every sample in words and visual tokens, negative for samples without an image."""
        return [words + tokens_per_image * images if images else -max(words, 1) for words, images in self._sizes]

    def where(self, index: int) -> str:
        """Position of row `index` in its file: the line of JSONL, or else the index, counted from zero."""
        return f"row {index}" if self.lines is None else f"line {self.lines[index]}"

    def _reject(self, index: int, error: Exception) -> None:
        try:
            row = self.rows[index]
        except Exception:  # `error` already reports this
            row = None
        message = self._describe(self.where(index), row, error)
        if self.on_bad_row == "fail":
            raise BadRow(f"{message.removesuffix('.')}. To skip such rows, set on_bad_row='skip'.") from error
        if not self.bad[index]:
            self.bad[index] = True
            logger.warning(f"Skipped {message}")

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"{self.name} has {len(self)} good rows, so index {position} is out of range.")
        for offset in range(len(self)):
            index = self.good[(position + offset) % len(self)]
            if self.bad[index]:
                continue
            try:
                return self._to_sample(self.rows[index])
            except Exception as error:  # an unreadable image, a text that is too long, or any other error of the row
                self._reject(index, error)
        raise BadRow(f"{self.name}: none of {len(self.rows)} rows can be used.")


class ConversationStream(_Rows, IterableDataset):
    """Conversations of a streaming `datasets` object, in its order. A row is checked when it is read.

    Args:
        rows: a `datasets.IterableDataset`, or another iterable of rows (see the module).
        image_root, on_bad_row, encode, allow_outside_images: see `ConversationDataset`. With `"skip"`, bad rows are skipped
            and counted in `num_bad_rows`.

    Raises:
        BadRow: while iterating: a row is bad and `on_bad_row="fail"`, or no row is good.
    """

    def __init__(
        self,
        rows: Any,
        image_root: str | os.PathLike[str] | None = None,
        on_bad_row: str = "fail",
        encode: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        allow_outside_images: bool | None = None,
    ) -> None:
        self._set_up(rows, image_root, on_bad_row, encode, allow_outside_images)
        self.rows = _without_decoding(rows) if getattr(rows, "features", None) else rows
        self._num_bad = torch.zeros(1, dtype=torch.long).share_memory_()  # shared with the workers of a DataLoader
        self._reported: set[str] = set()

    @property
    def num_bad_rows(self) -> int:
        """Number of skipped rows so far, over all passes."""
        return int(self._num_bad)

    def set_epoch(self, epoch: int) -> None:
        """Changes the order for a new epoch, if the rows are shuffled."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = num_good = 0
        for number, row in enumerate(self.rows, start=1):
            try:
                sample = self._to_sample(row)
            except Exception as error:  # any error belongs to this row
                message = self._describe(f"row {number - 1}", row, error)
                if self.on_bad_row == "fail":
                    raise BadRow(f"{message.removesuffix('.')}. To skip such rows, set on_bad_row='skip'.") from error
                self._num_bad += 1
                logger.warning(f"Skipped {message}")
                continue
            new = [name for name in unread_fields(row) if name not in self._reported]
            if new:
                self._reported.update(new)
                logger.warning(f"{self.name}: these fields are not used: {', '.join(new)}.")
            num_good += 1
            yield sample
        if number and not num_good:
            raise BadRow(f"{self.name}: none of {number} rows can be used.")


def _without_decoding(dataset: Any) -> Any:
    """A `datasets` object whose images are decoded only when they are used, so that a pass over its rows is fast."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset
