"""Writes scenes and their questions to a folder in the format of LLaVA's training data."""

import functools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files.writing import check_folder, whole_file, write_image
from .drawing import Scene, draw, plan_change, plan_scene, scene_seed
from .questions import TASKS, Question, ask, ask_change


IMAGES = "images"


@dataclass(frozen=True)
class DatasetPlan:
    """Settings of a data set, see `write_dataset`.

    Attributes:
        split: see `scene_seed`.
        count: number of scenes.
        size: side of the images, pixels.
        object_pixels: shortest and longest object, pixels.
        changes: number of scenes with a later image and a question about both images.
        tasks: see `ask`.

    Raises:
        ValueError: a setting is invalid; the message names the value.
    """

    split: str
    count: int
    size: int = 512
    object_pixels: tuple[float, float] = (8.0, 16.0)
    changes: int = 0
    tasks: tuple[str, ...] = tuple(TASKS)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1.")
        if not 0 <= self.changes <= self.count:
            raise ValueError(
                f"changes={self.changes} must lie between 0 and count={self.count}: each pair begins with one of the scenes."
            )
        if not (self.tasks or self.changes):
            raise ValueError(f"tasks={list(self.tasks)} and changes={self.changes}: nothing to ask.")
        ask(self.scene(self.count - 1), self.tasks)  # raises if another setting is invalid

    def scene(self, index: int) -> Scene:
        return plan_scene(scene_seed(self.split, index), self.size, self.object_pixels)


def write_dataset(folder: Path, plan: DatasetPlan, workers: int = 1) -> int:
    """Writes `images/*.png` and `{split}.jsonl`: scenes 0 to `count` - 1 of the split, one row per question.

    The first `changes` scenes also get a later image, and one more row with a question about both images. The output depends
    only on the plan, not on the number of workers. The JSONL file gets its final name when it is complete.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: the folder is not empty.
        WriteError: the folder or a file cannot be written.
        ValueError: `workers` is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another, or delete it first.")
    (folder / IMAGES).mkdir(parents=True)
    rows = 0
    write = functools.partial(_write_scene, folder, plan)
    with ExitStack() as stack:
        unfinished = stack.enter_context(whole_file(folder / f"{plan.split}.jsonl"))
        file = stack.enter_context(unfinished.open("x", encoding="utf-8"))
        if workers == 1:
            written = map(write, range(plan.count))
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers))
            written = pool.map(write, range(plan.count), chunksize=8)
        for group in tqdm(written, total=plan.count, desc=plan.split, unit="scene"):
            file.writelines(json.dumps(row) + "\n" for row in group)
            rows += len(group)
    return rows


def _write_scene(folder: Path, plan: DatasetPlan, index: int) -> list[dict[str, Any]]:
    """Draws the images of one scene, and returns the rows of its questions."""
    scene = plan.scene(index)
    name = f"{plan.split}-{index:07d}"
    images = [f"{IMAGES}/{name}.png"]
    questions = ask(scene, plan.tasks)
    if questions or index < plan.changes:
        write_image(folder / images[0], draw(scene))
    rows = [_row(f"{name}-{number}", question, images, scene.size) for number, question in enumerate(questions)]
    if index < plan.changes:
        later, kind, change = plan_change(scene, plan.object_pixels)
        images = [*images, f"{IMAGES}/{name}-later.png"]
        write_image(folder / images[1], draw(later, look=1))
        rows.append(_row(f"{name}-change", ask_change(kind, change), images, scene.size))
    return rows


def _row(row_id: str, question: Question, images: Sequence[str], size: int) -> dict[str, Any]:
    return {
        "id": row_id,
        "image": images[0] if len(images) == 1 else list(images),
        "conversations": [
            {"from": "human", "value": "<image>\n" * len(images) + question.text},
            {"from": "gpt", "value": question.answer},
        ],
        "source_dataset": "scenes",
        "task": question.task,
        "answer": question.answer,
        "boxes": question.boxes,
        "size": size,
    }
