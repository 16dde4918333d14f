"""Answers of a million characters: every metric and protocol scores the first characters only, and soon."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from mfrsvlm.evaluation.answering import Answer
from mfrsvlm.evaluation.benchmarks import Sample, load_benchmark
from mfrsvlm.evaluation.benchmarks.sample import BOX_TASKS, LIST_TASKS
from mfrsvlm.evaluation.evaluate import is_truncated, score
from mfrsvlm.evaluation.metrics import METRICS, load_metric
from mfrsvlm.evaluation.metrics._checked import SCORED_CHARACTERS
from mfrsvlm.evaluation.protocols import PROTOCOLS


LENGTH = 10**6
SHAPES = {
    "digits": "1",
    "thousands": "1,111,",
    "decimals": "1.",
    "brackets": "[",
    "boxes": "[1, ",
    "whole boxes": "[1,2,3,4]",
    "points": "[1,2]",
    "braces": "{<1>",
    "whole braces": "{<1><2><30><40>}",
    "turned boxes": "{<1><2><30><40>|<9>}",
    "spaces": " ",
    "line breaks": "\n",
    "words": "ship ",
    "letters": "a b c d e f g h ",
    "numbers": "one hundred and ",
    "hyphens": "a-",
    "minus": "-",
    "stops": "a. ",
    "ligatures": "\ufdfa",  # 18 characters in NFKC
    "accents": "e\u0301 ",
    "symbols": "\U0001f6a2",
}
# The beginning decides for each shape where a pattern starts to match.
ANSWERS = {shape: ("A1" + part * LENGTH)[:LENGTH] for shape, part in SHAPES.items()}
CAPTION = ["a ship is in the harbor near many other ships and a long pier"] * 5
FACTS = {"class_names": ["harbor"], "kinds": {"ship": ["ship", "ships"]}}
CASES = [
    *(("classification_accuracy", "ship", {"parsing": rule}) for rule in ("exact", "contained", "first_mentioned")),
    ("classification_accuracy", "ship", {"parsing": "without_spaces"}),
    *(("vqa_accuracy", ["A"], {"parsing": rule}) for rule in ("exact", "without_spaces", "contained", "letter")),
    ("rsvqa_accuracy", "17", {"question_types": ["count"], "bins": "lr"}),
    ("rsvqa_accuracy", "17m2", {"question_types": ["area"], "bins": "hr"}),
    ("counting", 3, {}),
    ("caption_facts", ["A harbor scene with 2 ships."], FACTS),
    pytest.param("captioning", CAPTION, {"variant": "coco_without_java"}, marks=pytest.mark.integration),
    pytest.param("captioning", CAPTION, {"variant": "upstream"}, marks=pytest.mark.integration),
]


@contextmanager
def guard(seconds: int = 20) -> Iterator[None]:
    """Fails what hangs. A test of speed would depend on the machine."""

    def stop(*_: object) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_every_metric_of_texts_is_tried() -> None:
    tried = {getattr(case, "values", case)[0] for case in CASES}
    others = {"visual_grounding", "object_detection", "pointing", "yes_no_calibration"}  # of places and of probabilities
    assert tried == set(METRICS) - others


@pytest.mark.parametrize(("name", "reference", "settings"), CASES)
def test_what_follows_the_limit_does_not_matter(name: str, reference, settings: dict) -> None:
    metric = load_metric(name)

    def figures(cut: int | None) -> dict:
        answers = [answer[:cut] for answer in ANSWERS.values()]
        repeated = {key: value * len(answers) if key == "question_types" else value for key, value in settings.items()}
        with guard():
            return metric.compute(predictions=answers, references=[reference] * len(answers), **repeated)

    whole = figures(None)
    assert whole == figures(SCORED_CHARACTERS)
    assert max(map(len, whole["parsed"])) <= 18 * SCORED_CHARACTERS


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("task", ["classification", "vqa", "counting", *BOX_TASKS])
def test_every_protocol_scores_long_answers(protocol: str, task: str) -> None:
    benchmark = load_benchmark("scenes", None, count=1)
    truths = {"classification": ("harbor",), "vqa": ("yes",), "counting": ("3",)}
    boxes = tuple((1.0 + i, 2.0, 30.0 + i, 40.0) for i in range(20 if task in LIST_TASKS else 1))
    sample = Sample("0", ("image",), task, "A question?", truths.get(task, ()), "a group", boxes=boxes)
    samples = [replace(sample, id=shape, image_size=(80, 40)) for shape in ANSWERS]
    benchmark.samples = samples

    def scored(cut: int | None) -> tuple:
        with guard():
            return score(PROTOCOLS[protocol](), benchmark, samples, [Answer(answer[:cut]) for answer in ANSWERS.values()])

    assert scored(None) == scored(SCORED_CHARACTERS)


def test_a_box_at_the_limit_is_scored_and_one_beyond_is_not() -> None:
    benchmark = load_benchmark("scenes", None, count=1)
    sample = Sample("0", ("image",), "grounding", "the ship", (), boxes=((8.0, 4.0, 40.0, 20.0),), image_size=(80, 40))
    protocol = PROTOCOLS["strict"]()
    box = protocol.ideal_answer(sample)
    for spaces, found in ((SCORED_CHARACTERS - len(box), 1.0), (SCORED_CHARACTERS - len(box) + 1, 0.0)):
        assert score(protocol, benchmark, [sample], [Answer(" " * spaces + box)])[2] == [found]


def test_answers_beyond_the_limit_count_as_truncated() -> None:
    assert is_truncated(Answer("a" * (SCORED_CHARACTERS + 1))) and is_truncated(Answer("a", truncated=True))
    assert not is_truncated(Answer("a" * SCORED_CHARACTERS))
