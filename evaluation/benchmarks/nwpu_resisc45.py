"""NWPU-RESISC45: scene classification, 45 classes of 700 images."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "airplane", "airport", "baseball diamond", "basketball court", "beach", "bridge", "chaparral", "church",
    "circular farmland", "cloud", "commercial area", "dense residential", "desert", "forest", "freeway", "golf course",
    "ground track field", "harbor", "industrial area", "intersection", "island", "lake", "meadow", "medium residential",
    "mobile home park", "mountain", "overpass", "palace", "parking lot", "railway", "railway station",
    "rectangular farmland", "river", "roundabout", "runway", "sea ice", "ship", "snowberg", "sparse residential",
    "stadium", "storage tank", "tennis court", "terrace", "thermal power station", "wetland",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("NWPU-RESISC45",),
    ).load,
    splits={ALL: 31500},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    image_size=(256, 256),
    source="https://gcheng-nwpu.github.io/#Datasets",
)
