"""RSIVQA about HRRSD: presence and counts of objects."""

from .info import BenchmarkInfo
from .rsivqa import SOURCE, RSIVQAFiles


BENCHMARK = BenchmarkInfo(
    loader=RSIVQAFiles(files={"val": ("HRRSD/opt_val_vqa.txt",)}, images=("images", "JPEGImages")).load,
    splits={"val": 78834},
    default_split="val",
    tasks=("vqa",),
    source=SOURCE,
)
