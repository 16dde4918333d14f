"""RSVQA-LR: questions about Sentinel-2 images of 10 m a pixel. Counts are compared in classes, as published."""

from .info import BenchmarkInfo
from .rsvqa import RSVQAFiles
from .sample import Metric


BENCHMARK = BenchmarkInfo(
    loader=RSVQAFiles(
        prefix="LR_split",
        images=("Images_LR",),
        types=("presence", "count", "comp", "rural_urban"),
        all_questions=("all_questions.json",),
        all_answers=("all_answers.json",),
    ).load,
    splits={"train": 57223, "val": 10005, "test": 10004},
    tasks=("vqa",),
    metrics={"vqa": (Metric("rsvqa_accuracy", {"bins": "lr"}),)},
    numeric_types=("count",),
    image_size=(256, 256),
    source="https://zenodo.org/records/6344334",
)
