"""RSICD: five captions for each of 10,921 images."""

from .info import BenchmarkInfo
from .karpathy_captions import CaptionFiles


BENCHMARK = BenchmarkInfo(
    loader=CaptionFiles(
        captions=("dataset_rsicd.json",),
        images=("RSICD_images", "images"),
        total=10921,
        precomp=("rsicd_precomp",),
        precomp_splits={"trainval": "train", "test": "test"},
    ).load,
    splits={"train": 8734, "val": 1094, "trainval": 9828, "test": 1093},
    tasks=("captioning",),
    image_size=(224, 224),
    source="https://github.com/201528014227051/RSICD_optimal",
)
