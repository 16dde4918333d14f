"""VRSBench, vqa: questions with short answers about the validation images."""

from .info import BenchmarkInfo
from .vrsbench import IMAGE_SIZE, SOURCE, load_questions


BENCHMARK = BenchmarkInfo(
    loader=load_questions,
    splits={"val": 37409},
    default_split="val",
    tasks=("vqa",),
    image_size=IMAGE_SIZE,
    source=SOURCE,
)
