"""Sydney captions: five captions for each of 613 images."""

from .info import BenchmarkInfo
from .karpathy_captions import CaptionFiles


BENCHMARK = BenchmarkInfo(
    loader=CaptionFiles(
        captions=("dataset.json",),
        images=("imgs", "images"),
        total=613,
        precomp=("sydney_precomp",),
        precomp_splits={"trainval": "train", "test": "test"},
    ).load,
    splits={"train": None, "val": None, "trainval": None, "test": 58},
    tasks=("captioning",),
    image_size=(500, 500),
    source="https://github.com/201528014227051/RSICD_optimal",
)
