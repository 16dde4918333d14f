"""VRSBench, referring: boxes of referring expressions in the validation images."""

from .info import BenchmarkInfo
from .vrsbench import IMAGE_SIZE, SOURCE, load_referring


BENCHMARK = BenchmarkInfo(
    loader=load_referring,
    splits={"val": 16159},
    default_split="val",
    tasks=("grounding",),
    image_size=IMAGE_SIZE,
    source=SOURCE,
)
