"""RSVQA-HR: questions about aerial images of 15 cm a pixel. Areas are compared in classes, as published."""

from .info import BenchmarkInfo
from .rsvqa import RSVQAFiles
from .sample import Metric


BENCHMARK = BenchmarkInfo(
    loader=RSVQAFiles(
        prefix="USGS_split",
        images=("Data",),
        types=("presence", "count", "comp", "area"),
        all_questions=("USGSquestions.json", "all_questions.json"),
        all_answers=("USGSanswers.json", "all_answers.json"),
    ).load,
    splits={"train": 625340, "val": 102843, "test": 222684, "test_phili": 105647},
    second_test_split="test_phili",
    tasks=("vqa",),
    metrics={"vqa": (Metric("rsvqa_accuracy", {"bins": "hr"}),)},
    numeric_types=("count", "area"),
    image_size=(512, 512),
    source="https://zenodo.org/records/6344367",
)
