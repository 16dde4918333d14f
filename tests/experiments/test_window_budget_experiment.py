"""The experiment on window budgets: ways to choose, the features they show, tables, and the command on a few scenes."""

import json

import numpy as np
import pytest
import torch

from mfrsvlm.experiments import SCENE_MODEL as MODEL
from mfrsvlm.experiments import window_budget
from mfrsvlm.processing_mfrsvlm import cut_windows
from mfrsvlm.scenes import KINDS
from mfrsvlm.training.demo_model.scene_images import canvas_and_view, to_pixels
from mfrsvlm.training.image_features import project


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory):
    torch.manual_seed(0)
    model, processor = window_budget.make_model(MODEL)
    return model, window_budget.Data(model, processor, tmp_path_factory.mktemp("work"), "validation", 2)


def test_scenes_have_few_objects():
    scenes = window_budget.few_objects("test", 5)
    assert len({scene.seed for scene in scenes}) == 5
    assert all(0 < len(scene.objects) <= window_budget.MOST_OBJECTS for scene in scenes)
    scene = scenes[0]
    every = window_budget.asked_objects(scene, "Are there more ships, aircraft and cars than tanks and buildings?", 4)
    assert every.sum() == len(scene.objects)
    for kind in KINDS:
        found = window_budget.asked_objects(scene, f"Is there a {kind} here?", 4).view(4, 4)
        assert found.sum() == scene.counts[kind]
        for item in scene.objects:
            assert item.kind != kind or found[int(item.y // 128), int(item.x // 128)] > 0


@torch.no_grad()
def test_cached_features_are_those_of_the_model(model_and_data):
    """For the model's own scorer, with and without questions, and for all windows."""
    model, data = model_and_data
    choices = window_budget.Choices(model)
    rows = range(len(data))
    views, pixels = [], []
    for scene, _ in data.questions:
        canvas, view = (to_pixels(image[None]) for image in canvas_and_view(data.scenes[scene], (512, 128)))
        views.append(view.flatten())
        pixels.append(torch.from_numpy(cut_windows(canvas[0].numpy(), model.config.windows)))
    packed = torch.cat([torch.stack(views), torch.stack(pixels)], dim=1)
    ways = {(window_budget.QUESTION, 4): data.question_ids, (window_budget.CONTENT, 2): None, (window_budget.ALL, 16): None}
    for (way, budget), question_ids in ways.items():
        shown, chosen = window_budget.show(model, choices, data, rows, way, budget, seed=0)
        model.config.window_budget = budget
        expected = model.get_image_features(packed, question_ids=question_ids)
        assert chosen.shape == (len(data), budget)
        projected = project(model, shown)
        for stack, other in zip(projected.deepstack_features, expected.deepstack_features, strict=True):
            assert torch.allclose(torch.stack(stack), torch.stack(other), rtol=0.02, atol=0.02)  # cached in float16


@torch.no_grad()
def test_ways_choose_what_they_say(model_and_data):
    model, data = model_and_data
    choices, rows = window_budget.Choices(model), range(len(data))
    centre = window_budget.choose_windows(choices.scores(window_budget.CENTRE, data, rows, [], 0), 4)
    assert centre.tolist() == [[5, 6, 9, 10]] * len(data)
    random = choices.scores(window_budget.RANDOM, data, rows, [], 0)
    assert torch.equal(random[1:2], choices.scores(window_budget.RANDOM, data, rows[1:2], [], 0))
    assert not torch.equal(random, choices.scores(window_budget.RANDOM, data, rows, [], 1))
    known = choices.scores(window_budget.KNOWN, data, rows, [], 0)
    for (scene, question), counts in zip(data.questions, known, strict=True):
        assert torch.equal(counts, window_budget.asked_objects(data.scenes[scene], question.text, 4))
    none, chosen = window_budget.show(model, choices, data, rows, window_budget.NONE, 4, 0)
    assert chosen.shape == (len(data), 0) and none.shape == (len(data), 33, 64, 128)


def test_table_compares_question_by_question(tmp_path):
    tasks, answers = ["presence", "presence", "count", "count"], ["yes", "no", "2", "2"]
    ways = [(window_budget.ALL, 16), (window_budget.QUESTION, 4), (window_budget.NONE, 0)]
    right = {16: [1.0, 1.0, 1.0, 0.0], 4: [1.0, 1.0, 1.0, 0.0], 0: [0.0, 0.0, 1.0, 0.0]}
    scores = [{"way": way, "budget": budget, "right": right[budget], "seen": [budget / 16]} for way, budget in ways]
    row = {"tasks": tasks, "answers": answers, "scores": scores, "settings": [1, 2, 3]}
    summary = window_budget.summarize([{**row, "seed": 0}, {**row, "seed": 1}])
    assert [entry["difference"][0] for entry in summary] == [0, 0, -0.5]
    assert summary[1]["passes"] == 5 and summary[1]["tasks"] == {"presence": 1.0, "count": 0.5}
    written = window_budget.tables([row, row], summary)
    assert f"| {window_budget.QUESTION} | 5 | 5 |\n" in written
    assert f"| {window_budget.RANDOM} | more than 9 | more than 9 |\n" in written
    assert "| always the most frequent answer to a task | 0 | 0 | - | - | - | 50.0 | 100.0 | - |" in written
    window_budget.write_plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.integration
def test_command_continues_where_it_stopped(tmp_path, capsys):
    work, table = tmp_path / "work", tmp_path / "table.md"
    command = ["--model", MODEL, "--work", str(work), "--table", str(table), "--plot", str(tmp_path / "plot.png")]
    command += ["--train-scenes", "8", "--test-scenes", "2", "--steps", "2"]
    window_budget.main([*command, "--seeds", "1"])
    (row,) = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    assert len(row["scores"]) == 2 + 5 * len(window_budget.BUDGETS)
    assert all(len(entry["right"]) == len(row["tasks"]) and np.isfinite(entry["seen"]).all() for entry in row["scores"])
    assert table.read_text().count("\n| ") == 1 + 1 + len(row["scores"]) + 1 + len(window_budget.CHOSEN)
    (work / "features-train-8.pt").unlink()  # nothing is run again
    window_budget.main([*command, "--seeds", "1"])
    assert len((work / "runs.jsonl").read_text().splitlines()) == 1
