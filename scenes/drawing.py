"""Plans a scene from a seed and draws it: land cover, roads, rivers, coasts, fields, and small objects on top.

A plan (`Scene`) determines all annotations; drawing adds only appearance. The same seed and sizes give the same plan and the
same pixels. Lengths are in pixels of the drawn image. Boxes are (x1, y1, x2, y2) with the origin at the top left.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw


KINDS = ("ship", "aircraft", "car", "tank", "building")

# Scene class -> (rural or urban, has water). Several look similar on purpose: the residential classes differ only in the
# spacing of their streets, meadow and farmland in the contrast of their fields, lake and wetland in the shape of the shore.
CLASSES = {
    "airport": ("urban", False),
    "harbor": ("urban", True),
    "industrial": ("urban", False),
    "dense residential": ("urban", False),
    "medium residential": ("urban", False),
    "sparse residential": ("rural", False),
    "highway": ("rural", False),
    "farmland": ("rural", False),
    "meadow": ("rural", False),
    "forest": ("rural", False),
    "desert": ("rural", False),
    "beach": ("rural", True),
    "river": ("rural", True),
    "lake": ("rural", True),
    "wetland": ("rural", True),
}

SPLITS = {"train": 0, "validation": 10_000_000, "test": 20_000_000, "demo": 30_000_000}
SCENES_PER_SPLIT = 10_000_000

Color = tuple[float, float, float]
GRASS, SOIL, SAND, WATER = (104, 122, 76), (150, 128, 96), (206, 188, 148), (52, 84, 108)
CROWN, ASPHALT, CONCRETE = (56, 82, 48), (98, 98, 100), (158, 156, 150)


@dataclass(frozen=True)
class SceneObject:
    """One countable object.

    Attributes:
        kind: one of `KINDS`.
        x, y: center, pixels.
        length: longer side, pixels.
        angle: heading, degrees.
        tint: variation of the color, in [0, 1).
    """

    kind: str
    x: float
    y: float
    length: float
    angle: float
    tint: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight axis-aligned box (x1, y1, x2, y2) around the drawn outline, pixels."""
        points = np.concatenate([self._turned(part) for part, _ in _parts(self)])
        (left, top), (right, bottom) = points.min(0), points.max(0)
        return float(left), float(top), float(right), float(bottom)

    def _turned(self, outline: list[tuple[float, float]]) -> np.ndarray:
        """An outline in units of the length, rotated, scaled and moved to its position; (points, 2) pixels."""
        turn = np.deg2rad(self.angle)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        return np.array(outline) * self.length @ rotation + (self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """The content of a scene, from which all questions and answers follow.

    Attributes:
        seed: see `scene_seed`.
        size: side of the square image, pixels.
        scene_class: one of `CLASSES`.
        objects: all countable objects.
    """

    seed: int
    size: int
    scene_class: str
    objects: tuple[SceneObject, ...]

    @property
    def area(self) -> str:
        return CLASSES[self.scene_class][0]

    @property
    def has_water(self) -> bool:
        return CLASSES[self.scene_class][1]

    @property
    def counts(self) -> dict[str, int]:
        return {kind: sum(item.kind == kind for item in self.objects) for kind in KINDS}


def scene_seed(split: str, index: int) -> int:
    """The seed of scene `index` of a split. Splits have disjoint ranges of seeds, so they do not overlap.

    Raises:
        ValueError: unknown split, or an index outside the split's range.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; the splits are {sorted(SPLITS)}.")
    if not 0 <= index < SCENES_PER_SPLIT:
        raise ValueError(f"Scene {index} is outside its split, which holds scenes 0 to {SCENES_PER_SPLIT - 1}.")
    return SPLITS[split] + index


def plan_scene(seed: int, size: int = 512, object_pixels: tuple[float, float] = (8.0, 16.0), crowding: int = 1) -> Scene:
    """Samples the content of a scene.

    Two to four kinds are present. Half of them occur once, so that they can be located. The others occur two to nine times.
    Ships need water. Otherwise, kinds and counts are independent of the class.

    Args:
        seed: see `scene_seed`.
        size: side of the square image, pixels.
        object_pixels: shortest and longest object, pixels.
        crowding: multiplies every count, as far as there is space. Crowded scenes train an encoder with few images.

    Raises:
        ValueError: sizes that cannot be drawn.
    """
    low, high = object_pixels
    if not 64 <= size <= 8192:
        raise ValueError(f"size={size} must lie between 64 and 8192 pixels.")
    if not 2 <= low <= high <= size / 16:
        raise ValueError(f"object_pixels={object_pixels} must be ascending, at least 2 and at most size / 16 = {size / 16}.")
    rng = np.random.default_rng([seed, 0])
    scene_class = str(rng.choice(list(CLASSES)))
    has_water = CLASSES[scene_class][1]
    kinds = [kind for kind in KINDS if kind != "ship" or has_water]
    chosen = rng.permutation(kinds)[: rng.integers(2, 5)].tolist()
    if has_water and "ship" not in chosen and rng.random() < 0.5:
        chosen[0] = "ship"  # only a third of the classes has water: ships would be rare
    shore = _shore(seed, size, scene_class)
    objects: list[SceneObject] = []
    for kind in chosen:
        count = 1 if rng.random() < 0.5 else int(rng.integers(2, 10))
        objects += _place(rng, kind, count * crowding, objects, shore, size, object_pixels)
    return Scene(seed, size, scene_class, tuple(objects))


def plan_change(scene: Scene, object_pixels: tuple[float, float] = (8.0, 16.0)) -> tuple[Scene, str, int]:
    """The same place later. Up to four objects of one kind appear or disappear; in a fifth of scenes nothing changes.

    Returns:
        The later scene, the kind that changed ("" if none), and the number of objects (negative if they disappeared).
    """
    rng = np.random.default_rng([scene.seed, 1])
    kind = str(rng.choice([kind for kind in KINDS if kind != "ship" or scene.has_water]))
    present = [item for item in scene.objects if item.kind == kind]
    if rng.random() < 0.2:
        return scene, "", 0
    if len(present) >= 9 or (present and rng.random() < 0.5):
        gone = [present[i] for i in rng.permutation(len(present))[: rng.integers(1, 5)]]
        return replace(scene, objects=tuple(item for item in scene.objects if item not in gone)), kind, -len(gone)
    shore = _shore(scene.seed, scene.size, scene.scene_class)
    count = int(rng.integers(1, min(4, 9 - len(present)) + 1))
    added = _place(rng, kind, count, list(scene.objects), shore, scene.size, object_pixels)
    return replace(scene, objects=(*scene.objects, *added)), kind if added else "", len(added)


def _place(
    rng: np.random.Generator,
    kind: str,
    count: int,
    others: list[SceneObject],
    shore: np.ndarray | None,
    size: int,
    object_pixels: tuple[float, float],
) -> list[SceneObject]:
    """Up to `count` objects of one kind that do not touch each other, the border of the image or the shore."""
    placed: list[SceneObject] = []
    heading = rng.uniform(0, 360)
    for _ in range(60 * count):
        if len(placed) == count:
            break
        length = rng.uniform(*object_pixels)
        x, y = rng.uniform(length, size - length, 2)
        if shore is not None and (shore[int(y), int(x)] * (1 if kind == "ship" else -1)) > -0.6 * length:
            continue
        if any((x - o.x) ** 2 + (y - o.y) ** 2 < (0.75 * (length + o.length)) ** 2 for o in [*others, *placed]):
            continue
        placed.append(SceneObject(kind, x, y, length, (heading + rng.normal(0, 25)) % 360, rng.random()))
    return placed


def _parts(item: SceneObject) -> list[tuple[list[tuple[float, float]], Color]]:
    """Outlines of an object with their colors, in units of its length, heading along +x. The first is the largest."""
    white = 218 + 30 * item.tint
    if item.kind == "ship":
        hull = [(-0.5, -0.19), (0.22, -0.19), (0.5, 0.0), (0.22, 0.19), (-0.5, 0.19)]
        return [
            (hull, (white, white - 12, white - 22)),
            ([(-0.38, -0.1), (-0.1, -0.1), (-0.1, 0.1), (-0.38, 0.1)], (90, 70, 64)),
        ]
    if item.kind == "aircraft":
        body = [(-0.5, -0.07), (0.42, -0.07), (0.5, 0.0), (0.42, 0.07), (-0.5, 0.07)]
        wings = [(0.12, -0.07), (-0.14, -0.5), (-0.26, -0.5), (-0.1, 0.0), (-0.26, 0.5), (-0.14, 0.5), (0.12, 0.07)]
        tail = [(-0.36, 0.0), (-0.48, -0.2), (-0.5, 0.0), (-0.48, 0.2)]
        return [(part, (white, white, white)) for part in (body, wings, tail)]
    if item.kind == "car":
        paint = [(196, 40, 36), (36, 62, 160), (28, 28, 32), (214, 176, 40)][int(item.tint * 4)]
        body = [(-0.5, -0.27), (0.5, -0.27), (0.5, 0.27), (-0.5, 0.27)]
        return [(body, paint), ([(-0.05, -0.21), (0.18, -0.21), (0.18, 0.21), (-0.05, 0.21)], (150, 170, 186))]
    if item.kind == "tank":
        turns = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        rim = [(0.5 * np.cos(turn), 0.5 * np.sin(turn)) for turn in turns]
        lid = [(0.3 * np.cos(turn), 0.3 * np.sin(turn)) for turn in turns]
        return [(rim, (white - 40, white - 36, white - 30)), (lid, (white, white, white))]
    roof = 120 + 70 * item.tint
    return [
        ([(-0.5, -0.4), (0.5, -0.4), (0.5, 0.0), (-0.5, 0.0)], (roof, 0.46 * roof, 0.36 * roof)),
        ([(-0.5, 0.0), (0.5, 0.0), (0.5, 0.4), (-0.5, 0.4)], (1.28 * roof, 0.62 * roof, 0.48 * roof)),
    ]


def draw(scene: Scene, look: int = 0) -> Image.Image:
    """Draws a scene as an RGB image of `scene.size` pixels a side.

    Args:
        look: another number gives other light, haze and noise, as on another day.
    """
    rng = np.random.default_rng([scene.seed, 2])
    size = scene.size
    land, shore, _ = _ground(rng, scene)
    picture = Image.fromarray(np.clip(land, 0, 255).astype(np.uint8))
    _draw_roads(rng, picture, scene, shore)
    _draw_clutter(rng, picture, shore)
    for item in scene.objects:
        _draw_object(picture, item)

    # Light, color cast, haze and sensor noise. No question is about them.
    if look:
        rng = np.random.default_rng([scene.seed, 6, look])
    pixels = np.asarray(picture, dtype=np.float32)
    gain = (rng.uniform(0.82, 1.15) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    haze = np.float32(rng.uniform(0, 0.16))
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(1, 4))
    pixels = pixels * gain * (1 - haze) + 205 * haze + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _ground(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Land cover, bank and water, (size, size, 3); the distance from the shore; and the bank, (size, size) bool."""
    land, bank = _land(rng, scene), None
    shore = _shore(scene.seed, scene.size, scene.scene_class)
    if shore is not None:
        ripple = _noise(rng, scene.size, 64)[..., None]
        if scene.scene_class in ("beach", "harbor"):
            bank = shore < rng.uniform(0.05, 0.09) * scene.size
            land = np.where(bank[..., None], (SAND if scene.scene_class == "beach" else CONCRETE) + 5 * ripple, land)
        land = np.where((shore < 0)[..., None], WATER + rng.uniform(-14, 14, 3) + 6 * ripple, land)
    return land, shore, bank


def _noise(rng: np.random.Generator, size: int, *cells: int) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 1: a sum of grids with that many cells a side; (size, size) float32."""
    total = np.zeros((size, size), dtype=np.float32)
    for count in cells:
        grid = Image.fromarray(rng.standard_normal((count, count), dtype=np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BILINEAR))
    return total * np.float32(1.5 / len(cells) ** 0.5)


def _shore(seed: int, size: int, scene_class: str) -> np.ndarray | None:
    """Approximate signed distance from the shore in pixels, (size, size), negative on water. `None` without water."""
    if not CLASSES[scene_class][1]:
        return None
    rng = np.random.default_rng([seed, 4])
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    turn = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    if scene_class == "river":
        bend = 0.09 * np.sin(rng.uniform(4, 9) * along + rng.uniform(0, 6)) + rng.uniform(-0.15, 0.15)
        field = np.abs(across - bend) - rng.uniform(0.06, 0.11)
    elif scene_class == "lake":
        x0, y0 = rng.uniform(-0.15, 0.15, 2)
        field = np.hypot(1.3 * (along - x0), across - y0) - rng.uniform(0.22, 0.3) + 0.03 * _noise(rng, size, 6)
    elif scene_class == "wetland":
        field = 0.09 * _noise(rng, size, 5, 8) + 0.01
    elif scene_class == "beach":
        field = across + 0.02 * _noise(rng, size, 6) + rng.uniform(-0.08, 0.08)
    else:  # harbor: a straight quay
        field = across + rng.uniform(-0.08, 0.08)
    return (field * size).astype(np.float32)


def _land(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Land cover, (size, size, 3) float32."""
    size, name = scene.size, scene.scene_class
    coarse = _noise(rng, size, 5, 16)[..., None]
    fine = _noise(rng, size, size // 6)[..., None]
    tint = rng.uniform(-10, 10, 3)
    if name in ("farmland", "meadow"):
        contrast = rng.uniform(0.35, 1.0) if name == "farmland" else rng.uniform(0.05, 0.45)
        crops = np.array([GRASS, SOIL, (134, 140, 84), (88, 112, 66), (172, 158, 110)], dtype=np.float32)
        crops = crops.mean(0) + contrast * (crops - crops.mean(0))
        return crops[_plots(rng, size, rng.uniform(60, 110) * size / 512) % 5] + 3 * coarse + 4 * fine + tint
    if name == "industrial":
        grays = np.linspace(-26, 26, 7, dtype=np.float32)[_plots(rng, size, rng.uniform(70, 130) * size / 512) % 7]
        return np.array(CONCRETE) - 22 + grays[..., None] + 3 * coarse + 4 * fine + tint
    if name.endswith("residential"):
        gardens = np.array(GRASS) * 0.6 + np.array(CONCRETE) * 0.4
        return gardens + 5 * coarse + 11 * fine + tint
    if name == "forest":
        return np.array(CROWN) + 4 * coarse + 12 * fine + tint
    if name == "desert":
        return np.array(SAND) + 7 * coarse + 2 * fine + tint
    if name in ("airport", "harbor"):
        return np.array(GRASS) * 0.8 + np.array(CONCRETE) * 0.2 + 4 * coarse + 3 * fine + tint
    return np.array(GRASS) + 8 * coarse + 6 * fine + tint


def _plots(rng: np.random.Generator, size: int, side: float) -> np.ndarray:
    """A rotated grid of plots, each with a random number; (size, size) int."""
    turn = rng.uniform(0, np.pi / 2)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    column = ((x * np.cos(turn) + y * np.sin(turn)) / side + 64).astype(int)
    row = ((y * np.cos(turn) - x * np.sin(turn)) / (side * rng.uniform(0.6, 1.0)) + 64 + rng.random()).astype(int)
    return rng.integers(0, 1000, (256, 256))[row % 256, column % 256]


def _draw_roads(rng: np.random.Generator, picture: Image.Image, scene: Scene, shore: np.ndarray | None) -> None:
    """Draws streets, a highway, a runway or a lane below the objects. Roads do not cross water."""
    size, name = scene.size, scene.scene_class
    unit = size / 512
    layer = Image.new("L", picture.size)
    pen = ImageDraw.Draw(layer)
    turn = rng.uniform(0, np.pi)
    direction, normal = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    middle = size / 2 + rng.uniform(-0.15, 0.15, 2) * size
    color, marks = ASPHALT, []

    def street(center: np.ndarray, heading: np.ndarray, width: float, length: float = 2.0) -> None:
        ends = (*(center - heading * size * length / 2), *(center + heading * size * length / 2))
        pen.line(ends, fill=255, width=max(1, round(width * unit)))

    if name.endswith("residential"):
        spacing = {"dense": (26, 42), "medium": (38, 60), "sparse": (54, 92)}[name.split()[0]]
        step = rng.uniform(*spacing) * unit
        for k in range(-int(size / step), int(size / step) + 1):
            street(middle + k * step * normal, direction, 5)
            if k % 2:
                street(middle + k * step * direction, normal, 5)
    elif name == "highway":
        street(middle, direction, 34)
        street(middle, normal if rng.random() < 0.5 else direction, 18)
        marks = [middle]
    elif name == "airport":
        color = (124, 124, 126)
        street(middle, direction, 46, 1.1)
        street(middle + 90 * unit * normal, direction, 16, 0.9)
        marks = [middle]
    elif rng.random() < 0.5:
        street(middle, direction, rng.uniform(4, 9))
    if shore is not None:
        layer = Image.fromarray(np.where(shore > 0, np.asarray(layer), 0).astype(np.uint8))
    picture.paste(tuple(int(value + rng.uniform(-8, 8)) for value in color), mask=layer)
    pen = ImageDraw.Draw(picture)
    for center in marks:
        for k in range(-12, 13):
            start, end = center + direction * (40 * k) * unit, center + direction * (40 * k + 14) * unit
            pen.line((*start, *end), fill=(196, 196, 190), width=max(1, round(2 * unit)))


def _draw_clutter(rng: np.random.Generator, picture: Image.Image, shore: np.ndarray | None) -> None:
    """Draws distractors of the size of objects: bushes, rocks and foam."""
    size = picture.width
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(5, 40))):
        x, y = rng.uniform(0, size, 2)
        radius = rng.uniform(2, 6) * size / 512
        wet = shore is not None and shore[int(y), int(x)] < 0
        tone = rng.uniform(-12, 12)
        color = (96, 122, 140) if wet else CROWN if rng.random() < 0.7 else (128, 120, 110)
        flat = rng.uniform(0.5, 1)
        pen.ellipse((x - radius, y - flat * radius, x + radius, y + flat * radius), fill=tuple(int(c + tone) for c in color))


def _draw_object(picture: Image.Image, item: SceneObject) -> None:
    """Draws one object and its shadow at eight times the resolution and downsamples them, for anti-aliased edges."""
    fine, margin = 8, int(item.length) + 3
    left, top = int(item.x) - margin, int(item.y) - margin
    patch = picture.crop((left, top, left + 2 * margin, top + 2 * margin))
    patch = patch.resize((patch.width * fine, patch.height * fine), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(patch)
    parts = [(item._turned(outline) - (left, top), color) for outline, color in _parts(item)]
    if item.kind != "ship":
        shift = 0.12 * item.length
        for points, _ in parts[:2]:
            pen.polygon([tuple(point) for point in (points + shift) * fine], fill=(44, 46, 44))
    for points, color in parts:
        pen.polygon([tuple(point) for point in points * fine], fill=tuple(int(value) for value in color))
    picture.paste(patch.reduce(fine), (left, top))
