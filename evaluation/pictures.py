"""A picture of a run: some questions with their images, answers and truths, chosen by a rule."""

import hashlib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..files.reading import read_rows
from ..files.writing import write_image
from .benchmarks import Benchmark, load_benchmark
from .report import ReportError, Summary


SIDE, LINES, COLUMNS = 288, 9, 4  # pixels of an image, lines of text below it, images beside each other
LINE, CHARACTERS, MARGIN = 15, 46, 8
RIGHT, WRONG, TRUE_BOX, BOX = "#1d7a34", "#b3261e", "white", "yellow"


def write_pictures(
    summaries: Sequence[Summary], output: Path, count: int, root: str | None = None, allow_outside_images: bool = False
) -> None:
    """Writes `pictures-BENCHMARK-SPLIT-PROTOCOL-MODEL.png` for each run that saw the images.

    Args:
        summaries: of the runs.
        output: the folder.
        count: questions of each run, see `choose`.
        root: folder of the benchmark, which then must be the same of all runs; `None` for synthetic scenes.
        allow_outside_images: see `load_benchmark`.

    Raises:
        BenchmarkError: the benchmark is unknown, needs a folder, or an image cannot be read.
        ReportError: the predictions of a run cannot be read.
    """
    for summary in summaries:
        if summary.mode == "image":
            benchmark = load_benchmark(
                summary.benchmark,
                root,
                summary.split,
                check_counts=False,
                check_images=False,
                allow_outside_images=allow_outside_images,
            )
            rows = choose(read_predictions(summary.folder), count)
            write_image(output / f"pictures-{file_name(summary)}.png", draw_predictions(rows, benchmark))


def file_name(summary: Summary) -> str:
    """The part of a file name that belongs to one run."""
    return safe_name(summary.benchmark, summary.split, summary.protocol, summary.model)


def safe_name(*parts: str) -> str:
    """The parts as one name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts))


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of `predictions.jsonl` of a finished run.

    Raises:
        ReportError: the file is missing or damaged.
    """
    path = folder / "predictions.jsonl"
    try:
        return [dict(row) for _, row in read_rows(path)]
    except (OSError, TypeError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}. Repeat the run.") from error


def choose(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Half right and half wrong answers, as far as there are any, in the order of the SHA-256 of their ids.

    So nobody can choose the pictures, and the same questions are shown of every model that answers them alike. A score of at
    least one half is right.
    """
    ordered = sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())
    right = [row for row in ordered if row["score"] >= 0.5]
    wrong = [row for row in ordered if row["score"] < 0.5]
    wrong_share = min(len(wrong), max(count // 2, count - len(right)))
    return [*right[: count - wrong_share], *wrong[:wrong_share]]


def draw_predictions(rows: Sequence[dict[str, Any]], benchmark: Benchmark) -> Image.Image:
    """A contact sheet: true boxes are white, those of the model yellow, right answers green, and wrong ones red.

    Raises:
        BenchmarkError: an image cannot be read.
    """
    height = SIDE + LINES * LINE
    columns, lines = min(max(1, len(rows)), COLUMNS), -(-max(1, len(rows)) // COLUMNS)
    sheet = Image.new("RGB", (columns * (SIDE + MARGIN) + MARGIN, lines * (height + 2 * MARGIN)), "white")
    for number, row in enumerate(rows):
        place = (MARGIN + number % COLUMNS * (SIDE + MARGIN), MARGIN + number // COLUMNS * (height + 2 * MARGIN))
        sheet.paste(_draw(row, benchmark, (SIDE, height)), place)
    return sheet


def _draw(row: dict[str, Any], benchmark: Benchmark, size: tuple[int, int]) -> Image.Image:
    """One question: its images, and below them prompt, answer and truth, of three lines each at most."""
    picture = Image.new("RGB", size, "white")
    picture.paste(_image_of(row, benchmark))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    truth = "; ".join(row.get("references", ())[:1])
    colors = ("black", RIGHT if row["score"] >= 0.5 else WRONG, "#555555")
    y = SIDE + 4
    for text, color in zip((row["prompt"], row["answer"], truth and f"({truth})"), colors, strict=True):
        for line in textwrap.wrap(text, CHARACTERS, max_lines=3, placeholder=" …"):
            pen.text((0, y), line, fill=color, font=font)
            y += LINE
    return picture


def _image_of(row: dict[str, Any], benchmark: Benchmark) -> Image.Image:
    """The images of a question beside each other in a square, with its boxes."""
    images = [benchmark.read_image(name) for name in row["images"]]
    square = Image.new("RGB", (SIDE, SIDE), "#dddddd")
    part = SIDE // max(1, len(images))
    for number, image in enumerate(images):
        scale = min(part / image.width, SIDE / image.height)
        shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        pen = ImageDraw.Draw(shown)
        for color, places in ((TRUE_BOX, row["boxes"]), (BOX, row["parsed"] or ())) if "boxes" in row else ():
            for place in places:
                _mark(pen, [value * scale for value in place], color)
        square.paste(shown, (number * part, 0))
    return square


def _mark(pen: ImageDraw.ImageDraw, place: list[float], color: str) -> None:
    """Draws a point, a box, or the four corners of an oriented box."""
    if len(place) == 8:
        pen.polygon(place, outline=color)
    elif len(place) == 4:
        x1, y1, x2, y2 = place
        pen.rectangle((min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1), outline=color)
    else:
        x, y = place
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), outline="black", fill=color)
