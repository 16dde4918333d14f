"""EuroSAT, the RGB release: land use, 10 classes."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "annual crop", "forest", "herbaceous vegetation", "highway", "industrial", "pasture", "permanent crop",
    "residential", "river", "sea lake",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("2750", "EuroSAT", "EuroSAT_RGB", "EuroSAT/2750"),
    ).load,
    splits={ALL: 27000},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    source="https://github.com/phelber/EuroSAT",
)
