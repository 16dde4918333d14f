"""Other bands of a scene than those of `draw`: near infrared, short-wave infrared, radar, and narrow bands.

Every material has a reflectance and a radar backscatter of the order that spectral libraries and radar handbooks give for
it. They are made up, and no measurement. Some materials have a twin that looks the same in red, green and blue: healthy and
dry vegetation, dry and wet ground, tiles and painted metal. Whatever RGB shows is drawn by `draw` and knows nothing of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .drawing import Scene, _draw_clutter, _draw_roads, _ground, _parts, draw
from .questions import Question


RGB = ("red", "green", "blue")
# Centers of the broad bands, nm.
WAVELENGTHS = {"blue": 480, "green": 560, "red": 660, "nir": 860, "swir16": 1610, "swir22": 2200}
RADAR = ("vv", "vh")
LOOKS = 4  # of the radar: the variance of speckle is the square of the mean divided by it
# What is stored as 0 and 255.
REFLECTANCE_RANGE, RADAR_RANGE = (0.0, 0.6), (-30.0, 6.0)


@dataclass(frozen=True)
class Material:
    """Reflectance, 0 to 1, in the order of `WAVELENGTHS`, and backscatter in dB for VV and VH."""

    reflectance: tuple[float, float, float, float, float, float]
    backscatter: tuple[float, float]


MATERIALS = {
    "water": Material((0.06, 0.05, 0.03, 0.02, 0.01, 0.01), (-21.0, -28.0)),
    "healthy grass": Material((0.04, 0.09, 0.06, 0.45, 0.22, 0.11), (-12.0, -18.0)),
    "dry grass": Material((0.04, 0.09, 0.06, 0.19, 0.31, 0.22), (-12.0, -18.0)),
    "healthy trees": Material((0.03, 0.06, 0.04, 0.40, 0.16, 0.07), (-9.0, -14.0)),
    "dry trees": Material((0.03, 0.06, 0.04, 0.17, 0.26, 0.18), (-9.0, -14.0)),
    "soil": Material((0.10, 0.15, 0.20, 0.27, 0.36, 0.31), (-13.0, -21.0)),
    "sand": Material((0.20, 0.27, 0.33, 0.38, 0.46, 0.41), (-17.0, -25.0)),
    "asphalt": Material((0.08, 0.09, 0.10, 0.12, 0.15, 0.14), (-17.0, -25.0)),
    "concrete": Material((0.22, 0.24, 0.26, 0.29, 0.31, 0.28), (-11.0, -19.0)),
    "metal": Material((0.35, 0.35, 0.35, 0.34, 0.32, 0.30), (1.0, -6.0)),
    "tile roof": Material((0.10, 0.14, 0.28, 0.36, 0.40, 0.34), (-5.0, -13.0)),
    "metal roof": Material((0.10, 0.14, 0.28, 0.12, 0.10, 0.09), (3.0, -5.0)),
}
NAMES = list(MATERIALS)
WET = 5.0  # dB that wet ground gives more than dry ground
LAND = {"forest": "trees", "industrial": "concrete", "desert": "sand"}  # of the classes; grass elsewhere
BARREN = ("industrial", "desert")


@dataclass(frozen=True)
class Twins:
    """What red, green and blue do not show.

    Attributes:
        vegetation: "healthy" or "dry".
        ground: "wet" or "dry", all that is no water and no object.
        metal_roofs: for every building of the scene in its order.
    """

    vegetation: str
    ground: str
    metal_roofs: tuple[bool, ...]


def twins_of(scene: Scene) -> Twins:
    """Which twin is there. Independent of everything that is drawn, and of each other."""
    rng = np.random.default_rng([scene.seed, 7])
    vegetation, ground = (options[int(rng.integers(2))] for options in (("healthy", "dry"), ("wet", "dry")))
    return Twins(vegetation, ground, tuple(bool(flag) for flag in rng.integers(0, 2, scene.counts["building"])))


def materials(scene: Scene) -> np.ndarray:
    """The material of every pixel, (size, size), an index into `NAMES`."""
    rng = np.random.default_rng([scene.seed, 2])  # the numbers that `draw` takes, in its order
    twins = twins_of(scene)
    grass, trees = (NAMES.index(f"{twins.vegetation} {plant}") for plant in ("grass", "trees"))
    kind = LAND.get(scene.scene_class, "grass")
    base = {"grass": grass, "trees": trees}.get(kind) or NAMES.index(kind)
    labels = np.full((scene.size, scene.size), base, np.uint8)
    _, shore, bank = _ground(rng, scene)
    if bank is not None:
        labels[bank] = NAMES.index("sand" if scene.scene_class == "beach" else "concrete")
    if shore is not None:
        labels[shore < 0] = NAMES.index("water")
    # Drawn on black, the same functions show where they draw.
    roads, clutter = (Image.new("RGB", (scene.size, scene.size)) for _ in range(2))
    _draw_roads(rng, roads, scene, shore)
    _draw_clutter(rng, clutter, shore)
    labels[np.asarray(roads).any(axis=2)] = NAMES.index("asphalt")
    red, green, blue = np.asarray(clutter, dtype=int).transpose(2, 0, 1)
    labels[(green > red) & (green > blue)] = trees
    labels[(red > green) & (red > 0)] = NAMES.index("soil")  # rocks; what is left is foam
    picture = Image.fromarray(labels)
    pen = ImageDraw.Draw(picture)
    roofs = iter(twins.metal_roofs)
    for item in scene.objects:
        name = "metal"
        if item.kind == "building":
            name = "metal roof" if next(roofs) else "tile roof"
        for outline, _ in _parts(item):
            pen.polygon([tuple(point) for point in item._turned(outline)], fill=NAMES.index(name))
    return np.asarray(picture)


def narrow_bands(count: int) -> list[str]:
    """Names of `count` narrow bands, evenly from 450 to 2,400 nm: `nm450`, ..."""
    return [f"nm{round(center)}" for center in np.linspace(450, 2400, count)]


def sense(scene: Scene, bands: Sequence[str], look: int = 0) -> dict[str, np.ndarray]:
    """Bands of a scene as 8 bits, (size, size), by name.

    Red, green and blue are those of `draw`. Reflectance has light and noise of its own in every band, and radar has speckle.

    Args:
        scene: the scene.
        bands: keys of `WAVELENGTHS`, `"vv"`, `"vh"`, or `"nm..."`, narrow bands by their center in nm.
        look: see `draw`.

    Raises:
        ValueError: an unknown band.
    """
    drawn = dict(zip(RGB, np.asarray(draw(scene, look)).transpose(2, 0, 1), strict=True)) if set(RGB) & set(bands) else {}
    labels = materials(scene) if set(bands) - set(RGB) else None
    result = {}
    for name in bands:
        values = drawn.get(name)
        if values is None:
            values = to_samples(measure(scene, labels, name, look), RADAR_RANGE if name in RADAR else REFLECTANCE_RANGE)
        result[name] = values
    return result


def measure(scene: Scene, labels: np.ndarray, band: str, look: int = 0) -> np.ndarray:
    """One band: reflectance, or backscatter in dB; (size, size) float32. `labels` are the `materials` of the scene."""
    if band in RADAR:
        column = [material.backscatter[RADAR.index(band)] for material in MATERIALS.values()]
        values = np.array(column, np.float32)[labels]
        if twins_of(scene).ground == "wet":
            dry = [NAMES.index(name) for name in ("water", "metal", "tile roof", "metal roof")]
            values = values + np.where(np.isin(labels, dry), 0, np.float32(WET))
        rng = np.random.default_rng([scene.seed, 8, look, RADAR.index(band)])
        speckle = rng.standard_gamma(LOOKS, labels.shape, dtype=np.float32) / LOOKS
        return values + 10 * np.log10(np.maximum(speckle, 1e-6))
    center = WAVELENGTHS.get(band) or (int(band[2:]) if band[:2] == "nm" and band[2:].isdecimal() else None)
    if center is None:
        raise ValueError(f"unknown band {band!r}: bands are {', '.join((*WAVELENGTHS, *RADAR))}, and nm850 for narrow ones.")
    spectra = np.array([material.reflectance for material in MATERIALS.values()])
    column = [np.interp(center, list(WAVELENGTHS.values()), spectrum) for spectrum in spectra]
    rng = np.random.default_rng([scene.seed, 9, look, center])
    gain = np.float32(rng.uniform(0.85, 1.15))
    grain = rng.standard_normal(labels.shape, dtype=np.float32) * np.float32(0.02)
    return np.array(column, np.float32)[labels] * gain + grain


def to_samples(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Numbers as 8 bits between two limits."""
    low, high = limits
    return np.rint((values - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def _vegetation(scene: Scene) -> Question | None:
    if scene.scene_class in BARREN:
        return None
    return Question("vegetation", "Is the vegetation healthy?", "yes" if twins_of(scene).vegetation == "healthy" else "no")


def _ground_moisture(scene: Scene) -> Question:
    return Question("moisture", "Is the ground wet?", "yes" if twins_of(scene).ground == "wet" else "no")


def _roofs(scene: Scene) -> Question | None:
    roofs = twins_of(scene).metal_roofs
    return Question("roofs", "How many roofs are made of metal?", str(sum(roofs))) if roofs else None


SENSOR_TASKS: dict[str, Callable[[Scene], Question | None]] = {
    "vegetation": _vegetation,  # near and short-wave infrared
    "moisture": _ground_moisture,  # radar
    "roofs": _roofs,  # either
}


def ask_sensors(scene: Scene, tasks: Sequence[str] = tuple(SENSOR_TASKS)) -> list[Question]:
    """One question per listed task that the scene permits, which red, green and blue do not answer.

    Raises:
        ValueError: an unknown task.
    """
    unknown = set(tasks) - set(SENSOR_TASKS)
    if unknown:
        raise ValueError(f"Unknown tasks {sorted(unknown)}; the tasks are {list(SENSOR_TASKS)}.")
    return [question for task in tasks if (question := SENSOR_TASKS[task](scene)) is not None]
