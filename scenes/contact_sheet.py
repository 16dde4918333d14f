"""One labeled image with a scene of each class, boxes around the objects, and a pair of images of a change."""

from collections.abc import Iterable, Iterator
from itertools import count, islice

from PIL import Image, ImageDraw, ImageFont

from .drawing import CLASSES, KINDS, Scene, SceneObject, draw, plan_change, plan_scene, scene_seed
from .questions import PLURALS, ask_change


COLUMNS, SIDE, LABEL, GAP = 5, 256, 22, 6
OBJECT_PIXELS = (11.0, 16.0)  # large, so that a reader can tell the kinds apart
BOX_COLORS = {"ship": "cyan", "aircraft": "yellow", "car": "magenta", "tank": "lime", "building": "orange"}


def contact_sheet() -> Image.Image:
    """The contact sheet, from scenes of the demo split, which training and evaluation do not use."""
    scenes = {scene.scene_class: scene for scene in islice(_demo_scenes(), 15 * len(CLASSES))}
    cells = [(name, _boxed(scenes[name], scenes[name].objects)) for name in CLASSES]
    before, after, changed, answer = _change_pair()
    cells += [("before", _boxed(before, changed)), ("after", _boxed(after, changed)), ("", _legend(answer))]

    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for index, (label, picture) in enumerate(cells):
        x, y = GAP + index % COLUMNS * (SIDE + GAP), GAP + index // COLUMNS * (SIDE + LABEL + GAP)
        pen.text((x + SIDE / 2, y + LABEL / 2), label, fill="black", font=font, anchor="mm")
        sheet.paste(picture, (x, y + LABEL))
    return sheet


def _demo_scenes() -> Iterator[Scene]:
    return (plan_scene(scene_seed("demo", index), SIDE, OBJECT_PIXELS) for index in count())


def _change_pair() -> tuple[Scene, Scene, list[SceneObject], str]:
    """The first demo scene in which two or more objects appear: scene before, scene after, new objects, and answer."""
    pairs = ((scene, *plan_change(scene, OBJECT_PIXELS)) for scene in _demo_scenes())
    before, after, kind, change = next(pair for pair in pairs if pair[3] > 1)
    return before, after, [item for item in after.objects if item not in before.objects], ask_change(kind, change).answer


def _boxed(scene: Scene, objects: Iterable[SceneObject]) -> Image.Image:
    picture = draw(scene)
    pen = ImageDraw.Draw(picture)
    for item in objects:
        left, top, right, bottom = item.box
        pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=BOX_COLORS[item.kind])
    return picture


def _legend(answer: str) -> Image.Image:
    """The colors of the kinds, and the answer about the pair of images."""
    picture = Image.new("RGB", (SIDE, SIDE), (60, 64, 68))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for index, kind in enumerate(KINDS):
        y = 20 + 24 * index
        pen.rectangle((20, y, 34, y + 14), outline=BOX_COLORS[kind])
        pen.text((46, y + 7), PLURALS[kind], fill="white", font=font, anchor="lm")
    pen.multiline_text((20, 160), f"before and after:\n{answer}", fill="white", font=font, spacing=6)
    return picture
