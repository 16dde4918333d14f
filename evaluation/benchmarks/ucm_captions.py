"""UCM captions: five captions for each of the 2,100 images of UC Merced."""

from .info import BenchmarkInfo
from .karpathy_captions import CaptionFiles


BENCHMARK = BenchmarkInfo(
    loader=CaptionFiles(
        captions=("dataset.json",),
        images=("imgs", "images"),
        total=2100,
        precomp=("ucm_precomp",),
        precomp_splits={"trainval": "train", "test": "test"},
    ).load,
    splits={"train": None, "val": None, "trainval": 1890, "test": 210},
    tasks=("captioning",),
    image_size=(256, 256),
    size_tolerance=14,  # as in UC Merced
    source="https://github.com/201528014227051/RSICD_optimal",
)
