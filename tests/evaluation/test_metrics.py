"""Metrics against plain loops that compute the same in another way, on hand-made cases, and on input that is none."""

import doctest
import math
import os
import random
import re
import subprocess
import sys
from bisect import bisect_left
from importlib import import_module
from pathlib import Path
from statistics import mean

import evaluate
import numpy as np
import pytest
from shapely import box as shapely_box

from mfrsvlm.evaluation import metrics
from mfrsvlm.evaluation.benchmarks import BENCHMARKS
from mfrsvlm.evaluation.metrics import METRICS, load_metric
from mfrsvlm.evaluation.metrics._answers import ClassReader, letter
from mfrsvlm.evaluation.metrics._checked import CheckedMetric
from mfrsvlm.evaluation.metrics._groups import by_group, mean_over_groups
from mfrsvlm.evaluation.metrics.visual_grounding import iou
from mfrsvlm.scenes import plan_scene, scene_seed
from mfrsvlm.scenes.questions import describe


FOLDER = Path(metrics.__file__).parent
CASES = 1200
FACTS = {"class_names": ["harbor", "desert"], "kinds": {"ship": ["ship", "ships"], "car": ["car", "cars"]}}
SETTINGS = {
    "rsvqa_accuracy": {"question_types": ["presence"]},
    "captioning": {"variant": "coco_without_java"},
    "caption_facts": FACTS,
}
GOOD = {
    "caption_facts": ("A desert scene.", ["A desert scene."]),
    "captioning": ("a beach", ["a beach"]),
    "classification_accuracy": ("beach", "beach"),
    "counting": ("3", 3),
    "object_detection": ([[0, 0, 1, 1]], [[0, 0, 1, 1]]),
    "pointing": ([[0.5, 0.5]], [[0, 0, 1, 1]]),
    "rsvqa_accuracy": ("yes", "yes"),
    "visual_grounding": ([[0, 0, 1, 1]], [[0, 0, 1, 1]]),
    "vqa_accuracy": ("red", ["red"]),
    "yes_no_calibration": (0.7, "yes"),
}


def compute(name, predictions, references, **settings):
    return load_metric(name).compute(predictions=predictions, references=references, **settings)


# All


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_a_module_of_evaluate_with_a_card(name):
    metric = load_metric(name)
    # Before its own class a module has that of all metrics, which `evaluate` must not take.
    assert metric.name == name and type(metric) is not CheckedMetric
    assert (
        metric.description
        and "predictions" in metric.inputs_description
        and set(metric.features)
        == {
            "predictions",
            "references",
        }
    )
    assert "Example:" in metric.description and "Limitations:" in metric.description and metric.citation.strip()
    for figure in figures_of(GOOD[name], name):
        assert f"{figure}" in metric.inputs_description or figure.startswith("accuracy_"), figure


def figures_of(good, name):
    prediction, reference = good
    return compute(name, [prediction], [reference], **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", METRICS)
def test_examples_give_what_they_show(name):
    failed, tried = doctest.testmod(import_module(f"mfrsvlm.evaluation.metrics.{name}"))
    assert tried >= 3 and not failed


@pytest.mark.parametrize("name", METRICS)
def test_every_figure_has_an_interval_and_every_sample_a_score(name):
    prediction, reference = GOOD[name]
    settings = {"question_types": ["presence"] * 5} if name == "rsvqa_accuracy" else SETTINGS.get(name, {})
    results = compute(name, [prediction] * 5, [reference] * 5, **settings)
    assert len(results.pop("parsed")) == len(results.pop("scores")) == 5
    flat = [leaf for figure in results.values() for leaf in ([figure] if "value" in figure else figure.values())]
    assert flat and all(figure.keys() == {"value", "low", "high", "n"} for figure in flat)
    assert all(figure["low"] <= figure["value"] + 1e-12 <= figure["high"] + 2e-12 and figure["n"] == 5 for figure in flat)


@pytest.mark.parametrize("name", METRICS)
def test_input_that_is_none_is_named(name):
    prediction, reference = GOOD[name]
    metric = load_metric(name)
    settings = SETTINGS.get(name, {})
    for predictions, references, message in [
        (None, None, "there are no predictions"),
        ([], [], "there are no predictions"),
        (None, [reference], "predictions must be a list, got NoneType"),
        ("text", [reference], "predictions must be a list, got str"),
        ([prediction], None, "references must be a list, got NoneType"),
        ([prediction] * 2, [reference], "2 predictions but 1 references"),
        ([None], [reference], r"predictions\[0\] is None, not .* Pass '' for an empty answer"),
        ([prediction], [None], r"references\[0\] is None, not"),
        ([{}], [reference], r"predictions\[0\] is {}, not"),
        ([prediction], [{}], r"references\[0\] is {}, not"),
    ]:
        if predictions == [None] and name in ("object_detection", "pointing"):
            continue  # an answer that cannot be parsed
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            metric.compute(predictions=predictions, references=references, **settings)
    with pytest.raises(ValueError, match=f"{name}: unknown setting 'weighting'"):
        metric.compute(predictions=[prediction], references=[reference], weighting=2, **settings)
    # What was refused is not counted with what comes later.
    assert len(metric.compute(predictions=[prediction], references=[reference], **settings)["scores"]) == 1


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "settings", "message"),
    [
        ("classification_accuracy", 3, "beach", {}, r"predictions\[0\] is 3, not text"),
        ("classification_accuracy", "beach", " ", {}, r"references\[0\] is ' ', not text that is not blank"),
        ("classification_accuracy", "beach", "beach", {"class_names": ["forest"]}, r"class_names lacks 1 .*\['beach'\]"),
        ("classification_accuracy", "a", "a", {"class_names": ["a", "A."]}, "classes 'a' and 'A.' are equal"),
        ("classification_accuracy", "a", "a", {"class_names": ["a", "."]}, r"'\.' is empty under the rule"),
        ("classification_accuracy", "a", "a", {"class_names": ["a", None]}, "class name None is not text"),
        ("classification_accuracy", "a", "a", {"parsing": "lucky"}, "parsing='lucky' is not one of exact, "),
        ("vqa_accuracy", "red", "red", {}, r"references\[0\] is 'red', not a list of at least one text"),
        ("vqa_accuracy", "red", [], {}, r"references\[0\] is \[\], not a list"),
        ("vqa_accuracy", "red", ["red", ""], {}, "none of them blank"),
        ("vqa_accuracy", "A", ["Apple"], {"parsing": "letter"}, "of which the rule 'letter' leaves nothing"),
        ("vqa_accuracy", "red", ["red"], {"question_types": []}, "0 question_types but 1 predictions"),
        ("vqa_accuracy", "red", ["red"], {"question_types": "c"}, "question_types must be a list, got str"),
        ("vqa_accuracy", "red", ["red"], {"question_types": [None]}, r"question_types\[0\] is None"),
        ("rsvqa_accuracy", "A", "A", {"question_types": ["x"], "parsing": "letter"}, "parsing='letter' is not one of"),
        ("rsvqa_accuracy", "A", "A", {"question_types": ["x"], "bins": "mr"}, "bins='mr' is not one of lr, hr"),
        ("counting", 3, 3, {}, r"predictions\[0\] is 3, not text"),
        ("counting", "3", "3", {}, "not a whole number"),
        ("counting", "3", -1, {}, "not a whole number"),
        ("counting", "3", 2.5, {}, "not a whole number"),
        ("counting", "3", True, {}, "not a whole number"),
        ("counting", "3", math.nan, {}, "not a whole number"),
        ("yes_no_calibration", math.nan, "yes", {}, r"predictions\[0\] is nan, not a number from 0 to 1"),
        ("yes_no_calibration", 1.01, "yes", {}, "not a number from 0 to 1"),
        ("yes_no_calibration", True, "yes", {}, "not a number from 0 to 1"),
        ("yes_no_calibration", 0.5, "Yes", {}, "not 'yes' or 'no'"),
        ("yes_no_calibration", 0.5, "yes", {"bins": 0}, "bins=0 must be"),
        ("visual_grounding", [[0, 0, 1]], [[0, 0, 1, 1]], {}, "each of 4 or 8 finite numbers"),
        ("visual_grounding", [0, 0, 1, 1], [[0, 0, 1, 1]], {}, r"predictions\[0\] is \[0, 0, 1, 1\], not a list of boxes"),
        ("visual_grounding", [[0, 0, 1, math.nan]], [[0, 0, 1, 1]], {}, "finite numbers"),
        ("visual_grounding", [[0, 0, 1, math.inf]], [[0, 0, 1, 1]], {}, "finite numbers"),
        ("visual_grounding", [["0", 0, 1, 1]], [[0, 0, 1, 1]], {}, "finite numbers"),
        ("visual_grounding", [], [], {}, r"references\[0\] is \[\], not a list of at least one box"),
        ("visual_grounding", [], [[0, 0, 1, 1]], {"thresholds": []}, r"thresholds=\[\] must be a list"),
        ("visual_grounding", [], [[0, 0, 1, 1]], {"thresholds": [50]}, r"thresholds=\[50\] must be a list"),
        ("object_detection", [[0, 0, 1]], [], {}, "each of 4 or 8 finite numbers, or None"),
        ("object_detection", [[0, 0, 1, math.nan]], [], {}, "finite numbers, or None"),
        ("object_detection", "none", [], {}, r"predictions\[0\] is 'none', not a list of boxes"),
        ("object_detection", [], [[0, 0, 1]], {}, r"references\[0\] is \[\[0, 0, 1\]\], not a list of boxes"),
        ("object_detection", [], [], {"threshold": 0}, "threshold=0 must be a number above 0 and up to 1"),
        ("object_detection", [], [], {"threshold": [0.5]}, r"threshold=\[0\.5\] must be"),
        ("pointing", [[0, 0, 1, 1]], [], {}, "each of 2 finite numbers, or None"),
        ("pointing", [[0, math.inf]], [], {}, "each of 2 finite numbers, or None"),
        ("pointing", [0, 0], [], {}, r"predictions\[0\] is \[0, 0\], not a list of points"),
        ("pointing", [], [[0, 0]], {}, r"references\[0\] is \[\[0, 0\]\], not a list of boxes"),
        ("caption_facts", "a", ["a beach"], FACTS, r"references\[0\] states no fact: \['a beach'\]"),
        ("caption_facts", "a", ["a"], {**FACTS, "kinds": {}}, "must name at least one class, kind and noun"),
        ("captioning", "a beach", "a beach", {}, "not a list of at least one text"),
        ("captioning", "a beach", ["a beach"], {"variant": "best"}, "variant='best' is not one of coco, "),
        ("captioning", "a", ["..."], {"variant": "coco_without_java"}, r"references\[0\] has no word: \['\.\.\.'\]"),
    ],
)
def test_values_that_make_no_sense_are_named(name, prediction, reference, settings, message):
    with pytest.raises(ValueError, match=message):
        compute(name, [prediction], [reference], **settings)


def test_samples_can_be_added_one_by_one():
    metric = load_metric("counting")
    metric.add(prediction="3", reference=3)
    metric.add_batch(predictions=["4", ""], references=[3, 1])
    assert metric.compute() == compute("counting", ["3", "4", ""], [3, 3, 1])
    with pytest.raises(ValueError, match=r"counting: predictions\[0\] is None"):
        metric.add(reference=3)


def test_there_is_no_other_metric():
    with pytest.raises(ValueError, match=r"Unknown metric 'luck'\. Metrics are caption_facts, captioning, "):
        load_metric("luck")


@pytest.mark.slow
def test_fresh_processes_at_once_load_metrics_without_network(tmp_path):
    """Several processes of a run score nothing at once today, but all may load."""
    code = (
        "import socket\n"
        "def none(*args, **kwargs): raise OSError('no network')\n"
        "socket.create_connection = socket.getaddrinfo = socket.socket.connect = none\n"
        "from mfrsvlm.evaluation.metrics import METRICS, load_metric\n"
        "assert [load_metric(name).name for name in METRICS] == list(METRICS)\n"
        "print(load_metric('counting').compute(predictions=['3'], references=[3])['exact']['value'])\n"
    )
    places = {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=300)[0].strip() for process in running] == ["1.0"] * 3


# Intervals


def test_the_interval_of_a_mean_over_groups_is_that_of_drawing_samples():
    """Slowly: draw samples, take the mean of every group there is, and the mean of those."""
    rng = np.random.default_rng(3)
    groups = [str(group) for group in rng.choice(["a", "b", "c", "rare"], 80, p=[0.5, 0.3, 0.18, 0.02])]
    scores = rng.choice([0.0, 0.25, 1.0], 80).tolist()
    drawn = []
    for _ in range(2500):
        members = {}
        for index in rng.integers(0, 80, 80):
            members.setdefault(groups[index], []).append(scores[index])
        drawn.append(mean(mean(values) for values in members.values()))
    found = mean_over_groups(groups, scores, draws=20000)
    assert found["value"] == pytest.approx(mean(figure["value"] for figure in by_group(groups, scores).values()))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.015)


def test_the_interval_of_the_calibration_error_is_that_of_drawing_samples():
    rng = np.random.default_rng(4)
    chances, truths = rng.random(60).tolist(), rng.choice(["yes", "no"], 60).tolist()
    rng, values = np.random.default_rng(0), []
    for _ in range(1000):
        times = rng.multinomial(60, np.full(60, 1 / 60))
        pairs = [pair for pair, n in zip(zip(chances, truths, strict=True), times, strict=True) for _ in range(n)]
        values.append(slow_ece(*zip(*pairs, strict=True)))
    found = compute("yes_no_calibration", chances, truths)["ece"]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist())


# Answers in words


WORDS = ["beach", "base", "baseball field", "field", "sparse  residential", "forêt", "Park", "parking lot", "été", "a"]


def random_answer(rng, words):
    word = rng.choice([*words, "", " ", "nothing", "ball", "beach beach beach", "森", "."])
    for _ in range(rng.randrange(3)):
        word = rng.choice(
            [
                str.upper,
                str.title,
                lambda w: f" {w}\n",
                lambda w: w + ".",
                lambda w: w.replace(" ", ""),
                lambda w: f"It is a {w}",
                lambda w: f"{w} or {rng.choice(words)}",
            ]
        )(word)
    return word


def slow_classes(answer, names, rule):
    """The rules once more, as loops."""
    squeezed = "".join(answer.lower().split())
    if rule == "contained":
        return [name for name in names if squeezed and squeezed in "".join(name.lower().split())]
    if rule == "without_spaces":
        return [name for name in names if squeezed.replace(".", "") == "".join(name.lower().split())]
    text = answer.lower().strip()
    text = (text[:-1] if text.endswith(".") else text).strip()
    if rule == "exact":
        return [name for name in names if name.lower() == text]
    for start in range(len(text)):
        if start and (text[start - 1].isalnum()):
            continue
        for name in sorted(names, key=len, reverse=True):
            end = start + len(name)
            if text[start:end] == name.lower() and not (end < len(text) and text[end].isalnum()):
                return [name]
    return []


@pytest.mark.parametrize("rule", ClassReader.RULES)
def test_classes_against_loops(rule):
    rng = random.Random(rule)
    answers = [random_answer(rng, WORDS) for _ in range(CASES)]
    truths = [rng.choice(WORDS[:-1]) for _ in range(CASES)]
    found = compute("classification_accuracy", answers, truths, class_names=WORDS, parsing=rule)
    read = [slow_classes(answer, WORDS, rule) for answer in answers]
    scores = [float(truth in classes) for truth, classes in zip(truths, read, strict=True)]
    assert found["parsed"] == [" | ".join(classes) for classes in read] and found["scores"] == scores
    assert 0.02 < found["accuracy"]["value"] < 0.9  # otherwise nothing was tried
    assert found["accuracy"]["value"] == pytest.approx(sum(scores) / CASES)
    by_class = {name: [score for score, truth in zip(scores, truths, strict=True) if truth == name] for name in set(truths)}
    assert found["per_class"].keys() == by_class.keys()
    for name, values in by_class.items():
        assert found["per_class"][name]["value"] == pytest.approx(mean(values))
        assert found["per_class"][name]["n"] == len(values)
    assert found["macro_accuracy"]["value"] == pytest.approx(mean(map(mean, by_class.values())))


@pytest.mark.parametrize("rule", ClassReader.RULES)
@pytest.mark.parametrize("answer", ["", " ", ".", "\n", "\u00a0", "..", "¿?"])
def test_an_answer_without_words_is_wrong(rule, answer):
    assert compute("classification_accuracy", [answer], ["beach"], parsing=rule)["scores"] == [0.0]
    if rule != "first_mentioned":
        assert compute("vqa_accuracy", [answer], [["beach"]], parsing=rule)["scores"] == [0.0]
        found = compute("rsvqa_accuracy", [answer] * 2, ["0", "yes"], question_types=["count", "presence"], parsing=rule)
        assert found["scores"] == [0.0, 0.0]
    assert compute("counting", [answer], [0])["scores"] == [0.0]


@pytest.mark.parametrize(
    ("rule", "answer", "read"),
    [
        ("exact", "BEACH.", "beach"),
        ("exact", "beach!", ""),
        ("exact", "beach beach", ""),
        ("exact", "the beach", ""),
        ("exact", "fore\u0302t", "forêt"),  # the accent as a character of its own
        ("without_spaces", "base ball.field", "baseball field"),
        ("contained", "Field", "baseball field | field"),
        ("contained", "It is a beach", ""),
        ("first_mentioned", "It is a beach, not a field", "a"),
        ("first_mentioned", "beaches, base", "base"),
        ("first_mentioned", "Baseball fields? No: Field", "field"),
    ],
)
def test_how_classes_are_read(rule, answer, read):
    assert compute("classification_accuracy", [answer], ["beach"], class_names=WORDS, parsing=rule)["parsed"] == [read]


def test_without_a_list_classes_are_those_of_the_references():
    found = compute("classification_accuracy", ["forest", "beach"], ["beach", "beach"])
    assert found["parsed"] == ["", "beach"] and list(found["per_class"]) == ["beach"]


@pytest.mark.parametrize("rule", ["exact", "without_spaces", "contained"])
def test_answers_against_loops(rule):
    rng = random.Random(rule)
    answers = [random_answer(rng, WORDS) for _ in range(CASES)]
    truths = [rng.sample(WORDS, rng.randint(1, 3)) for _ in range(CASES)]
    types = [rng.choice(["color", "shape", "place"]) for _ in range(CASES)]
    found = compute("vqa_accuracy", answers, truths, question_types=types, parsing=rule)
    scores = [float(bool(slow_classes(a, group, rule))) for a, group in zip(answers, truths, strict=True)]
    assert found["scores"] == scores and found["accuracy"]["value"] == pytest.approx(mean(scores))
    by_type = {kind: [s for s, t in zip(scores, types, strict=True) if t == kind] for kind in set(types)}
    assert {kind: figure["value"] for kind, figure in found["per_type"].items()} == pytest.approx(
        {kind: mean(values) for kind, values in by_type.items()}
    )
    assert found["average_accuracy"]["value"] == pytest.approx(mean(map(mean, by_type.values())))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        *[(text, "B") for text in ("B", "b", " B.", "(B)", "b)", "B: forest", "B. A forest", "B forest", '"B"', "**B**")],
        *[(text, "") for text in ("", "Beach", "a ship", "The answer is B", "K", "-", "é", "A1", "bb", "?B")],
        ("A ship", "A"),  # the price of a rule
    ],
)
def test_letters(text, option):
    assert letter(text) == option
    assert compute("vqa_accuracy", [text], [["B. forest"]], parsing="letter")["scores"] == [float(option == "B")]


# RSVQA


def same_for_rsvqa(one, other, edition):
    """Whether the published script takes two numbers for one: by their place among its limits."""
    (number, unit), (truth, other_unit) = one, other
    if unit != other_unit:
        return False
    if (edition == "hr") != (unit == "m2"):
        return number == truth
    return bisect_left([0, 10, 100, 1000], number) == bisect_left([0, 10, 100, 1000], truth)


@pytest.mark.parametrize("edition", ["lr", "hr"])
def test_numbers_of_rsvqa_against_their_place_among_the_limits(edition):
    rng = random.Random(edition)

    def draw(kind):
        edges = [0, 1, 9, 10, 11, 99, 100, 101, 999, 1000, 1001, 5000]
        return rng.choice(edges) if rng.random() < 0.7 else rng.randrange(2000), "m2" if kind == "area" else ""

    kinds = [rng.choice(["count", "area"] if edition == "hr" else ["count"]) for _ in range(CASES)]
    pairs = [(draw(kind), draw(kind)) for kind in kinds]
    forms = [lambda n, u: f"{n}{u}", lambda n, u: f" {n}{u}.", lambda n, u: f"{n:,}{u}", lambda n, u: f"{n} {u}"]
    answers = [rng.choice(forms)(*said) for said, _ in pairs]
    found = compute("rsvqa_accuracy", answers, [f"{n}{u}" for _, (n, u) in pairs], question_types=kinds, bins=edition)
    assert found["scores"] == [float(same_for_rsvqa(*pair, edition)) for pair in pairs]
    assert 0.02 < found["accuracy"]["value"] < 0.7


@pytest.mark.parametrize(
    ("edition", "kind", "answer", "truth", "right"),
    [
        ("lr", "count", "7", "3", True),
        ("lr", "count", "0", "3", False),
        ("lr", "count", "10", "11", False),
        ("lr", "count", "1,001", "5000", True),
        ("lr", "count", "between 0 and 10", "3", True),
        ("lr", "count", "Between 1 and 10.", "3", True),
        ("lr", "count", "between 11 and 100", "11", True),
        ("lr", "count", "between 0 and 100", "50", False),  # no class
        ("lr", "count", "more than 1000", "1001", True),
        ("lr", "count", "three", "3", False),
        ("lr", "count", "about 3", "3", False),
        ("lr", "presence", "Yes", "yes", True),
        ("lr", "rural_urban", "rural area", "rural", False),
        ("hr", "count", "3", "4", False),
        ("hr", "count", "3", "3", True),
        ("hr", "count", "3m2", "3", False),
        ("hr", "area", "12 square meters", "19m2", True),
        ("hr", "area", "12 m²", "19m2", True),
        ("hr", "area", "12", "19m2", True),
        ("hr", "area", "between 10m2 and 100m2", "19m2", True),
        ("hr", "area", "0m2", "1m2", False),
        ("hr", "area", "more than 1000m2", "1000m2", False),
        ("hr", "area", "12 km", "19m2", False),
    ],
)
@pytest.mark.parametrize("parsing", ["exact", "without_spaces", "contained"])
def test_answers_of_rsvqa(edition, kind, answer, truth, right, parsing):
    found = compute("rsvqa_accuracy", [answer], [truth], question_types=[kind], bins=edition, parsing=parsing)
    assert found["scores"] == [float(right)]


def test_a_number_is_no_part_of_a_number():
    """Where a part is enough, "1" would be right for "10", and "0" for any class."""
    settings = {"question_types": ["count"] * 3, "parsing": "contained"}
    found = compute("rsvqa_accuracy", ["1", "1", "0"], ["10", "31", "3"], bins="hr", **settings)
    assert found["scores"] == [0.0, 0.0, 0.0]
    found = compute("rsvqa_accuracy", ["0", "10", "ye"], ["3", "12", "yes"], **settings)
    assert found["scores"] == [0.0, 0.0, 1.0]


# Counting


def in_words(number):
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
    units += "seventeen eighteen nineteen".split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    if number < 20:
        return units[number]
    if number < 100:
        return tens[number // 10 - 2] + (f"-{units[number % 10]}" if number % 10 else "")
    rest = f" and {in_words(number % 100)}" if number % 100 else ""
    if number < 1000:
        return f"{units[number // 100]} hundred{rest}"
    return f"{in_words(number // 1000)} thousand" + (f" {in_words(number % 1000)}" if number % 1000 else "")


def test_counts_against_numbers_that_were_written_out():
    rng = random.Random(5)
    forms = [str, "{:,}".format, in_words, lambda n: in_words(n).upper(), lambda n: in_words(n).replace("-", " ")]
    frames = ["{}", "There are {} ships.", "({})", "**{}**", "ships:{}", "Antwort: {} Schiffe, früher 7", "{}, or 3"]
    said = [rng.choice([rng.randrange(30), rng.randrange(10000)]) for _ in range(CASES)]
    answers = [rng.choice(frames).format(rng.choice(forms)(number)) for number in said]
    truths = [number + rng.choice([0, 0, 1, -1, 5]) for number in said]
    truths = [max(truth, 0) for truth in truths]
    found = compute("counting", answers, truths)
    assert found["parsed"] == [str(number) for number in said]
    assert found["exact"]["value"] == pytest.approx(np.mean(np.equal(said, truths)))
    assert found["mae"]["value"] == pytest.approx(np.abs(np.subtract(said, truths)).mean())


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("", ""),
        ("many", ""),
        ("no idea", ""),
        ("none", "0"),
        ("Three or four", "3"),
        ("3-5", "3"),
        ("-2", "-2"),
        ("\N{MINUS SIGN}2", "-2"),
        ("2.50", "2.5"),
        ("1,2 and 3", "1"),
        ("1,234.5", "1234.5"),
        ("in v2 of it", ""),
        ("stone", ""),
        ("onetwo", ""),
        ("3 3 3", "3"),
        ("٣", "3"),  # a digit of another script
        ("9" * 400, "1000000000"),
        ("two hundred and five thousand", "205000"),
    ],
)
def test_how_counts_are_read(answer, read):
    assert compute("counting", [answer], [1])["parsed"] == [read]


@pytest.mark.parametrize("truth", [0, 1, 40])
def test_saying_no_number_is_never_as_good_as_the_number(truth):
    found = compute("counting", ["", "many"], [truth, truth])
    assert found["exact"]["value"] == 0 and found["mae"]["value"] == max(truth, 1)


# Calibration


def slow_ece(chances, truths, bins=10):
    total = 0.0
    for edge in range(bins):
        inside = [
            (chance, truth == "yes")
            for chance, truth in zip(chances, truths, strict=True)
            if edge <= chance * bins < edge + 1 or (chance == 1 and edge == bins - 1)
        ]
        if inside:
            total += len(inside) * abs(mean(chance for chance, _ in inside) - mean(yes for _, yes in inside))
    return total / len(chances)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_against_loops(bins):
    rng = random.Random(bins)
    chances = [rng.choice([rng.random(), rng.random() ** 3, 0.0, 0.5, 1.0]) for _ in range(CASES)]
    truths = ["yes" if rng.random() < chance else "no" for chance in chances]
    found = compute("yes_no_calibration", chances, truths, bins=bins)
    assert found["ece"]["value"] == pytest.approx(slow_ece(chances, truths, bins))
    brier = mean((chance - (truth == "yes")) ** 2 for chance, truth in zip(chances, truths, strict=True))
    assert found["brier"]["value"] == pytest.approx(brier)
    right = [(c > 0.5 and t == "yes") or (c < 0.5 and t == "no") for c, t in zip(chances, truths, strict=True)]
    assert found["accuracy"]["value"] == pytest.approx(mean(right)) and found["scores"] == [float(r) for r in right]


# Boxes


def random_box(rng, near=None):
    """Two corners of any order, or as often a box near another."""
    if near and rng.random() < 0.7:
        return [value + rng.uniform(-8, 8) for value in near]
    return [rng.uniform(0, 100) for _ in range(4)]


def turned_box(rng, near=None):
    """Four corners of a rectangle, from any of them on, in either direction."""
    x, y, width, height, angle = near or [rng.uniform(*limits) for limits in ((20, 80), (20, 80), (5, 60), (5, 60), (0, 7))]
    if near:
        x, y, width, angle = x + rng.uniform(-5, 5), y + rng.uniform(-5, 5), width * rng.uniform(0.7, 1.4), angle + 0.2
    across, up = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    corners = [
        np.array([x, y]) + i * width / 2 * across + j * height / 2 * up for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    start, step = rng.randrange(4), rng.choice([1, -1])
    order = [corners[(start + step * k) % 4] for k in range(4)]
    return [float(value) for corner in order for value in corner], (x, y, width, height, angle)


def shared_area(one, other):
    """Of two convex outlines: one is cut along each side of the other, and the shoelace formula gives what is left."""

    def area(points):
        return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True)) / 2

    one, other = ([tuple(box[i : i + 2]) for i in range(0, 8, 2)] for box in (one, other))
    one, other = (points if area(points) > 0 else points[::-1] for points in (one, other))
    left = one
    for a, b in zip(other, other[1:] + other[:1], strict=True):
        sides = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in left]
        cut = []
        for i, p in enumerate(left):
            q, s, t = left[(i + 1) % len(left)], sides[i], sides[(i + 1) % len(left)]
            cut += [p] if s >= 0 else []
            if s * t < 0:
                cut.append(tuple(u + s / (s - t) * (v - u) for u, v in zip(p, q, strict=True)))
        left = cut
    return (area(left) if left else 0.0), area(one), area(other)


def slow_iou(one, other):
    common, first, second = shared_area(one, other)
    return common / (first + second - common)


def upright_corners(box):
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ious(predictions, references):
    return [iou(one[0], other[0]) for one, other in zip(predictions, references, strict=True)]


def test_upright_boxes_against_shapely():
    rng = random.Random(6)
    references = [[random_box(rng)] for _ in range(CASES)]
    predictions = [[random_box(rng, near[0])] for near in references]
    expected = []
    for [said], [true] in zip(predictions, references, strict=True):
        one, other = (shapely_box(min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])) for b in (said, true))
        expected.append(one.intersection(other).area / one.union(other).area)
    check_boxes(predictions, references, expected)


def test_oriented_boxes_against_clipping():
    rng = random.Random(7)
    pairs = [turned_box(rng) for _ in range(CASES)]
    references = [[box] for box, _ in pairs]
    predictions = [
        [upright_corners(random_box(rng)) if rng.random() < 0.2 else turned_box(rng, near)[0]] for _, near in pairs
    ]
    expected = [slow_iou(said[0], true[0]) for said, true in zip(predictions, references, strict=True)]
    check_boxes(predictions, references, expected)


def check_boxes(predictions, references, expected):
    assert ious(predictions, references) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < mean(value > 0.5 for value in expected) < 0.9
    found = compute("visual_grounding", predictions, references, thresholds=[0.5, 0.75])
    assert found["mean_iou"]["value"] == pytest.approx(mean(expected))
    assert found["scores"] == [float(value >= 0.5) for value in expected]
    assert found["accuracy_0.5"]["value"] == pytest.approx(mean(value >= 0.5 for value in expected))
    assert found["accuracy_0.75"]["value"] == pytest.approx(mean(value >= 0.75 for value in expected))


def test_an_upright_box_is_the_same_as_its_four_corners():
    rng = random.Random(8)
    plain = [([random_box(rng)], [random_box(rng)]) for _ in range(200)]
    corners = [([upright_corners(said[0])], true) for said, true in plain]
    assert ious(*zip(*plain, strict=True)) == pytest.approx(ious(*zip(*corners, strict=True)))


def slow_matches(said, true, limit=None):
    """Partners by searching for the best pair again and again."""
    said, found = said[: len(true) if limit is None else limit], {}
    used = set()
    while True:
        free = [(i, j) for i in range(len(said)) for j in range(len(true)) if i not in used and j not in found]
        if not free:
            return [found.get(j, 0.0) for j in range(len(true))]
        values = {(i, j): slow_iou(upright_corners(ordered(said[i])), upright_corners(ordered(true[j]))) for i, j in free}
        i, j = max(sorted(values), key=values.__getitem__)
        used.add(i)
        found[j] = values[i, j]


def ordered(box):
    return [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]


def test_several_boxes_against_a_search():
    rng = random.Random(9)
    references = [[random_box(rng) for _ in range(rng.randint(1, 4))] for _ in range(CASES)]
    predictions = [
        [random_box(rng, rng.choice(true)) for _ in range(rng.choice([0, 1, 2, 3, 4, 10]))] for true in references
    ]
    found = compute("visual_grounding", predictions, references, thresholds=[0.5])
    matched = [slow_matches(said, true) for said, true in zip(predictions, references, strict=True)]
    assert found["mean_iou"]["value"] == pytest.approx(mean(map(mean, matched)))
    shares = [mean(value >= 0.5 for value in values) for values in matched]
    assert found["scores"] == pytest.approx(shares) and found["accuracy_0.5"]["value"] == pytest.approx(mean(shares))


def test_more_boxes_than_asked_for_gain_nothing():
    rng = random.Random(10)
    references = [[random_box(rng) for _ in range(rng.randint(1, 3))] for _ in range(300)]
    predictions = [[random_box(rng) for _ in true] for true in references]
    more = [[*said, *true, *[random_box(rng) for _ in range(7)]] for said, true in zip(predictions, references, strict=True)]
    assert compute("visual_grounding", predictions, references) == compute("visual_grounding", more, references)


TRUE = [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("said", "true", "overlap"),
    [
        ([], [TRUE], 0),
        ([[10, 10, 0, 0]], [TRUE], 1),  # corners swapped
        ([[10, 0, 0, 10]], [TRUE], 1),
        ([TRUE], [[0, 10, 10, 0]], 1),
        ([[0, 0, 10, 0]], [TRUE], 0),  # no area
        ([TRUE], [[5, 5, 5, 5]], 0),
        ([[5, 5, 5, 5]], [[5, 5, 5, 5]], 0),
        ([[10, 0, 20, 10]], [TRUE], 0),  # side by side
        ([[0, 0, 10, 5]], [TRUE], 0.5),
        ([[0, 0, 10, 10, 0, 10, 10, 0]], [TRUE], 1),  # four corners, crosswise
        ([[5, 0, 10, 5, 5, 10, 0, 5]], [TRUE], 0.5),  # on its tip
        ([[0, 0, 5, 5, 10, 10, 2, 2]], [TRUE], 0),  # four corners in a line
        ([TRUE] * 10, [TRUE], 1),  # ten boxes, of which the first counts
        ([[90, 90, 91, 91]] + [TRUE] * 9, [TRUE], 0),
        ([TRUE, TRUE], [TRUE, [20, 20, 30, 30]], 0.5),  # one box is no partner of two
        ([TRUE], [TRUE] * 10, 0.1),
        ([[20, 20, 30, 30], TRUE], [TRUE, [20, 20, 30, 30]], 1),  # in any order
    ],
)
def test_boxes_by_hand(said, true, overlap):
    found = compute("visual_grounding", [said], [true])
    assert found["mean_iou"]["value"] == pytest.approx(overlap)
    assert found["mean_iou"]["n"] == 1 and (said != [] or found["parsed"] == [[]])


def test_a_threshold_is_enough():
    assert compute("visual_grounding", [[[0, 0, 10, 5]]], [[TRUE]])["scores"] == [1.0]


# Lists of boxes and points


POOLED = ("precision", "recall", "f1")


def most_pairs(fits):
    """The size of the largest matching of a (predicted, true) table of which pairs fit, by an independent solver."""
    solve = pytest.importorskip("scipy.optimize").linear_sum_assignment
    fits = np.asarray(fits, dtype=float)
    return int(fits[solve(-fits)].sum()) if fits.size else 0


def expected_figures(matched, predicted, true):
    """From sums over all images; F1 as the harmonic mean."""
    precision, recall = sum(matched) / sum(predicted), sum(matched) / sum(true)
    return {"precision": precision, "recall": recall, "f1": 2 / (1 / precision + 1 / recall)}


def check_list(found, matched, predicted, true):
    """All figures against those from the numbers of matched, predicted and true objects of each image."""
    assert {name: found[name]["value"] for name in POOLED} == pytest.approx(expected_figures(matched, predicted, true))
    assert found["scores"] == pytest.approx(
        [2 * m / (p + t) if p + t else 1 for m, p, t in zip(matched, predicted, true, strict=True)]
    )
    errors = [abs(p - t) for p, t in zip(predicted, true, strict=True)]
    assert found["count_mae"]["value"] == pytest.approx(mean(errors))
    assert found["exact_count"]["value"] == pytest.approx(mean(error == 0 for error in errors))
    assert 0.2 < found["f1"]["value"] < 0.9 and 0 in true and 0 in predicted  # otherwise nothing was tried


def overlap(one, other):
    one, other = (shapely_box(min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])) for b in (one, other))
    return one.intersection(other).area / one.union(other).area


def test_boxes_of_separate_objects_against_the_best_matching():
    """A box fits only one of several objects that do not overlap, so that the greedy matching is the best one."""
    rng = random.Random(20)
    places = [(10 * column, 10 * row) for column in range(4) for row in range(3)]
    references, predictions = [], []
    for _ in range(400):
        true = [[x, y, x + rng.uniform(4, 9), y + rng.uniform(4, 9)] for x, y in rng.sample(places, rng.randint(0, 5))]
        near = [rng.choice(true) for _ in range(rng.randint(0, 6))] if true else []
        said = [[value + rng.uniform(-1.5, 1.5) for value in box] for box in near]
        said += [[0, 0, 40, 30]] * rng.randint(0, 1)
        references.append(true)
        predictions.append(rng.sample(said, len(said)))
    found = compute("object_detection", predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    matched = [most_pairs([[overlap(a, b) >= 0.5 for b in true] for a in said]) for said, true in pairs]
    check_list(found, matched, list(map(len, predictions)), list(map(len, references)))


@pytest.fixture(scope="module")
def crowded():
    """Boxes that overlap, some of them false, and images without any."""
    rng = random.Random(21)
    references = [[random_box(rng) for _ in range(rng.randint(0, 4))] for _ in range(400)]
    predictions = [
        [random_box(rng, rng.choice(true) if true else None) for _ in range(rng.randint(0, 6))] for true in references
    ]
    return predictions, references


def test_boxes_that_overlap_against_a_search(crowded):
    predictions, references = crowded
    found = compute("object_detection", predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    matched = [sum(value >= 0.5 for value in slow_matches(said, true, len(said))) for said, true in pairs]
    check_list(found, matched, list(map(len, predictions)), list(map(len, references)))
    best = [most_pairs([[overlap(a, b) >= 0.5 for b in true] for a in said]) for said, true in pairs]
    assert all(greedy <= most for greedy, most in zip(matched, best, strict=True))


def test_points_against_the_best_matching(crowded):
    """Boxes overlap, so that a point often lies in several of them."""
    rng = random.Random(22)
    references = crowded[1]
    near = [[rng.choice(true) if true else [0, 0, 100, 100] for _ in range(rng.randint(0, 6))] for true in references]
    predictions = [[[rng.triangular(*box[::2]), rng.triangular(*box[1::2])] for box in boxes] for boxes in near]
    found = compute("pointing", predictions, references)

    def inside(point, box):
        return min(box[0], box[2]) <= point[0] <= max(box[0], box[2]) and min(box[1::2]) <= point[1] <= max(box[1::2])

    pairs = list(zip(predictions, references, strict=True))
    matched = [most_pairs([[inside(point, box) for box in true] for point in said]) for said, true in pairs]
    check_list(found, matched, list(map(len, predictions)), list(map(len, references)))


def test_long_chains_of_points_are_matched():
    """Point i lies in the boxes i and i + 1 and takes the first; the last point moves all others on."""
    boxes = [[10 * i, 0, 10 * i + 12, 10] for i in range(1100)]
    points = [[10 * i + 11, 5] for i in range(1099)] + [[5, 5]]
    assert compute("pointing", [points], [boxes])["recall"]["value"] == 1
    assert compute("pointing", [points[::-1]], [boxes])["recall"]["value"] == 1


@pytest.mark.parametrize("name", ["object_detection", "pointing"])
def test_properties_of_lists(name, crowded):
    _, references = crowded
    middle = {"object_detection": list, "pointing": lambda box: [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}[name]
    far = {"object_detection": [900, 900, 910, 910], "pointing": [900, 900]}[name]
    perfect = [[middle(box) for box in true] for true in references]
    some = [[*said[: len(said) // 2 + 1], far] for said in perfect]

    def values(predictions):
        results = compute(name, predictions, references)
        return {key: results[key]["value"] for key in ("precision", "recall", "f1", "exact_count")}, results["scores"]

    figures, scores = values(perfect)
    assert set(figures.values()) == set(scores) == {1.0}
    figures, scores = values(some)
    assert figures["precision"] < 1 and figures["recall"] < 1
    assert values([said[::-1] for said in some]) == (figures, scores)  # in any order
    more, _ = values([said + [far] * 2 for said in some])  # further ones cost precision only
    assert more["recall"] == figures["recall"] and more["precision"] < figures["precision"]
    twice, _ = values([said * 2 for said in perfect])  # also those of an object that was found already
    assert twice["recall"] == 1 and twice["precision"] == 0.5


def test_precision_and_recall_change_places_with_predictions_and_truth(crowded):
    one, other = compute("object_detection", *crowded), compute("object_detection", *crowded[::-1])
    for name, mirrored in zip(POOLED, ("recall", "precision", "f1"), strict=True):
        assert one[name] == other[mirrored]
    assert one["scores"] == other["scores"] and one["count_mae"] == other["count_mae"]


BOX, POINT = [0, 0, 10, 10], [5, 5]


@pytest.mark.parametrize(
    ("said", "true", "score", "error"),
    [
        ([], [], 1, 0),
        (None, [], 0, 1),  # as for a number that is not said
        (None, [BOX] * 3, 0, 3),
        ([], [BOX] * 2, 0, 2),
        ([BOX], [], 0, 1),
        ([BOX, BOX], [BOX], 2 / 3, 1),
        ([BOX], [BOX, [20, 20, 30, 30]], 2 / 3, 1),
    ],
)
def test_lists_by_hand(said, true, score, error):
    for name, places in {"object_detection": said, "pointing": said and [POINT for _ in said]}.items():
        found = compute(name, [places], [true])
        assert found["scores"] == [pytest.approx(score)] and found["parsed"] == [places]
        assert found["f1"]["value"] == pytest.approx(1 if not said and not true else score)
        assert found["count_mae"]["value"] == error and found["exact_count"]["value"] == (error == 0)


@pytest.mark.parametrize(
    ("box", "inside", "outside"),
    [
        (BOX, [[0, 0], [10, 5], [5, 10]], [[10.01, 5], [-0.01, 5], [5, 11]]),
        ([10, 10, 0, 0], [[3, 3]], [[11, 3]]),
        ([5, 0, 10, 5, 5, 10, 0, 5], [[5, 5], [2.5, 2.5]], [[1, 1], [9, 9]]),  # on its tip
        ([5, 5, 5, 5], [[5, 5]], [[5, 5.01]]),  # no area
    ],
)
def test_points_in_boxes_by_hand(box, inside, outside):
    points = [*inside, *outside]
    found = compute("pointing", [[point] for point in points], [[box]] * len(points))
    assert found["scores"] == [1.0] * len(inside) + [0.0] * len(outside)


def test_the_threshold_of_a_box():
    half = ([[[0, 0, 10, 5]]], [[BOX]])
    assert compute("object_detection", *half)["scores"] == [1.0]
    assert compute("object_detection", *half, threshold=0.51)["scores"] == [0.0]


def test_intervals_of_lists_are_those_of_drawing_images(crowded):
    predictions, references = (part[:40] for part in crowded)
    found = compute("object_detection", predictions, references)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(1000):
        times = rng.multinomial(40, np.full(40, 1 / 40))
        chosen = [index for index, n in enumerate(times) for _ in range(n)]
        sizes = [len(predictions[i]) + len(references[i]) for i in chosen]
        drawn.append(sum(found["scores"][i] * size for i, size in zip(chosen, sizes, strict=True)) / sum(sizes))
    assert [found["f1"][name] for name in ("low", "high")] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert found["f1"]["n"] == 40


@pytest.mark.parametrize("name", METRICS)
def test_the_library_takes_every_file_as_it_is(name, tmp_path):
    """Also a copy of the file elsewhere, with nothing beside it."""
    for path in (FOLDER / f"{name}.py", tmp_path / f"{name}.py"):
        path.write_text((FOLDER / f"{name}.py").read_text()) if path.parent == tmp_path else None
        prediction, reference = GOOD[name]
        found = evaluate.load(str(path)).compute(predictions=[prediction], references=[reference], **SETTINGS.get(name, {}))
        assert len(found["scores"]) == 1


# Facts of captions


@pytest.mark.parametrize(
    ("said", "true", "facts", "exact"),
    [
        ("A harbor scene with 2 ships and 1 car.", "A harbor scene with 2 ships and 1 car.", 1, 1),
        ("a harbor scene with 2 ships and 1 car", "A harbor scene with 2 ships and 1 car.", 1, 1),
        ("In this harbor scene one sees 1 car, 2 ships", "A harbor scene with 2 ships and 1 car.", 1, 0),
        ("A harbor scene with 3 ships and 1 car.", "A harbor scene with 2 ships and 1 car.", 2 / 3, 0),
        ("A desert scene with 2 ships, 3 ships.", "A harbor scene with 2 ships and 1 car.", 1 / 3, 0),
        ("2 ships", "A harbor scene with 2 ships and 1 car.", 1 / 2, 0),
        ("A harbor with two ships", "A harbor scene with 2 ships and 1 car.", 0, 0),
        ("", "A desert scene with no objects.", 0, 0),
    ],
)
def test_facts_of_captions_by_hand(said, true, facts, exact):
    found = compute("caption_facts", [said], [[true]], **FACTS)
    assert found["caption_facts"]["value"] == pytest.approx(facts) and found["scores"] == [pytest.approx(facts)]
    assert found["caption_exact"]["value"] == exact
    several = compute("caption_facts", [said], [["A desert scene.", true]], **FACTS)
    assert several["caption_facts"]["value"] >= found["caption_facts"]["value"]


def test_captions_of_scenes_against_their_plans():
    """The facts are those that the scene was drawn from; one wrong number costs the two facts that differ."""
    settings = dict(BENCHMARKS["scenes"].metrics["captioning"][1].settings)
    scenes = [plan_scene(scene_seed("validation", index), 256, (8.0, 16.0)) for index in range(60)]
    scenes = [scene for scene in scenes if any(scene.counts.values())]
    true, facts = [describe(scene) for scene in scenes], []
    for scene in scenes:
        counts = [f"{number} {kind}" for kind, number in scene.counts.items() if number]
        facts.append(sorted([f"{scene.scene_class} scene", *counts]))
    found = compute("caption_facts", true, [[text] for text in true], **settings)
    assert found["parsed"] == [", ".join(group) for group in facts] and set(found["scores"]) == {1.0}
    wrong = [re.sub(r"\d+", lambda match: str(int(match[0]) + 7), text, count=1) for text in true]
    found = compute("caption_facts", wrong, [[text] for text in true], **settings)
    assert found["scores"] == pytest.approx([(len(group) - 1) / len(group) for group in facts])
