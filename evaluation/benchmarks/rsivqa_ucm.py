"""RSIVQA about UC Merced: the theme of all images (split "theme"), and further questions about 559 of them ("all")."""

from .info import BenchmarkInfo
from .rsivqa import SOURCE, RSIVQAFiles


BENCHMARK = BenchmarkInfo(
    loader=RSIVQAFiles(
        files={"theme": ("UCM/ucm_vqa.txt",), "all": ("UCM/ucm_res.txt",)},
        images=("images", "imgs", "Images", "UCMerced_LandUse/Images"),
        numbered=2100,
    ).load,
    splits={"theme": 2100, "all": 2795},
    default_split="all",
    tasks=("vqa",),
    image_size=(256, 256),
    size_tolerance=14,  # as in UC Merced
    source=SOURCE,
)
