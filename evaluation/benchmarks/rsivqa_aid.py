"""RSIVQA about AID, with the images and names of RSICD: the theme of each image."""

from .info import BenchmarkInfo
from .rsivqa import SOURCE, RSIVQAFiles


BENCHMARK = BenchmarkInfo(
    loader=RSIVQAFiles(files={"theme": ("AID/rsicd_vqa.txt",)}, images=("RSICD_images", "images")).load,
    splits={"theme": 10921},
    default_split="theme",
    tasks=("vqa",),
    source=SOURCE,
)
