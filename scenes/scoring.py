"""Marks what a model says against what is known to be true. Pure functions: no model, no files, no state.

The answer is read alone; the truth is never used to interpret it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from ..processing_mfrsvlm import parse_boxes
from .drawing import CLASSES, KINDS
from .questions import BOX_SCALE, PLURALS, Box, Question, template


# Overlap from which a box counts as right.
IOU_THRESHOLD = 0.5

_NOUNS = {noun: kind for kind in KINDS for noun in (kind, PLURALS[kind])}
_COUNT_FACT = re.compile(rf"\b([0-9]{{1,6}}) ({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b")
_CLASS_FACT = re.compile(rf"\b({'|'.join(CLASSES)}) scene\b")


def score(question: Question, answer: str, size: int) -> float:
    """1.0 if the answer is right, else 0.0. An empty answer is always wrong.

    The first box of a grounding answer must overlap the true one by `IOU_THRESHOLD`. All other answers must match
    exactly, but for case, surrounding space and a final full stop.

    Args:
        question: with its true answer.
        answer: what the model said.
        size: side of the drawn image, to which `question.boxes` refer.
    """
    if question.task == "grounding":
        return float(overlap(question, answer, size) >= IOU_THRESHOLD)
    said = _plain(answer)
    return float(bool(said) and said == _plain(question.answer))


def overlap(question: Question, answer: str, size: int) -> float:
    """Intersection over union of the first box in a grounding answer and the true one; 0 without a box. See `score`."""
    box = _first_box(answer, size)
    return iou(box, question.boxes[0]) if box else 0.0


def centre_distance(question: Question, answer: str, size: int) -> float:
    """Pixels of the drawn image between the centres of the first box in a grounding answer and the true one.

    It is infinite without a box.
    """
    box = _first_box(answer, size)
    if box is None:
        return math.inf
    (x, y), (true_x, true_y) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, question.boxes[0]))
    return math.hypot(x - true_x, y - true_y)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) with ascending corners; 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def caption_facts(question: Question, answer: str) -> float:
    """F1 of the facts in a caption, from 0.0 to 1.0: the class of the scene, and every kind with its number.

    A caption that says the same kind twice, with two numbers, states two facts, of which at most one is true.
    """
    said, true = _facts(answer), _facts(question.answer)
    return 2 * len(said & true) / (len(said) + len(true)) if said else 0.0


def chance(questions: Sequence[Question]) -> float:
    """Share of right answers of the best guesser who sees no image: always the most frequent answer to such a question.

    Questions that differ only in the kinds they name count as the same.
    """
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(template(question.text), Counter())[question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(questions)


def _first_box(answer: str, size: int) -> Box | None:
    boxes = parse_boxes(answer, BOX_SCALE)
    if not boxes:
        return None
    left, top, right, bottom = (value * size / BOX_SCALE for value in boxes[0])
    return left, top, right, bottom


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def _facts(caption: str) -> set[tuple[str, int]]:
    """(class, 1) for every class that is named as the scene, and (kind, number) for every count."""
    text = caption.lower()
    found = {(_NOUNS[noun], int(number)) for number, noun in _COUNT_FACT.findall(text)}
    return found | {(name, 1) for name in _CLASS_FACT.findall(text)}
