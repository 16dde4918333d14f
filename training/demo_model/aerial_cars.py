"""Cars in frames of aerial videos: crops to train on, and the count error on frames of other videos.

    DIR/aerial_cars/images/*.jpg
    DIR/aerial_cars/boxes.json      [{"image", "width", "height", "objects": [{"class", "box": [x1, y1, x2, y2]}]}, ...]

Frames of one video resemble each other, so whole videos are held out.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...evaluation.answering import Answerer, Prompt
from ...evaluation.intervals import corpus_figure
from ...evaluation.protocols import PROTOCOLS
from ...files.reading import read_json
from ...files.writing import write_file, write_image
from .photographs import PROTOCOL, TRANSFORMS, transform


HELD_OUT = ("DJI_0013", "DJI_0762")  # videos
CROPS = 24  # of a frame, three in each of the rotations and mirror images
TILES = (3, 2)  # columns and rows of a frame
# Side of a crop as a share of the longer side of the frame. Frames of stills and of narrow streets show less ground.
SHARE = {"MOS": (0.18, 0.3), "MunichStreet02-MOS": (0.18, 0.3), "": (0.22, 0.4)}
KINDS = {"car": "cars", "bus": "buses"}
LISTED = 5  # most boxes in an answer
SIDE = 512  # of the written crops


def video_of(image: str) -> str:
    """The video of a frame: its name without the number."""
    return re.sub(r"[-_]?\d+$", "", Path(image).stem)


def read_frames(real: Path) -> list[dict[str, Any]]:
    """The rows of boxes.json; an empty list without the folder."""
    path = real / "aerial_cars" / "boxes.json"
    return read_json(path) if path.exists() else []


def count_prompt(kind: str) -> str:
    return PROTOCOLS[PROTOCOL]().counting_prompt(f"How many objects of the class {kind!r} are there in this image?", ())


def all_boxes_prompt(kind: str) -> str:
    return f"Give the bounding box of every {kind} as [x_min, y_min, x_max, y_max], each number scaled to 0-1000."


def inside(objects: Sequence[dict[str, Any]], kind: str, left: float, top: float, width: float, height: float) -> np.ndarray:
    """(n, 4): boxes of a kind whose center is in a crop, clipped, in thousandths of the crop, from top to bottom."""
    boxes = np.array([one["box"] for one in objects if one["class"] == kind], dtype=np.float64).reshape(-1, 4)
    boxes = (boxes - [left, top, left, top]) / [width, height, width, height]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = boxes[((center >= 0) & (center < 1)).all(1)]
    kept = kept[np.lexsort((kept[:, 0], kept[:, 1]))]
    return np.round(1000 * kept.clip(0, 1))


def transform_boxes(boxes: np.ndarray, number: int) -> np.ndarray:
    """Boxes (n, 4) in thousandths of an image, for the image that was transformed by `number`, from top to bottom."""
    if number >= TRANSFORMS // 2:
        boxes = np.stack([1000 - boxes[:, 2], boxes[:, 1], 1000 - boxes[:, 0], boxes[:, 3]], axis=1)
    for _ in range(number % 4):  # what is on the right comes to the top
        boxes = np.stack([boxes[:, 1], 1000 - boxes[:, 2], boxes[:, 3], 1000 - boxes[:, 0]], axis=1)
    return boxes[np.lexsort((boxes[:, 0], boxes[:, 1]))]


def write_car_rows(real: Path, output: Path, seed: int = 0) -> Path:
    """Writes crops of the frames that are not held out, and rows about them, once.

    Returns:
        The file of rows, see `training.data`; images are relative to `output`.
    """
    path = output / "rows.json"
    if path.exists():
        return path
    (output / "images").mkdir(parents=True, exist_ok=True)
    rng, wording, rows = random.Random(seed), random.Random(seed), []
    for frame in read_frames(real):
        video = video_of(frame["image"])
        if video in HELD_OUT:
            continue
        with Image.open(real / "aerial_cars" / frame["image"]) as image:
            picture = image.convert("RGB")
        least, most = SHARE.get(video, SHARE[""])
        for number in range(CROPS):
            side = min(rng.uniform(least, most) * max(picture.size), *picture.size)
            left, top = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
            crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            turned = Image.fromarray(transform(np.asarray(crop), number % TRANSFORMS))
            name = f"images/{Path(frame['image']).stem}-{number}.jpg"
            write_image(output / name, turned, quality=90)
            turns = []
            for kind in KINDS:
                boxes = transform_boxes(inside(frame["objects"], kind, left, top, side, side), number % TRANSFORMS)
                if kind == "car" or len(boxes) or rng.random() < 0.3:
                    question = count_prompt(kind) if wording.random() < 0.5 else f"How many {KINDS[kind]} are there?"
                    turns.append((question, str(len(boxes))))
                if 0 < len(boxes) <= LISTED:
                    listed = " ".join(f"[{', '.join(f'{value:.0f}' for value in box)}]" for box in boxes)
                    turns.append((all_boxes_prompt(kind), listed))
            rows.append(
                {
                    "image": name,
                    "conversations": [
                        {"from": role, "value": text}
                        for index, (question, answer) in enumerate(turns)
                        for role, text in (("human", ("<image>\n" if index == 0 else "") + question), ("gpt", answer))
                    ],
                }
            )
    write_file(path, json.dumps(rows))
    return path


def count_figures(model: Any, processor: Any, real: Path) -> dict[str, Any]:
    """Counts of cars in the frames of the held-out videos: the sum over tiles of a frame.

    Returns:
        `error`: sum of the absolute errors over the sum of the cars, with its interval over frames; `true` and `counted`,
        one for each frame.
    """
    answerer, true, counted = Answerer(model, processor, max_new_tokens=8), [], []
    prompts = [Prompt(count_prompt("car"), number) for number in range(TILES[0] * TILES[1])]
    for frame in read_frames(real):
        if video_of(frame["image"]) not in HELD_OUT:
            continue
        with Image.open(real / "aerial_cars" / frame["image"]) as image:
            picture = image.convert("RGB")
        width, height = picture.width / TILES[0], picture.height / TILES[1]
        tiles = []
        for row in range(TILES[1]):
            for column in range(TILES[0]):
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                tiles.append([picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)])
        replies = answerer.answer(prompts, answerer.encode_images(tiles, prompts))
        found = [re.search(r"\d{1,3}", reply.text) for reply in replies]
        counted.append(sum(int(number.group()) for number in found if number))
        true.append(len([one for one in frame["objects"] if one["class"] == "car"]))
    truth, errors = np.array(true), np.abs(np.array(true) - np.array(counted))
    return {
        "error": corpus_figure(lambda drawn: float(drawn @ errors / max(1, drawn @ truth)), len(true)),
        "true": true,
        "counted": counted,
    }
