"""Puts the same questions to many pieces of a raster. Every piece is encoded once, and finished pieces survive a crash."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..evaluation.answering import Answer, Prompt
from ..files.reading import parse_json, shorten
from ..processing_mfrsvlm import WRITTEN_BOX, locate_boxes
from .areas import inside
from .errors import NoValidPixelError, RasterError
from .raster import Fill, Raster, colour_of
from .tiles import Window


IMAGES = 8  # pieces that are encoded together


@dataclass(frozen=True)
class Piece:
    """What one image shows.

    Attributes:
        window: of the raster.
        size: width and height of its pixels in the image.
        canvas: width and height of the image, if it is larger than `size`.
        shape: what is shown, in pixels of the raster. `None`: all.
    """

    window: Window
    size: tuple[int, int]
    canvas: tuple[int, int] | None = None
    shape: Any = None


@dataclass(frozen=True)
class Reply:
    """An answer about a piece.

    Attributes:
        text: the answer.
        score: geometric mean of the probabilities of its tokens, 0 to 1; `None` if they are unknown.
        truncated: whether generation stopped at the maximum length.
        boxes: x_min, y_min, x_max, y_max in pixels of the raster, and the score of the tokens that write the box.
    """

    text: str
    score: float | None
    truncated: bool = False
    boxes: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a piece: `state` is "answered", "empty" (no valid pixel) or "failed", with the `reason`."""

    state: str
    replies: tuple[Reply, ...] = ()
    reason: str = ""


def show(rasters: Sequence[Raster], piece: Piece, fill: Fill) -> list[Any]:
    """The images of a piece, one a raster: RGB, or arrays by band of a raster that was opened with `image_bands`.

    Args:
        rasters: what is shown.
        piece: which part of it.
        fill: colour, or values by band, of what is not shown: pixels without data or outside of the shape, and the rest of
            the canvas. Models take black for something; the colour with which their images are padded says nothing to them.

    Raises:
        NoValidPixelError: a raster has no valid pixel there.
        RasterError: it cannot be read.
    """
    images: list[Any] = []
    for raster in rasters:
        view = raster.read(piece.window, size=piece.size, fill=fill)
        mask = None
        if piece.shape is not None:
            shown = inside(piece.shape, piece.window, piece.size)
            if not (view.valid & shown).any():
                raise NoValidPixelError(f"{raster.name} has no valid pixel in the area.")
            mask = Image.fromarray(shown)
        size = piece.canvas or piece.size
        if view.bands is None:
            images.append(paste(view.image, size, colour_of(fill), mask))
            continue
        values = fill if isinstance(fill, Mapping) else dict.fromkeys(view.bands, fill[0])
        planes = {name: Image.fromarray(plane) for name, plane in view.bands.items()}
        images.append({name: np.asarray(paste(plane, size, values[name], mask)) for name, plane in planes.items()})
    return images


def paste(image: Image.Image, size: tuple[int, int], fill: Any, mask: Image.Image | None) -> Image.Image:
    """An image of `size` (width, height) in one colour, with another at its upper left, where the mask is true."""
    canvas = Image.new(image.mode, size, fill)
    canvas.paste(image, mask=mask)
    return canvas


def ask_pieces(
    answerer: Any,
    show_piece: Callable[[Piece], list[Any]],
    pieces: Sequence[Piece],
    questions: Sequence[str],
    batch_size: int,
    box_format: dict[str, Any] | None = None,
    log: "RunLog | None" = None,
    progress: bool = False,
) -> list[Outcome]:
    """Asks all questions about every piece.

    Args:
        answerer: an `evaluation.answering.Answerer`.
        show_piece: gives the images of a piece.
        pieces: the pieces.
        questions: prompts, without image markers and chat template.
        batch_size: answers that are generated together.
        box_format: how boxes are written; `None`: none are looked for.
        log: keeps the outcomes of finished pieces.
        progress: show a bar with the time left, if there is a terminal.

    Returns:
        One outcome a piece, with one reply a question.

    Raises:
        RasterError: every piece failed; the message is that of the first.
        OSError: the log cannot be written.
    """
    chunks = [pieces[start : start + IMAGES] for start in range(0, len(pieces), IMAGES)]
    done = log.start() if log else {}
    outcomes: list[Outcome] = []
    hidden = None if progress else True  # None: hidden without a terminal
    with tqdm(total=len(pieces), unit="image", disable=hidden, smoothing=0.05) as bar:
        for number, chunk in enumerate(chunks):
            if number not in done:
                made = _ask_chunk(answerer, show_piece, chunk, questions, batch_size, box_format)
                if log:
                    log.add(number, made)
            else:
                made = done[number]
            outcomes += made
            bar.update(len(chunk))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed and not any(outcome.state == "answered" for outcome in outcomes):
        raise RasterError(f"none of {len(outcomes)} images could be answered. The first: {failed[0].reason}")
    return outcomes


def _ask_chunk(
    answerer: Any,
    show_piece: Callable[[Piece], list[Any]],
    chunk: Sequence[Piece],
    questions: Sequence[str],
    batch_size: int,
    box_format: dict[str, Any] | None,
) -> list[Outcome]:
    outcomes: list[Outcome | None] = [None] * len(chunk)
    shown: dict[int, list[Any]] = {}
    for index, piece in enumerate(chunk):
        try:
            shown[index] = show_piece(piece)
        except NoValidPixelError:
            outcomes[index] = Outcome("empty")
        except (RasterError, OSError, MemoryError) as error:
            outcomes[index] = Outcome("failed", reason=one_line(error))
    try:
        answers = _answer(answerer, shown, questions, batch_size)
    except Exception:  # of the model, such as too little memory
        answers = None
    if answers is None:  # one at a time: the others may be answered
        answers = {}
        for index, images in shown.items():
            try:
                answers |= _answer(answerer, {index: images}, questions, 1)
            except Exception as error:
                outcomes[index] = Outcome("failed", reason=one_line(error))
    tokenizer = getattr(answerer, "tokenizer", None)
    for index, row in answers.items():
        outcomes[index] = Outcome(
            "answered", tuple(make_reply(answer, tokenizer, chunk[index], box_format) for answer in row)
        )
    return [outcome for outcome in outcomes if outcome is not None]


def _answer(
    answerer: Any, shown: dict[int, list[Any]], questions: Sequence[str], batch_size: int
) -> dict[int, list[Answer]]:
    if not shown:
        return {}
    groups = list(shown.values())
    prompts = [Prompt(question, group) for group in range(len(groups)) for question in questions]
    encoded = answerer.encode_images(groups, prompts)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        answers += answerer.answer(prompts[start : start + batch_size], encoded)
    count = len(questions)
    return {index: answers[row * count : (row + 1) * count] for row, index in enumerate(shown)}


def make_reply(answer: Answer, tokenizer: Any, piece: Piece, box_format: dict[str, Any] | None) -> Reply:
    likelihoods = [likelihood for _, likelihood in answer.tokens]
    boxes = []
    if box_format is not None:
        form = {name: box_format[name] for name in ("scale", "order", "padded")}
        width, height = piece.canvas or piece.size
        factors = (piece.window[2] / piece.size[0], piece.window[3] / piece.size[1]) * 2
        spans = None
        for match in WRITTEN_BOX.finditer(answer.text):
            (found,) = locate_boxes([match[0]], [(height, width)], **form)
            for box in found.tolist():
                if spans is None:
                    spans = token_spans(answer, tokenizer)
                written = [
                    likelihood
                    for (start, end), likelihood in zip(spans, likelihoods, strict=True)
                    if start < match.end() and end > match.start()
                ]
                corners = [
                    value * factor + offset for value, factor, offset in zip(box, factors, piece.window[:2] * 2, strict=True)
                ]
                boxes.append((*corners, mean_probability(written)))
    return Reply(answer.text, mean_probability(likelihoods), answer.truncated, tuple(boxes))


def mean_probability(likelihoods: Sequence[float]) -> float | None:
    """The geometric mean, from log probabilities."""
    return min(1.0, math.exp(sum(likelihoods) / len(likelihoods))) if likelihoods else None


def token_spans(answer: Answer, tokenizer: Any) -> list[tuple[int, int]]:
    """Which characters of the text every token wrote, from the texts of growing prefixes."""
    if not answer.tokens:
        return []
    ids = [token for token, _ in answer.tokens]
    texts = [tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(len(ids) + 1)]
    space = len(texts[-1]) - len(texts[-1].lstrip())  # which the answer lacks
    ends = [len(text) - space for text in texts]
    return list(itertools.pairwise(ends))


def one_line(error: BaseException) -> str:
    return shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)[1:-1]


class RunLog:
    """Keeps the outcomes of finished pieces in a file, so that a run that was killed continues where it stopped.

    Args:
        path: JSONL file: the settings of the run, then one line for every group of pieces.
        settings: what must be the same when the run continues. JSON.

    Raises:
        RasterError: the file belongs to a run with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), parse_json(json.dumps(settings))

    def start(self) -> dict[int, list[Outcome]]:
        """Outcomes by number of the group. Groups in which a piece failed are left out, and asked again."""
        lines = list(self._lines())
        if not lines:
            self._append({"settings": self.settings})
            return {}
        stored = lines[0].get("settings", {})
        for name in sorted({*stored, *self.settings}):
            if stored.get(name) != self.settings.get(name):
                raise RasterError(
                    f"{self.path} belongs to a run with {name} = {shorten(stored.get(name))}, not "
                    f"{shorten(self.settings.get(name))}: delete it, or repeat that run."
                )
        found = {line["group"]: [as_outcome(row) for row in line["outcomes"]] for line in lines[1:]}
        return {group: made for group, made in found.items() if not any(outcome.state == "failed" for outcome in made)}

    def add(self, group: int, outcomes: Sequence[Outcome]) -> None:
        """Raises `OSError` if the disk is full."""
        self._append({"group": group, "outcomes": [asdict(outcome) for outcome in outcomes]})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            text = f"{error.strerror}, so answers are missing in {self.path}; free some space and continue the run"
            raise OSError(error.errno, text) from error

    def _lines(self) -> Iterator[dict[str, Any]]:
        content = self.path.read_bytes() if self.path.exists() else b""
        if not content.endswith(b"\n"):  # killed while it wrote the line
            content = content[: content.rfind(b"\n") + 1]
            if self.path.exists():
                with self.path.open("r+b") as file:
                    file.truncate(len(content))
        for line in content.decode("utf-8", "replace").split("\n")[:-1]:
            try:
                yield dict(parse_json(line))
            except (TypeError, ValueError) as error:
                raise RasterError(f"{self.path} is no log of a run: name another file, or delete it.") from error


def as_outcome(row: dict[str, Any]) -> Outcome:
    replies = tuple(
        Reply(reply["text"], reply["score"], reply["truncated"], tuple(tuple(box) for box in reply["boxes"]))
        for reply in row["replies"]
    )
    return Outcome(row["state"], replies, row["reason"])
