"""METER-ML: classification of methane sources, as one folder per class."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "concentrated animal feeding operations", "coal mines", "landfills", "natural gas processing plants",
    "oil refineries and petroleum terminals", "wastewater treatment plants", "negative",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("METER_ML", "METER-ML"),
        aliases={
            "cafos": "concentrated animal feeding operations",
            "mines": "coal mines",
            "procplants": "natural gas processing plants",
            "rts": "oil refineries and petroleum terminals",
            "wwtps": "wastewater treatment plants",
            "negatives": "negative",
        },
        optional=("negative",),
    ).load,
    splits={ALL: None},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    source="https://stanfordmlgroup.github.io/projects/meter-ml",
)
