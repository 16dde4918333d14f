"""RSIVQA about the Sydney captions' images: the theme of each image."""

from .info import BenchmarkInfo
from .rsivqa import SOURCE, RSIVQAFiles


BENCHMARK = BenchmarkInfo(
    loader=RSIVQAFiles(files={"theme": ("Sydney/sydney_vqa.txt",)}).load,
    splits={"theme": 613},
    default_split="theme",
    tasks=("vqa",),
    image_size=(500, 500),
    source=SOURCE,
)
