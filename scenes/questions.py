"""Questions about a scene, with answers that follow from its plan.

The wording is fixed, so that scores do not depend on it. Answers are balanced where possible: yes and no, larger and
smaller, left and right, and the counts 0 to 9.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .drawing import KINDS, Scene


PLURALS = {"ship": "ships", "aircraft": "aircraft", "car": "cars", "tank": "tanks", "building": "buildings"}
# Boxes are written as in the published grounding data: [x_min, y_min, x_max, y_max], scaled to 0-1000.
BOX_SCALE = 1000
NOTHING = "none"  # the answer if there is no object to list

_KIND = re.compile(rf"\b(an? )?({'|'.join(sorted([*PLURALS, *PLURALS.values()], key=len, reverse=True))})\b")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        task: a key of `TASKS`, or "change".
        text: the question.
        answer: the exact answer.
        boxes: for grounding, detection and pointing, the true boxes (x1, y1, x2, y2) in pixels of the drawn image.
    """

    task: str
    text: str
    answer: str
    boxes: list[Box] = field(default_factory=list)


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def possible_kinds(scene: Scene) -> list[str]:
    """Kinds that the class of the scene permits. A question about ships in a desert would need no image."""
    return [kind for kind in KINDS if kind != "ship" or scene.has_water]


def _classification(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("classification", "What is the class of this scene?", scene.scene_class)


def _area(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("area", "Is this a rural or an urban area?", scene.area)


def _presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    wanted = bool(rng.random() < 0.5)
    kinds = [kind for kind in possible_kinds(scene) if (scene.counts[kind] > 0) == wanted]
    if all(scene.counts[kind] for kind in possible_kinds(scene)):
        return None  # also if "yes" is wanted, since the answers would not be balanced otherwise
    return Question("presence", f"Is there {_article(_one(rng, kinds))} in this scene?", "yes" if wanted else "no")


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    # Half of the present kinds occur once, the others two to nine times. Keep few zeros and ones, for uniform counts.
    kinds = [kind for kind in possible_kinds(scene) if scene.counts[kind] > 1 or rng.random() < 0.12]
    if not kinds:
        return None
    kind = _one(rng, kinds)
    return Question("count", f"How many {PLURALS[kind]} are there?", str(scene.counts[kind]))


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = scene.counts
    pairs = [(a, b) for a in possible_kinds(scene) for b in possible_kinds(scene) if counts[a] > counts[b] > 0]
    if not pairs:
        return None
    more, less = pairs[int(rng.integers(len(pairs)))]
    answer = _one(rng, ("yes", "no"))
    first, second = (more, less) if answer == "yes" else (less, more)
    return Question("comparison", f"Are there more {PLURALS[first]} than {PLURALS[second]}?", answer)


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    single = [item for item in scene.objects if scene.counts[item.kind] == 1]
    if len(single) < 2:
        return None
    first, second = (single[i] for i in rng.permutation(len(single))[:2])
    across = bool(rng.random() < 0.5)
    distance = first.x - second.x if across else first.y - second.y
    if abs(distance) < 0.08 * scene.size:
        return None
    names, phrase = (("left", "right"), "left or right of") if across else (("above", "below"), "above or below")
    return Question("position", f"Is the {first.kind} {phrase} the {second.kind}?", names[int(distance > 0)])


def _grounding(scene: Scene, rng: np.random.Generator) -> Question | None:
    single = [item for item in scene.objects if scene.counts[item.kind] == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    return Question("grounding", f"Give the bounding box of the {item.kind}.", write_box(item.box, scene.size), [item.box])


def _all_of_a_kind(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Box]]:
    """A kind, absent from one scene in five, and the boxes of its objects from left to right."""
    absent = rng.random() < 0.2
    kinds = [kind for kind in possible_kinds(scene) if (scene.counts[kind] == 0) == absent]
    kind = _one(rng, kinds or possible_kinds(scene))
    return kind, sorted(item.box for item in scene.objects if item.kind == kind)


def _detection(scene: Scene, rng: np.random.Generator) -> Question:
    kind, boxes = _all_of_a_kind(scene, rng)
    answer = ", ".join(write_box(box, scene.size) for box in boxes)
    return Question("detection", f"Give the bounding box of every {kind}.", answer or NOTHING, boxes)


def _pointing(scene: Scene, rng: np.random.Generator) -> Question:
    kind, boxes = _all_of_a_kind(scene, rng)
    answer = ", ".join(write_point(box, scene.size) for box in boxes)
    return Question("pointing", f"Point to every {kind}.", answer or NOTHING, boxes)


def _caption(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("caption", "Describe this image.", describe(scene))


def write_box(box: Box, size: int) -> str:
    """A box in pixels as the text `[x_min, y_min, x_max, y_max]`, scaled to 0-1000, at least three digits per number."""
    return _write(box, size)


def write_point(box: Box, size: int) -> str:
    """The centre of a box in pixels as the text `[x, y]`, scaled as in `write_box`."""
    return _write(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), size)


def _write(values: Sequence[float], size: int) -> str:
    numbers = [round(min(max(value / size, 0.0), 1.0) * BOX_SCALE) for value in values]
    return "[" + ", ".join(f"{number:03d}" for number in numbers) + "]"


def describe(scene: Scene) -> str:
    """A caption: the class, then the count of every kind of object, in the order of `KINDS`."""
    found = [f"{count} {kind if count == 1 else PLURALS[kind]}" for kind, count in scene.counts.items() if count]
    listing = " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return f"{_article(scene.scene_class).capitalize()} scene with {listing or 'no objects'}."


TASKS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "classification": _classification,
    "area": _area,
    "presence": _presence,
    "count": _count,
    "comparison": _comparison,
    "position": _position,
    "grounding": _grounding,
    "caption": _caption,
    "detection": _detection,
    "pointing": _pointing,
}


def ask(scene: Scene, tasks: Sequence[str] = tuple(TASKS), seed: int = 0) -> list[Question]:
    """One question per listed task, in that order. Tasks without a possible question are skipped.

    Args:
        scene: the scene.
        tasks: names from `TASKS`. A repeated name gives several different questions.
        seed: selects among the possible questions.

    Raises:
        ValueError: an unknown task.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"Unknown tasks {sorted(unknown)}; the tasks are {list(TASKS)}.")
    asked: dict[str, Question] = {}
    for position, task in enumerate(tasks):
        # A separate random stream for every question, so that it does not depend on the other tasks.
        occurrence = list(tasks[:position]).count(task)
        rng = np.random.default_rng([scene.seed, 5, seed, list(TASKS).index(task), occurrence])
        question = TASKS[task](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def template(question: str) -> str:
    """The question without the kinds of objects that it names."""
    return _KIND.sub("_", question)


def ask_change(kind: str, change: int) -> Question:
    """The question about a pair of images, before and after a change; arguments as returned by `plan_change`."""
    answer = "nothing"
    if change:
        noun = kind if abs(change) == 1 else PLURALS[kind]
        answer = f"{abs(change)} {noun} {'appeared' if change > 0 else 'disappeared'}"
    return Question("change", "What changed between the first and the second image?", answer)
