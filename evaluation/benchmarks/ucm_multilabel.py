"""UC Merced with 17 labels per image, asked as "Does this image show cars?"."""

from .info import BenchmarkInfo
from .presence_table import PresenceTable


BENCHMARK = BenchmarkInfo(
    loader=PresenceTable(
        table=("LandUse_Multilabeled.txt",),
        images=("Images", "UCMerced_LandUse/Images"),
        labels={
            "airplane": "airplanes",
            "bare-soil": "bare soil",
            "buildings": "buildings",
            "cars": "cars",
            "chaparral": "chaparral",
            "court": "a tennis court",
            "dock": "a dock",
            "field": "a field",
            "grass": "grass",
            "mobile-home": "mobile homes",
            "pavement": "pavement",
            "sand": "sand",
            "sea": "the sea",
            "ship": "ships",
            "tanks": "storage tanks",
            "trees": "trees",
            "water": "water",
        },
    ).load,
    splits={"all": 35700},
    default_split="all",
    tasks=("vqa",),
    image_size=(256, 256),
    size_tolerance=14,  # as in UC Merced
    source="https://bigearth.eu/datasets.html",
)
