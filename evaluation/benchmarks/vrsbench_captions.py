"""VRSBench, captions: one caption for each validation image."""

from .info import BenchmarkInfo
from .vrsbench import IMAGE_SIZE, SOURCE, load_captions


BENCHMARK = BenchmarkInfo(
    loader=load_captions,
    splits={"val": 9350},
    default_split="val",
    tasks=("captioning",),
    image_size=IMAGE_SIZE,
    source=SOURCE,
)
