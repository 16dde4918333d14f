"""RSITMD: five captions for each of 4,743 images."""

from .info import BenchmarkInfo
from .karpathy_captions import CaptionFiles


BENCHMARK = BenchmarkInfo(
    loader=CaptionFiles(
        captions=("dataset_RSITMD.json", "dataset_rsitmd.json"),
        images=("images",),
        total=4743,
        precomp=("rsitmd_precomp",),
        precomp_splits={"train": "train", "test": "test"},
    ).load,
    splits={"train": 4291, "test": 452},
    tasks=("captioning",),
    source="https://github.com/xiaoyuan1996/AMFMN",
)
