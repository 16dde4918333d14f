"""AID: scene classification, 30 classes, 10,000 images from Google Earth."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "airport", "bare land", "baseball field", "beach", "bridge", "center", "church", "commercial", "dense residential",
    "desert", "farmland", "forest", "industrial", "meadow", "medium residential", "mountain", "park", "parking",
    "playground", "pond", "port", "railway station", "resort", "river", "school", "sparse residential", "square",
    "stadium", "storage tanks", "viaduct",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("AID",),
    ).load,
    splits={ALL: 10000},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    image_size=(600, 600),
    source="https://captain-whu.github.io/AID/",
)
