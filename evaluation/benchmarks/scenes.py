"""Synthetic scenes of this package: drawn on demand, or read from the output of `python -m mfrsvlm.scenes`."""

import functools
from pathlib import Path

from PIL import Image

from ...files.reading import shorten
from ...scenes import CLASSES, KINDS, Question, ask, draw
from ...scenes import TASKS as SCENE_TASKS
from ...scenes.dataset import DatasetPlan
from ...scenes.drawing import SPLITS
from ...scenes.questions import NOTHING, PLURALS, template
from .info import BenchmarkInfo
from .reading import as_index, inside, read_json_rows, take, take_box, take_known, take_size, take_text
from .sample import BOX_TASKS, LIST_TASKS, METRICS, Benchmark, BenchmarkError, Metric, Sample


# Task of a scene -> task of a benchmark; all others are questions with a short answer.
TASKS = {
    "classification": "classification",
    "count": "counting",
    "caption": "captioning",
    **{task: task for task in BOX_TASKS},
}


LARGEST = 10**9  # above all counts


def load_scenes(name: str, root: Path | None, split: str, check_counts: bool, count: int = 1000) -> Benchmark:
    """All questions about the scenes of a split. The group is the task of the question, or for classification the class.

    Args:
        root: folder with `SPLIT.jsonl`; `None` draws the first `count` scenes of the split, 512 pixels a side, with one
            question per task.
        count: number of scenes; ignored if `root` is given.

    Raises:
        BenchmarkError: see `reading`.
    """
    if root is not None:
        return Benchmark(name, split, root, _read(root / f"{split}.jsonl"), list(CLASSES))
    plan = DatasetPlan(split, count)
    samples = []
    for index in range(count):
        image = f"{split}-{index:07d}"
        for number, question in enumerate(ask(plan.scene(index), plan.tasks)):
            samples.append(_sample(f"{image}-{number}", (image,), question, plan.size))
    return Benchmark(name, split, None, samples, list(CLASSES), functools.partial(_draw, plan))


def _draw(plan: DatasetPlan, image: str) -> Image.Image:
    return draw(plan.scene(int(image.rsplit("-", 1)[1])))


def _read(path: Path) -> list[Sample]:
    samples = []
    for number, row in read_json_rows(path):
        images = take(row, "image", (str, list), path, number)
        turns = take(row, "conversations", list, path, number)
        size, _ = take_size([take(row, "size", int, path, number)] * 2, path, number)
        question = Question(
            take_known(take_text(row, "task", path, number), (*SCENE_TASKS, "change"), "task", path, number),
            take_text(turns[0] if turns else {}, "value", path, number).replace("<image>", "").strip(),
            take_text(row, "answer", path, number),
            [
                inside(take_box(box, (4,), path, number), (size, size), path, number)
                for box in take(row, "boxes", list, path, number)
            ],
        )
        if question.task == "grounding" and not question.boxes:
            raise BenchmarkError(f"{path}, row {number}: a grounding question without a box.")
        if question.task in LIST_TASKS and (question.answer == NOTHING) == bool(question.boxes):
            raise BenchmarkError(
                f"{path}, row {number}: the answer {shorten(question.answer)} to a {question.task} question with "
                f"{len(question.boxes)} boxes. Without boxes, it must be {NOTHING!r}."
            )
        if question.task == "count" and as_index(question.answer, LARGEST) is None:
            raise BenchmarkError(f"{path}, row {number}: the count {shorten(question.answer)} is not an integer.")
        if question.task == "classification":
            take_known(question.answer, CLASSES, "class", path, number)
        names = (images,) if isinstance(images, str) else tuple(images)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise BenchmarkError(f"{path}, row {number}: 'image' is {shorten(images)}, not the names of images.")
        samples.append(_sample(take_text(row, "id", path, number), names, question, size))
    return samples


def _sample(sample_id: str, images: tuple[str, ...], question: Question, size: int) -> Sample:
    has_boxes = question.task in BOX_TASKS
    return Sample(
        id=sample_id,
        images=images,
        task=TASKS.get(question.task, "vqa"),
        question=question.text,
        references=() if has_boxes else (question.answer,),
        group=question.answer if question.task == "classification" else question.task,
        template=template(question.text),
        boxes=tuple(question.boxes) if has_boxes else (),
        image_size=(size, size) if has_boxes else None,
    )


BENCHMARK = BenchmarkInfo(
    loader=load_scenes,
    splits=dict.fromkeys(SPLITS),
    needs_root=False,
    tasks=("classification", "vqa", "counting", "grounding", "captioning", *LIST_TASKS),
    complete_prompts=True,
    metrics={
        "captioning": (
            *METRICS["captioning"],
            Metric(
                "caption_facts", {"class_names": list(CLASSES), "kinds": {kind: [kind, PLURALS[kind]] for kind in KINDS}}
            ),
        )
    },
    source="docs/scenes.md",
)
