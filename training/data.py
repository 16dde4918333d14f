"""Conversations to train on: rows of a file or of a `datasets` object, checked, as chat messages.

A row holds one conversation about any number of images, in one of three forms. LLaVA's:

    {"id": "7", "image": "a.png", "source_dataset": "...", "conversations": [
        {"from": "human", "value": "<image>\\nIs there a river?"}, {"from": "gpt", "value": "Yes."}]}

TRL's `messages`, whose `content` is text or a list of parts:

    {"images": ["a.png"], "messages": [
        {"role": "user", "content": "Is there a river?"}, {"role": "assistant", "content": "Yes."}]}

TRL's `prompt` and `completion`, each a list of messages, or a text that stands for one turn. Only the completion is learned:

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

IMAGE_TOKEN = "<image>"  # the marker in the text of a row, whatever the tokenizer calls its own
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
READ = frozenset({"conversations", "messages", "prompt", "completion", "images", "image", "id", "source_dataset"})
# Fields that change what a row says, so that a row without them would be another one.
MEDIA_FIELD = re.compile(
    r"(?i)(images?|imgs?|pictures?|photos?|videos?|audios?|clips?|frames?|pixel_values)"
    r"(_(paths?|files?|names?|file_names?|urls?|bytes|base64|list|[0-9a-d]|before|after|pre|post|t[12]))?"
)
INSTRUCTION_FIELDS = frozenset({"system", "system_prompt", "instruction", "instructions", "tools"})
# Markers of media in other projects: <video>, <img>, <image_1>, <|image_pad|>, <ImageHere>. Those of HTML have attributes.
MEDIA_TAG = re.compile(
    r"(?i)<\|?(?:images?|img|video|audio|vision|picture)(?:here|[ _-]?(?:[0-9]+|pad|start|begin|placeholder|token))?\|?>"
)
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".npy", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3")
LONGEST_PATH = 1024  # characters
NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
BOX_SCALE = 1000  # what stands for the right and the lower edge in a written box
LONGEST_MESSAGE = 600  # characters
SHOWN_FIELDS = 8


class BadRow(ValueError):
    """A row that cannot be trained on. The message says why, and in a dataset also which row."""


def to_messages(row: Any) -> list[dict[str, Any]]:
    """Brings a row to chat messages whose images are parts of the content, first in their turn.

    That is where training of the published model moved `<image>`, wherever it stood in the turn, and where the chat
    template puts it in inference. Where `messages` or a `prompt` have no marker at all, their images go to the first turn
    of the user, as in TRL.

    Returns:
        Messages with content parts `{"type": "image", "image": ...}` (as the row names the image, not yet opened) and
        `{"type": "text", "text": ...}`. Answers of a `prompt` have `"learn": False`.

    Raises:
        BadRow: the row has no turns, an unknown role or shape, turns out of order, a question without an answer, an
            image outside a user's turn, another number of images than of markers, media or instructions that are not
            read, or a box outside of 0 to 1000.
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
            f"user and assistant must take turns and each question have an answer, but the turns are {shorten(roles)}."
        )
    if parts:
        for box in written_boxes(messages):
            if min(box) < 0 or max(box) > BOX_SCALE:
                scale = "likely in pixels" if max(box) > BOX_SCALE else "partly beside its image"
                raise BadRow(
                    f"its box {list(box)} is {scale}: it lies outside of 0 to {BOX_SCALE}, which answers count in. Write "
                    f"{BOX_SCALE} * x / width and {BOX_SCALE} * y / height, rounded and within the image."
                )
    return messages


def written_boxes(messages: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """The boxes `[x1, y1, x2, y2]` in the answers of chat messages, on whatever scale."""
    texts = [part["text"] for message in messages if message["role"] == "assistant" for part in message["content"]]
    return [tuple(float(number) for number in match.groups()) for text in texts for match in BOX.finditer(text)]


def open_images(messages: list[dict[str, Any]], folder: str | os.PathLike[str] | None, allow_outside: bool = False) -> None:
    """Puts an opened image into every image part of chat messages. Arguments and errors are those of `open_image`."""
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image", "image": open_image(part, folder, allow_outside)} if part["type"] == "image" else part
                for part in message["content"]
            ]


def unread_fields(row: Mapping[str, Any]) -> list[str]:
    """Fields of a row that hold something and are not read."""
    return [str(name) for name, value in row.items() if name not in READ and not _is_empty(value)]


def _is_empty(value: Any) -> bool:
    """Tables have every column in every row, so a row without images has `None`, an empty list or an empty path."""
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
    """The turns of a row, the name of their form, and how many of them are the prompt of a completion."""
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
    """Raises for a field whose loss would change what is learned."""
    for name, value in values.items():
        if name in known or _is_empty(value):
            continue
        if str(name).lower() in INSTRUCTION_FIELDS:
            raise BadRow(
                f"{owner} has instructions in `{name}`, which is not read. Make them the first turn, with the role system."
            )
        is_media = _is_media(value) and not any(_same(value, image) for image in images)
        if is_media or (MEDIA_FIELD.fullmatch(str(name)) and not isinstance(value, (int, float))):
            raise BadRow(
                f"{owner} has media in `{name}`, which is not read: {shorten(value)}. Put images into `image` or `images`."
            )


def _same(value: Any, image: Any) -> bool:
    """Whether a field repeats the name of an image that is read."""
    names = [os.path.basename(each) for each in (value, image) if isinstance(each, str)]
    return len(names) == 2 and names[0] == names[1]


def _is_media(value: Any) -> bool:
    """Whether a value holds an image, a video or a sound, or names a file of one."""
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
    """A turn as a message. Of an image that the row's own list names, the part holds `None`."""
    if not isinstance(turn, Mapping) or any(turn.get(key) is None for key in keys):
        raise BadRow(f"turn {number} must be an object with `{keys[0]}` and `{keys[1]}`, got {shorten(turn)}.")
    role = ROLES.get(turn[keys[0]]) if isinstance(turn[keys[0]], str) else None
    if role is None:
        raise BadRow(f"turn {number} is of {shorten(turn[keys[0]])}; known roles are {', '.join(ROLES)}.")
    _check_unread(turn, frozenset(keys), (), f"turn {number}")
    parts, text = _split_content(turn[keys[1]], number)
    if parts and role != "user":
        raise BadRow(f"turn {number} of the {role} holds an image: only a user's turn may.")
    if role == "assistant" and not text.strip():
        raise BadRow(f"the answer in turn {number} is empty.")
    tag = MEDIA_TAG.search(text) if role != "assistant" else None
    if tag:
        raise BadRow(f"turn {number} has the marker {tag[0]}, which is not read. Only {IMAGE_TOKEN} stands for an image.")
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _split_content(content: Any, number: int) -> tuple[list[dict[str, Any]], str]:
    """Image parts (`None` for one that the row's own list names) and text of the content of turn `number`."""
    parts: list[dict[str, Any]] = []
    texts = []
    wanted = "text, or a list of parts of type image and text, is needed"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, (list, tuple)):
        raise BadRow(f"turn {number} holds {shorten(content)}: {wanted}.")
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
            raise BadRow(f"turn {number} holds {shorten(part)}: {wanted}.")
    return parts, "".join(texts)


class _Rows:
    """What the two datasets below share: the path of a row to a sample, and what happens to a bad one."""

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
                    # An image column of `datasets` holds files that `datasets` itself found and would open.
                    own = self.has_image_column and isinstance(part["image"], Mapping)
                    opened = open_image(part["image"], self.image_root, self.allow_outside_images or own)
                    message["content"][index] = {"type": "image", "image": opened}
        return {"messages": messages} if self.encode is None else self.encode(messages)

    def _describe(self, place: str, row: Any, error: Exception) -> str:
        """An error with its row, in one line."""
        shown = ""
        with contextlib.suppress(Exception):  # a row that cannot be read is named by its place alone
            shown = f" (id {shorten(row['id'])})" if not _is_empty(row["id"]) else ""
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):  # others say too little without their kind
            text = f"{type(error).__name__}: {text}"
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[:LONGEST_MESSAGE]}… ({len(text)} characters)"
        return f"{self.name}, {place}{shown}: {text}"


class ConversationDataset(_Rows, Dataset):
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
        BadRow: a row is bad and `on_bad_row="fail"`, no row is good, or the file is no list of rows. Names file and row.
        TypeError: the rows have no length. Use `ConversationStream` for those.
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
        # Shared memory, so that rows found bad in the workers of a DataLoader count here as well.
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
        self.good: list[int] = []
        self._sizes: list[tuple[int, int]] = []  # (words, images) of every good row
        self.sources: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()  # rows of every field that is not read
        fractions: list[int] = []
        for index in range(len(self.rows)):
            try:
                row = self.rows[index]
                messages = to_messages(row)
            except Exception as error:  # whatever it is, it belongs to this row
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
            logger.warning(f"{self.name}: these fields are not read: {', '.join(fields)}{more}.")
        if fractions:
            logger.warning(
                f"{self.name}: in {len(fractions)} rows no box exceeds 1, first in {self.where(fractions[0])}. They are "
                f"likely fractions of the image, but answers count from 0 to {BOX_SCALE}: multiply them by {BOX_SCALE}."
            )

    @property
    def num_bad_rows(self) -> int:
        """Rows found bad so far: by their form at once, by their images and length when they are used."""
        return int(self.bad.sum())

    def modality_lengths(self, tokens_per_image: int) -> list[int]:
        """Rough length of every sample, words and visual tokens, negative for one without an image."""
        return [words + tokens_per_image * images if images else -max(words, 1) for words, images in self._sizes]

    def where(self, index: int) -> str:
        """Place of row `index` in its file: the line of JSONL, else the position counted from zero."""
        return f"row {index}" if self.lines is None else f"line {self.lines[index]}"

    def _reject(self, index: int, error: Exception) -> None:
        try:
            row = self.rows[index]
        except Exception:  # the error at hand says so
            row = None
        message = self._describe(self.where(index), row, error)
        if self.on_bad_row == "fail":
            raise BadRow(f"{message.removesuffix('.')}. To leave such rows out, set on_bad_row='skip'.") from error
        if not self.bad[index]:
            self.bad[index] = True
            logger.warning(f"Skipped {message}")

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
                return self._to_sample(self.rows[index])
            except Exception as error:  # an unreadable image, a text that does not fit, whatever else a row can cause
                self._reject(index, error)
        raise BadRow(f"{self.name}: none of {len(self.rows)} rows can be used.")


class ConversationStream(_Rows, IterableDataset):
    """Conversations of a streaming `datasets` object, in its order. Every row is checked when it comes.

    Args:
        rows: a `datasets.IterableDataset`, or what else yields rows (see the module) each time it is iterated.
        image_root, on_bad_row, encode, allow_outside_images: see `ConversationDataset`. A bad row is left out with
            `"skip"`, and counted in `num_bad_rows`.

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
        self._num_bad = torch.zeros(1, dtype=torch.long).share_memory_()  # workers of a DataLoader count here as well
        self._told: set[str] = set()

    @property
    def num_bad_rows(self) -> int:
        """Rows left out so far, in every pass over the stream."""
        return int(self._num_bad)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles anew, where the rows are shuffled at all."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = num_good = 0
        for number, row in enumerate(self.rows, start=1):
            try:
                sample = self._to_sample(row)
            except Exception as error:  # whatever it is, it belongs to this row
                message = self._describe(f"row {number - 1}", row, error)
                if self.on_bad_row == "fail":
                    raise BadRow(f"{message.removesuffix('.')}. To leave such rows out, set on_bad_row='skip'.") from error
                self._num_bad += 1
                logger.warning(f"Skipped {message}")
                continue
            new = [name for name in unread_fields(row) if name not in self._told]
            if new:
                self._told.update(new)
                logger.warning(f"{self.name}: these fields are not read: {', '.join(new)}.")
            num_good += 1
            yield sample
        if number and not num_good:
            raise BadRow(f"{self.name}: none of {number} rows can be used.")


def _without_decoding(dataset: Any) -> Any:
    """A `datasets` object whose images stay encoded until they are used, so that a pass over its rows is cheap."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset
