"""Decides which bands of a raster are shown, and says what the decision rests on.

Band order cannot be guessed: NAIP files (red, green, blue, near infrared) and Landsat exports (SWIR, near infrared, red,
green) exist with identical metadata.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .composites import COMPOSITES
from .errors import RasterError
from .sensors import SENSORS, Sensor, common_name


COLOURS = ("red", "green", "blue")
NAMED_INTERPRETATIONS = frozenset({*COLOURS, "nir", "coastal", "pan", "yellow"})
SERVING = {"nir": ("nir08",), "nir08": ("nir",)}  # what stands for a band that a raster lacks
ADVICE = f"Name them: --bands 3,2,1 (bands=), counted from one, or --sensor (sensor=) {', '.join(SENSORS)}."


@dataclass(frozen=True)
class Label:
    """What a file says about one band: its colour interpretation, in GDAL's words, and its description."""

    interpretation: str = "undefined"
    description: str | None = None


@dataclass(frozen=True)
class Naming:
    """The common name of each band, `None` where nothing names it, and where the names come from.

    Attributes:
        labels: what the file says.
        names: one per band.
        origin: such as "colour interpretation"; `None` if no band has a name.
        hint: why the sensor's preset named no band.
    """

    labels: tuple[Label, ...]
    names: tuple[str | None, ...]
    origin: str | None
    hint: str = ""

    @property
    def shown(self) -> list[int]:
        """Positions, from zero, of the bands that are no alpha."""
        return [i for i, label in enumerate(self.labels) if label.interpretation != "alpha"]


@dataclass(frozen=True)
class Selection:
    """The bands that are read.

    Attributes:
        positions: from zero, in the order that the composite wants them.
        names: one per position; `None` where nothing names the band.
        origin: what the selection rests on.
        composite: key in `COMPOSITES`.
        note: an assumption that the user should know.
    """

    positions: tuple[int, ...]
    names: tuple[str | None, ...]
    origin: str
    composite: str
    note: str | None = None


def name_bands(labels: Sequence[Label], sensor: Sensor | None, sensor_is_given: bool) -> Naming:
    """Names the bands by colour interpretation, else by description, else by the sensor's preset for that many bands.

    What a better source leaves open is filled in from the next one, if it does not contradict.
    """
    places = [i for i, label in enumerate(labels) if label.interpretation != "alpha"]
    preset = sensor.layouts.get(len(places), ()) if sensor else ()
    sources = {
        "colour interpretation": [_name_of_colour(labels[i]) for i in places],
        "descriptions": [common_name(labels[i].description or "", sensor) for i in places],
        "sensor" if sensor_is_given else "file name": list(preset) or [None] * len(places),
    }
    names: list[str | None] = [None] * len(labels)
    used = []
    for origin, found in sources.items():
        pairs = [(place, name) for place, name in zip(places, found, strict=True) if name]
        clashes = any(names[place] != name and (names[place] or name in names) for place, name in pairs)
        new = [(place, name) for place, name in pairs if names[place] is None]
        if clashes or not new or len({name for _, name in new}) < len(new):
            continue
        used.append(origin)
        for place, name in new:
            names[place] = name
    hint = ""
    if sensor and not preset:
        hint = f" The preset {sensor.name} knows files of {' or '.join(map(str, sorted(sensor.layouts)))} bands."
    return Naming(tuple(labels), tuple(names), " and ".join(used) or None, hint)


def _name_of_colour(label: Label) -> str | None:
    return label.interpretation if label.interpretation in NAMED_INTERPRETATIONS else None


def select_bands(naming: Naming, bands: str | int | Sequence[int | str] | None, composite: str, shown: str) -> Selection:
    """The bands for a composite.

    Args:
        naming: the bands' names.
        bands: numbers counted from one, or names, as a sequence or with commas; `None` leaves the choice to the names.
        composite: key in `COMPOSITES`.
        shown: the raster in a message.

    Raises:
        RasterError: nothing says which bands they are, or they do not exist.
    """
    wanted = COMPOSITES[composite].bands
    if bands is not None:
        positions = [_position(band, naming, shown) for band in _split(bands)]
        if len(positions) != len(wanted) and not (composite == "true_color" and len(positions) == 1):
            count = "3 bands, or 1 for grey" if composite == "true_color" else f"{len(wanted)} for {composite}"
            raise RasterError(f"{shown}: {len(positions)} bands were given, and it takes {count}.")
        return Selection(tuple(positions), tuple(naming.names[i] for i in positions), "bands given", composite)
    places = naming.shown
    if composite in ("true_color", "sar") and len(places) == 1:
        return Selection((places[0],), (naming.names[places[0]],), "the only band", composite)
    found = [next((name for name in names if name in naming.names), None) for names in wanted]
    if all(found):
        positions = [naming.names.index(name) for name in found]
        return Selection(tuple(positions), tuple(found), naming.origin or "names", composite)
    unnamed = not any(naming.names) and not any(naming.labels[i].description for i in places)
    if composite == "true_color" and len(places) == 3 and unnamed:
        note = f"{shown} does not say what its 3 bands are; they are taken as red, green and blue."
        return Selection(tuple(places), COLOURS, "three unnamed bands", composite, note)
    known = [name or naming.labels[i].description or "unnamed" for i, name in enumerate(naming.names) if i in places]
    missing = [" or ".join(names) for names, name in zip(wanted, found, strict=True) if name is None]
    raise RasterError(
        f"{shown} has {len(places)} bands ({_summary(known)}), and nothing says which is {', '.join(missing)}."
        f"{naming.hint} {ADVICE}"
    )


def select_image_bands(naming: Naming, image_bands: Sequence[str], missing: str, shown: str) -> Selection | None:
    """The bands of a model that a raster has, in the order of the model.

    Args:
        naming: the bands' names.
        image_bands: names of the bands of the model.
        missing: "fill": bands that the raster lacks are noted; "refuse": they are an error.
        shown: the raster in a message.

    Returns:
        The bands under the names of the model; `None` if no band of the raster is named as one of them.

    Raises:
        RasterError: a band is missing, and `missing` is "refuse".
    """
    if missing not in ("fill", "refuse"):
        raise RasterError(f"missing_bands={missing!r} must be 'fill' or 'refuse'.")
    found = {}
    for name in image_bands:
        served = next((other for other in (name, *SERVING.get(name, ())) if other in naming.names), None)
        if served is not None:
            found[name] = naming.names.index(served)
    lacking = [name for name in image_bands if name not in found]
    text = f"{shown} lacks {', '.join(lacking)} of the bands of the model ({', '.join(image_bands)})"
    if lacking and missing == "refuse":
        raise RasterError(f"{text}. Name its bands with --sensor (sensor=), or permit it: --missing-bands fill.")
    note = f"{text}: they are zero, as if unknown." if lacking else None
    if not found:
        return None
    return Selection(tuple(found.values()), tuple(found), naming.origin or "names", "bands", note)


def _summary(names: list[str]) -> str:
    if set(names) == {"unnamed"}:
        return "unnamed"
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _split(bands: str | int | Sequence[int | str]) -> list[int | str]:
    if isinstance(bands, int):
        return [bands]
    return [part.strip() for part in bands.split(",")] if isinstance(bands, str) else list(bands)


def _position(band: int | str, naming: Naming, shown: str) -> int:
    text, count = str(band), len(naming.names)
    if text.isdecimal():
        if not 1 <= int(text) <= count:
            raise RasterError(f"{shown} has no band {text}: it has {count}, counted from one.")
        return int(text) - 1
    labels = [label.description for label in naming.labels]
    for names in (naming.names, labels):
        if text in names:
            return list(names).index(text)
    known = [name or label or str(i) for i, (name, label) in enumerate(zip(naming.names, labels, strict=True), start=1)]
    raise RasterError(f"{shown} has no band {text!r}: it has {', '.join(known[:20])}.")
