"""Which band of a sensor is which, and how its numbers become reflectance.

Names of bands are the common names of STAC (https://github.com/stac-extensions/eo).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RasterError


@dataclass(frozen=True)
class Sensor:
    """The products of one sensor.

    Attributes:
        name: what `--sensor` takes.
        product: matches the file names that its provider gives.
        bands: the provider's name of each band, in its order, and the common name.
        layouts: the bands of files that hold this many. Counts that occur in more than one order are left out.
        scale: stored number to reflectance, together with `offset`. `None` if unknown.
        offset: added after scaling. `None` if it depends on the product.
    """

    name: str
    product: re.Pattern[str]
    bands: Mapping[str, str]
    layouts: Mapping[int, tuple[str, ...]]
    scale: float | None = None
    offset: float | None = None


def _bands(text: str) -> dict[str, str]:
    return dict(part.split(":") for part in text.split())


SENTINEL_2_BANDS = _bands(
    "B1:coastal B2:blue B3:green B4:red B5:rededge071 B6:rededge075 B7:rededge078 B8:nir B8A:nir08 B9:nir09 B10:cirrus "
    "B11:swir16 B12:swir22"
)
LANDSAT_BANDS = _bands(
    "B1:coastal B2:blue B3:green B4:red B5:nir08 B6:swir16 B7:swir22 B8:pan B9:cirrus B10:lwir11 B11:lwir12"
)
RGB = ("red", "green", "blue")

SENSORS = {
    sensor.name: sensor
    for sensor in (
        Sensor(
            name="sentinel-2",
            product=re.compile(r"(^|[/\\_:])S2[ABC]_(MSIL(1C|2A)_|\d)|(^|[/\\:])T\d{2}[A-Z]{3}_\d{8}T\d{6}_", re.IGNORECASE),
            bands=SENTINEL_2_BANDS,
            layouts={
                13: tuple(SENTINEL_2_BANDS.values()),
                12: tuple(name for name in SENTINEL_2_BANDS.values() if name != "cirrus"),  # surface reflectance
            },
            scale=1e-4,
        ),
        Sensor(
            name="landsat-8-9",
            product=re.compile(r"(^|[/\\:])L[CO]0[89]_(L1|L2)", re.IGNORECASE),
            bands=LANDSAT_BANDS,
            layouts={7: tuple(LANDSAT_BANDS.values())[:7], 11: tuple(LANDSAT_BANDS.values())},
            scale=2.75e-5,  # surface reflectance of collection 2
            offset=-0.2,
        ),
        Sensor(
            name="naip",
            product=re.compile(r"(^|[/\\:])m_\d{7}_(ne|nw|se|sw)_\d{1,2}_", re.IGNORECASE),
            bands={},
            layouts={3: RGB, 4: (*RGB, "nir")},
        ),
        Sensor(
            name="planetscope",
            product=re.compile(r"_3B_(AnalyticMS|Visual|ortho)", re.IGNORECASE),
            bands={},
            layouts={
                3: RGB,
                4: ("blue", "green", "red", "nir"),
                8: ("coastal", "blue", "green05", "green", "yellow", "red", "rededge", "nir"),
            },
            scale=1e-4,
            offset=0.0,
        ),
    )
}
ALIASES = {"landsat-8": "landsat-8-9", "landsat-9": "landsat-8-9", "sentinel-2a": "sentinel-2", "sentinel-2b": "sentinel-2"}


def find_sensor(name: str | None, file_name: str) -> Sensor | None:
    """The sensor of that name or, without a name, the one whose products are called like the file.

    Raises:
        RasterError: there is no preset of that name.
    """
    if name is None:
        return next((sensor for sensor in SENSORS.values() if sensor.product.search(file_name)), None)
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = ALIASES.get(key, key)
    if key not in SENSORS:
        raise RasterError(f"unknown sensor {name!r}. Presets are {', '.join(SENSORS)}; for others give --bands (bands=).")
    return SENSORS[key]


def common_name(label: str, sensor: Sensor | None) -> str | None:
    """The common name that a label states, such as `Red`, or `B04` and `SR_B4` of a known sensor."""
    word = label.split(",")[0].strip()  # "B4, central wavelength 665 nm"
    if word.lower() in COMMON_NAMES:
        return COMMON_NAMES[word.lower()]
    band = re.fullmatch(r"(?:SR_|TOA_)?B(?:AND)?[ _]?0*(\d+A?)", word, re.IGNORECASE)
    return sensor.bands.get(f"B{band[1].upper()}") if sensor and band else None


COMMON_NAMES = {
    name: name
    for sensor in SENSORS.values()
    for names in (sensor.bands.values(), *sensor.layouts.values())
    for name in names
} | {name: name for name in ("vv", "vh", "hh", "hv")}
COMMON_NAMES |= {"nir1": "nir", "near infrared": "nir", "near-infrared": "nir", "swir1": "swir16", "swir2": "swir22"}


def reflectance_of(sensor: Sensor, file_name: str, tags: Mapping[str, str]) -> tuple[float, float] | None:
    """Scale and offset from stored numbers to reflectance, or `None` if the product does not say.

    Sentinel-2 products from processing baseline 04.00 on are stored with 1000 added. The baseline stands in the product's
    name or in its metadata. Copies by other providers may have it removed, so it is never inferred from a date.
    """
    if sensor.scale is None:
        return None
    if sensor.offset is not None:
        return sensor.scale, sensor.offset
    written = re.search(r"_N(\d{2})(\d{2})_", file_name)
    baseline = written[1] + "." + written[2] if written else tags.get("PROCESSING_BASELINE")
    if baseline is None:
        return None
    return sensor.scale, -0.1 if float(baseline) >= 4 else 0.0
