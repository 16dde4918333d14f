"""SIRI-WHU: scene classification, 12 classes of 200 images."""

from .class_folders import ALL, ClassFolders
from .info import BenchmarkInfo


CLASSES = (
    "agriculture", "commercial", "harbor", "idle land", "industrial", "meadow", "overpass", "park", "pond",
    "residential", "river", "water",
)  # fmt: skip

BENCHMARK = BenchmarkInfo(
    loader=ClassFolders(
        classes=CLASSES,
        inside=("12class_tif", "Google dataset of SIRI-WHU_earth_im_tiff/12class_tif"),
    ).load,
    splits={ALL: 2400},
    default_split=ALL,
    own_splits=True,
    tasks=("classification",),
    image_size=(200, 200),
    source="http://www.lmars.whu.edu.cn/prof_web/zhongyanfei/e-code.html",
)
