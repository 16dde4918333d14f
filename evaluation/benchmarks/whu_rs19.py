"""WHU-RS19: scene classification, 19 classes. Sources disagree on the image size, so it is not checked."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "airport", "beach", "bridge", "commercial", "desert", "farmland", "football field", "forest", "industrial", "meadow",
    "mountain", "park", "parking", "pond", "port", "railway station", "residential", "river", "viaduct",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("WHU-RS19", "RSDataset"),
    ).load,
    splits={ALL: 1005},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    source="https://captain-whu.github.io/BED4RS/",
)
