"""Synthetic scenes: the same every time, true in every pixel and every answer, balanced, written and scored as promised."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mfrsvlm.evaluation import load_benchmark
from mfrsvlm.evaluation.evaluate import evaluate_majority
from mfrsvlm.evaluation.protocols import PROTOCOLS
from mfrsvlm.scenes import (
    CLASSES,
    KINDS,
    TASKS,
    Scene,
    SceneObject,
    ask,
    ask_change,
    draw,
    plan_change,
    plan_scene,
    scene_seed,
)
from mfrsvlm.scenes.__main__ import main
from mfrsvlm.scenes.dataset import DatasetPlan, write_dataset
from mfrsvlm.scenes.drawing import SCENES_PER_SPLIT, SPLITS


SMALL, SMALL_OBJECTS = 128, (2.0, 4.0)  # the default geometry at a quarter of its size: quick to plan
URBAN = {"airport", "harbor", "industrial", "dense residential", "medium residential"}
SINGULAR = {"ships": "ship", "cars": "car", "tanks": "tank", "buildings": "building"}


def small_scene(index: int, split: str = "test") -> Scene:
    return plan_scene(scene_seed(split, index), SMALL, SMALL_OBJECTS)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [small_scene(index) for index in range(1000)]


def scene_of(scene_class: str, size: int = 256, object_pixels: tuple[float, float] = (8.0, 16.0)) -> Scene:
    plans = (plan_scene(scene_seed("test", index), size, object_pixels) for index in itertools.count())
    return next(scene for scene in plans if scene.scene_class == scene_class and scene.objects)


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene)).astype(int)


def without(scene: Scene, item: SceneObject) -> Scene:
    return replace(scene, objects=tuple(other for other in scene.objects if other is not item))


def changed_extent(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels in which two drawings differ."""
    rows, columns = np.nonzero((first != second).any(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


# The same every time


def test_same_seed_gives_the_same_plan_and_pixels():
    first, again, other = small_scene(3), small_scene(3), small_scene(4)
    assert first == again != other
    assert (pixels(first) == pixels(again)).all()
    assert (pixels(first) != pixels(other)).any()
    assert plan_change(first, SMALL_OBJECTS) == plan_change(again, SMALL_OBJECTS)
    assert ask(first) == ask(again)


def test_splits_share_no_seed():
    ranges = [(scene_seed(split, 0), scene_seed(split, SCENES_PER_SPLIT - 1)) for split in SPLITS]
    for (low, high), (other_low, other_high) in itertools.combinations(ranges, 2):
        assert high < other_low or other_high < low
    assert len({small_scene(0, split) for split in SPLITS}) == len(SPLITS)


# True in every pixel


@pytest.mark.parametrize("scene_class", CLASSES)
def test_objects_are_where_the_plan_says(scene_class):
    """Without an object the picture differs where its box is, and nowhere else but for its shadow."""
    scene = scene_of(scene_class)
    picture = pixels(scene)
    for item in {item.kind: item for item in scene.objects}.values():
        found = changed_extent(picture, pixels(without(scene, item)))
        shadow = 0 if item.kind == "ship" else 0.12 * item.length  # to the lower right
        left, top, right, bottom = item.box
        for edge, low, high in zip(
            found,
            (left - 1, top - 1, right - 2, bottom - 2),
            (left + 2, top + 2, right + shadow + 1, bottom + shadow + 1),
            strict=True,
        ):
            assert low <= edge <= high, (item, item.box, found)


def test_objects_lie_inside_the_image_and_apart(scenes):
    for scene in scenes[:250]:
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= scene.size and 0 <= top < bottom <= scene.size
            assert SMALL_OBJECTS[0] <= item.length <= SMALL_OBJECTS[1]
        for a, b in itertools.combinations(scene.objects, 2):
            # The farthest corner of any kind is that of a building, 0.64 of its length from the center.
            assert np.hypot(a.x - b.x, a.y - b.y) > 0.64 * (a.length + b.length)


def test_ships_lie_on_water_only(scenes):
    afloat = [scene for scene in scenes if scene.counts["ship"]]
    assert {scene.scene_class for scene in afloat} == {name for name, (_, has_water) in CLASSES.items() if has_water}
    for scene in afloat[:25]:
        empty = pixels(replace(scene, objects=()))
        for item in scene.objects:
            if item.kind == "ship":
                left, top, right, bottom = (round(value) for value in item.box)
                red, _, blue = np.median(empty[top : bottom + 1, left : right + 1], axis=(0, 1))
                assert blue > red + 8, (scene.seed, item)


@pytest.mark.parametrize(("size", "low", "high"), [(448, 8, 16), (512, 4, 4), (1024, 4, 64), (64, 2, 4), (65, 4, 4)])
def test_sizes(size, low, high):
    scene = plan_scene(scene_seed("test", 1), size, (low, high))
    picture = pixels(scene)
    assert picture.shape == (size, size, 3)
    smallest = min(scene.objects, key=lambda item: item.length)
    assert low <= smallest.length <= high
    left, top, right, bottom = changed_extent(picture, pixels(without(scene, smallest)))
    assert abs((left + right) / 2 - smallest.x) < smallest.length and abs((top + bottom) / 2 - smallest.y) < smallest.length


def test_crowding_multiplies_the_objects():
    plain, crowded = (plan_scene(scene_seed("test", 2), SMALL, SMALL_OBJECTS, crowding) for crowding in (1, 3))
    first = plain.objects[0].kind  # counts of later kinds are drawn after more lots
    assert crowded.counts[first] == 3 * plain.counts[first]


# True in every answer


def count_of(scene: Scene, noun: str) -> int:
    return len([item for item in scene.objects if item.kind == SINGULAR.get(noun, noun)])


def the_only(scene: Scene, kind: str) -> SceneObject:
    [item] = [item for item in scene.objects if item.kind == kind]
    return item


def right_answer(scene: Scene, text: str) -> str:
    """The answer to a question, from its words and the objects alone."""
    if text == "What is the class of this scene?":
        return scene.scene_class
    if text == "Is this a rural or an urban area?":
        return "urban" if scene.scene_class in URBAN else "rural"
    if match := re.fullmatch(r"Is there an? (\w+) in this scene\?", text):
        return "yes" if count_of(scene, match[1]) else "no"
    if match := re.fullmatch(r"How many (\w+) are there\?", text):
        return str(count_of(scene, match[1]))
    if match := re.fullmatch(r"Are there more (\w+) than (\w+)\?", text):
        return "yes" if count_of(scene, match[1]) > count_of(scene, match[2]) else "no"
    if match := re.fullmatch(r"Is the (\w+) left or right of the (\w+)\?", text):
        return "left" if the_only(scene, match[1]).x < the_only(scene, match[2]).x else "right"
    if match := re.fullmatch(r"Is the (\w+) above or below the (\w+)\?", text):
        return "above" if the_only(scene, match[1]).y < the_only(scene, match[2]).y else "below"
    if match := re.fullmatch(r"Give the bounding box of the (\w+)\.", text):
        return "[" + ", ".join(f"{round(v * 1000 / scene.size):03d}" for v in the_only(scene, match[1]).box) + "]"
    if match := re.fullmatch(r"(Give the bounding box of|Point to) every (\w+)\.", text):
        found = sorted((item for item in scene.objects if item.kind == match[2]), key=lambda item: item.box[0])
        places = [
            item.box if match[1].startswith("Give") else np.reshape(item.box, (2, 2)).mean(0).tolist() for item in found
        ]
        written = ["[" + ", ".join(f"{round(v * 1000 / scene.size):03d}" for v in place) + "]" for place in places]
        return ", ".join(written) or "none"
    assert text == "Describe this image."
    counts = [(count_of(scene, kind), kind) for kind in ("ship", "aircraft", "car", "tank", "building")]
    listed = [f"{n} {kind}{'s' if n > 1 and kind != 'aircraft' else ''}" for n, kind in counts if n]
    article = "An" if scene.scene_class in ("airport", "industrial") else "A"
    return f"{article} {scene.scene_class} scene with {' and '.join(', '.join(listed).rsplit(', ', 1))}."


def test_answers_follow_from_the_objects(scenes):
    asked = Counter()
    for scene in scenes[:150]:
        for question in ask(scene, [*TASKS, *TASKS], seed=1):
            assert question.answer == right_answer(scene, question.text), (scene.seed, question)
            asked[question.task] += 1
    assert set(asked) == set(TASKS)


def test_questions_are_not_repeated_and_vary_with_the_seed(scenes):
    questions = ask(scenes[0], ["count"] * 8)
    assert len({question.text for question in questions}) == len(questions) > 1
    assert any(ask(scene, seed=0) != ask(scene, seed=1) for scene in scenes[:5])


def test_a_question_does_not_depend_on_what_else_is_asked(scenes):
    for scene in scenes[:50]:
        asked = {question.task: question for question in ask(scene)}
        for task in TASKS:
            assert ask(scene, [task]) == ([asked[task]] if task in asked else [])


def test_another_day_changes_the_look_and_not_the_truth(scenes):
    one, other = (np.asarray(draw(scenes[0], look), dtype=float) for look in (0, 1))
    assert abs(one - other).mean() > 1
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8


def test_a_crowded_place_can_change():
    for seed in range(20):
        scene = plan_scene(seed, crowding=3)
        later, _, change = plan_change(scene)
        assert sum(later.counts.values()) - sum(scene.counts.values()) == change


def test_answers_are_balanced(scenes):
    answers: dict[str, Counter] = {task: Counter() for task in TASKS}
    for scene in scenes:
        for question in ask(scene):
            answers[question.task][question.answer] += 1

    def share(counts: Counter, answer: str) -> float:
        return counts[answer] / counts.total()

    assert 0.45 < share(answers["comparison"], "yes") < 0.55
    assert 0.45 < share(answers["presence"], "yes") < 0.55
    for first, second in (("left", "right"), ("above", "below")):
        sides = Counter({side: answers["position"][side] for side in (first, second)})
        assert 0.4 < share(sides, first) < 0.6
    assert all(0.06 < share(answers["count"], str(number)) < 0.15 for number in range(10))
    assert all(0.04 < share(answers["classification"], name) < 0.1 for name in CLASSES)
    assert share(answers["area"], "rural") == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize("task", ["detection", "pointing"])
def test_lists_hold_every_object_of_a_kind_from_left_to_right(scenes, task):
    lengths, strict = Counter(), PROTOCOLS["strict"]()
    for scene in scenes:
        [question] = ask(scene, [task])
        kind = re.search(r"every (\w+)\.", question.text)[1]
        assert sorted(question.boxes) == sorted(item.box for item in scene.objects if item.kind == kind)
        assert (question.answer == "none") == (not question.boxes)
        read = {"detection": strict.read_boxes, "pointing": strict.read_points}[task](question.answer, (scene.size,) * 2)
        true = question.boxes if task == "detection" else [np.reshape(box, (2, 2)).mean(0) for box in question.boxes]
        assert np.asarray(read) == pytest.approx(np.asarray(true), abs=0.000501 * scene.size)  # but for rounding
        lefts = [box[0] for box in question.boxes]
        assert lefts == sorted(lefts)
        assert kind != "ship" or scene.has_water
        lengths[len(read)] += 1
    assert 0.12 < lengths[0] / lengths.total() < 0.2  # fewer than a fifth, since some scenes lack no kind
    assert 0.3 < lengths[1] / lengths.total() < 0.5 and set(lengths) == set(range(10))


def test_questions_of_a_seed_stay_as_they_are():
    """Those of the tasks before there were lists, so that data sets and figures of these tasks can be made again."""
    tasks = [task for task in TASKS if task not in ("detection", "pointing")]
    asked = [[question.text, question.answer] for index in range(50) for question in ask(small_scene(index), tasks)]
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == "56dfd858f727ec1c"


def test_change_is_the_difference_of_counts(scenes):
    changes = Counter()
    for scene in scenes[:300]:
        later, kind, change = plan_change(scene, SMALL_OBJECTS)
        assert {name: later.counts[name] - scene.counts[name] for name in KINDS} == {
            name: change if name == kind else 0 for name in KINDS
        }
        assert set(later.objects) <= set(scene.objects) or set(scene.objects) <= set(later.objects)
        assert replace(later, objects=()) == replace(scene, objects=()) and max(later.counts.values()) <= 9
        answer = ask_change(kind, change).answer
        if not change:
            assert answer == "nothing" and kind == "" and later == scene
        else:
            number, noun, verb = answer.split()
            assert (int(number), SINGULAR.get(noun, noun)) == (abs(change), kind)
            assert noun == kind or abs(change) > 1
            assert verb == ("appeared" if change > 0 else "disappeared")
        changes[change] += 1
    assert set(changes) == set(range(-4, 5))
    assert 0.14 < changes[0] / changes.total() < 0.27


def test_change_is_seen_where_it_happened(scenes):
    pairs = [(scene, *plan_change(scene, SMALL_OBJECTS)) for scene in scenes[:40]]
    for scene, later, _, _ in [pair for pair in pairs if abs(pair[3]) == 1][:4]:
        [item] = set(scene.objects) ^ set(later.objects)
        left, top, right, bottom = changed_extent(pixels(scene), pixels(later))
        assert item.x - item.length < left < right < item.x + item.length + 1
        assert item.y - item.length < top < bottom < item.y + item.length + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene_seed("dev", 0), "'dev'.*'train'"),
        (lambda: scene_seed("train", -1), f"-1.*{SCENES_PER_SPLIT - 1}"),
        (lambda: scene_seed("train", SCENES_PER_SPLIT), f"{SCENES_PER_SPLIT} is outside.*{SCENES_PER_SPLIT - 1}"),
        (lambda: plan_scene(0, size=63), "size=63.*64 and 8192"),
        (lambda: plan_scene(0, 512, (8, 33)), r"\(8, 33\).*32"),
        (lambda: plan_scene(0, 512, (9, 8)), r"\(9, 8\).*ascending"),
        (lambda: plan_scene(0, 512, (1, 8)), r"\(1, 8\).*at least 2"),
        (lambda: ask(small_scene(0), ["count", "color"]), "'color'.*'caption'"),
        (lambda: DatasetPlan("train", 0), "count=0"),
        (lambda: DatasetPlan("train", 4, changes=5), "changes=5.*count=4"),
        (lambda: DatasetPlan("train", SCENES_PER_SPLIT + 1), f"{SCENES_PER_SPLIT - 1}"),
        (lambda: DatasetPlan("train", 4, tasks=()), r"tasks=\[\] and changes=0"),
        (lambda: DatasetPlan("train", 4, size=100), r"\(8.0, 16.0\).*6.25"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Written as promised


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["scenes", *map(str, arguments)])
    return main()


SMALL_SET = ["--split", "validation", "--count", 3, "--changes", 2, "--size", SMALL, "--object-pixels", 2, 4]


def test_command_writes_what_can_be_read_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "set"
    assert run(monkeypatch, folder, *SMALL_SET, "--workers", 2) == 0
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert f"{len(rows)} questions about 3 scenes" in capsys.readouterr().out
    assert len({row["id"] for row in rows}) == len(rows)
    expected = []
    for index in range(3):
        scene = small_scene(index, "validation")
        expected += [(scene, question) for question in ask(scene)]
        if index < 2:
            expected.append((scene, ask_change(*plan_change(scene, SMALL_OBJECTS)[1:])))
    named = set()
    for row, (scene, question) in zip(rows, expected, strict=True):
        assert (row["task"], row["answer"], row["size"], row["source_dataset"]) == (
            question.task,
            question.answer,
            SMALL,
            "scenes",
        )
        assert [tuple(box) for box in row["boxes"]] == question.boxes
        drawn = [scene, plan_change(scene, SMALL_OBJECTS)[0]] if question.task == "change" else [scene]
        human, gpt = row["conversations"]
        assert human == {"from": "human", "value": "<image>\n" * len(drawn) + question.text}
        assert gpt == {"from": "gpt", "value": question.answer}
        images = row["image"] if question.task == "change" else [row["image"]]
        for look, (name, plan) in enumerate(zip(images, drawn, strict=True)):
            assert (np.asarray(Image.open(folder / name)) == np.asarray(draw(plan, look))).all()
        named.update(images)
    assert {f"images/{path.name}" for path in (folder / "images").iterdir()} == named and len(named) == 5
    assert sorted(path.name for path in folder.iterdir()) == ["images", "validation.jsonl"]


@pytest.mark.integration
def test_another_process_writes_the_same_files(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "mfrsvlm.scenes", str(tmp_path / "a"), *map(str, SMALL_SET), "--workers", "1"]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert run(monkeypatch, tmp_path / "b", *SMALL_SET, "--workers", 2) == 0
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "ab"]
    for first, second in zip(*files, strict=True):
        assert first.name == second.name and first.read_bytes() == second.read_bytes()


def test_tasks_are_chosen_and_scenes_without_a_question_left_out(tmp_path):
    plan = DatasetPlan("test", 12, SMALL, SMALL_OBJECTS, tasks=("position",))
    asked = [index for index in range(12) if ask(small_scene(index), ["position"])]
    assert write_dataset(tmp_path / "set", plan) == len(asked) < 12
    assert sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "set" / "images").iterdir()) == asked


def test_command_never_overwrites(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert run(monkeypatch, tmp_path, *SMALL_SET) == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "mine.txt", *SMALL_SET) == 2
    assert f"{tmp_path / 'mine.txt'} is a file, not a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert run(monkeypatch, tmp_path / "new", *SMALL_SET, "--tasks", "color") == 1
    assert run(monkeypatch, tmp_path / "new", *SMALL_SET, "--workers", 0) == 1
    assert re.search(r"'color'[^\n]*\n.*workers=0", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
    for arguments in ([], [tmp_path / "new", "--contact-sheet", tmp_path / "sheet.jpg"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)


def test_contact_sheet_is_a_small_picture(tmp_path, monkeypatch):
    assert run(monkeypatch, "--contact-sheet", tmp_path / "sheet.jpg") == 0
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 1000
    assert (tmp_path / "sheet.jpg").stat().st_size < 400_000


# Scored as promised


def test_true_answers_score_and_others_do_not():
    """Questions without a benchmark file go through the evaluation like those of any other benchmark."""
    benchmark, protocol = load_benchmark("scenes", None, "test", count=30), PROTOCOLS["strict-without-java"]()

    def shares(change):
        """Share of right answers by task, of answers that are made from the ideal one."""
        figures: dict[str, float] = {}
        for task, name in FIGURES.items():
            samples = [sample for sample in benchmark.samples if sample.task == task]
            answers = [change(protocol.ideal_answer(sample)) for sample in samples]
            found, _, scores = protocol.score(benchmark, task, samples, answers)
            figures[task] = found[name]["value"]
            if task in ("detection", "pointing"):  # also of the images without an object, which F1 does not count
                figures[f"{task} by image"] = sum(scores) / len(scores)
        return set(figures.values())

    assert shares(lambda answer: answer) == shares(lambda answer: f"  {answer.upper().rstrip('.')}.\n") == {1.0}
    for wrong in ("", " . ", "perhaps"):
        assert shares(lambda answer, wrong=wrong: wrong) == {0.0}
    assert shares(lambda answer: f"not {answer.replace('[', '(')[1:]}") == {0.0}


FIGURES = {
    "classification": "accuracy",
    "vqa": "accuracy",
    "counting": "exact",
    "grounding": "accuracy_0.5",
    "captioning": "caption_exact",
    "detection": "f1",
    "pointing": "f1",
}


def test_the_majority_answer_is_little_better_than_a_guess():
    benchmark = load_benchmark("scenes", None, "test", count=300)
    results = evaluate_majority([benchmark], "strict-without-java")["scenes/test"]["results"]
    kinds = results["vqa"]["per_type"]
    assert 0.5 <= kinds["presence"]["value"] < 0.6 and 0.5 <= kinds["position"]["value"] < 0.65
    assert results["counting"]["exact"]["value"] < 0.2
    classes = Counter(sample.references[0] for sample in benchmark.samples if sample.task == "classification")
    assert results["classification"]["accuracy"]["value"] == max(classes.values()) / 300
    for task in ("detection", "pointing"):
        assert results[task]["f1"]["value"] == 0 and 0.1 < results[task]["exact_count"]["value"] < 0.25
