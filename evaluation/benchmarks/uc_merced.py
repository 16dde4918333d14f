"""UC Merced Land Use: scene classification, 21 classes of 100 images."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "agricultural", "airplane", "baseball diamond", "beach", "buildings", "chaparral", "dense residential", "forest",
    "freeway", "golf course", "harbor", "intersection", "medium residential", "mobile home park", "overpass",
    "parking lot", "river", "runway", "sparse residential", "storage tanks", "tennis court",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("Images", "UCMerced_LandUse/Images"),
    ).load,
    splits={ALL: 2100},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    image_size=(256, 256),
    size_tolerance=14,  # 44 of the published images are smaller or larger, from 242 to 257 pixels a side
    source="http://weegee.vision.ucmerced.edu/datasets/landuse.html",
)
