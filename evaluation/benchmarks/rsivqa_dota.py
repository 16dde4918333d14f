"""RSIVQA about DOTA: presence and counts of objects."""

from .info import BenchmarkInfo
from .rsivqa import SOURCE, RSIVQAFiles


BENCHMARK = BenchmarkInfo(
    loader=RSIVQAFiles(files={"train": ("DOTA/dota_train_vqa2.txt",), "val": ("DOTA/dota_val_vqa2.txt",)}).load,
    splits={"train": 12389, "val": 4041},
    default_split="val",
    tasks=("vqa",),
    source=SOURCE,
)
