"""Decoders for several layouts of the windows: their start, their answers, the table, and the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from mfrsvlm.configuration_mfrsvlm import MFRSVLMConfig
from mfrsvlm.evaluation.answering import Answerer, Prompt
from mfrsvlm.experiments import SCENE_MODEL as MODEL
from mfrsvlm.experiments import window_modes
from mfrsvlm.experiments.ablation import task_of
from mfrsvlm.experiments.window_modes import ARMS, EFFICIENT, LARGE_CANVAS, REFERENCE, SMALL_CANVAS
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.scenes import draw
from mfrsvlm.training.demo_model.scene_images import SCENE_SIZE, VIEW, SceneImages, plan


OWN = "as the small model: large windows, overlap 0.5"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return SceneImages(tmp_path_factory.mktemp("scenes"), "test", 2, workers=1, sides=(SCENE_SIZE, VIEW))


def geometry(canvas_scale, sizes):
    return SimpleNamespace(canvas_scale=canvas_scale, window_sizes=sizes)


def test_arms_are_the_layouts_that_they_are_named_after():
    passes = {arm: window_modes.load(arm, MODEL)[0].config.encoder_passes for arm in ARMS}
    assert list(passes.values()) == [1, 1 + 4 / 4, 1 + 16 / 4, 1 + 4 + 16 / 4, 1 + 9, 1 + 9 + 49 / 4, 1 + 64 / 4]
    vision = {"image_size": 128, "patch_size": 16, "num_hidden_layers": 24}
    mode = MFRSVLMConfig.efficient(vision_config=vision)
    assert ARMS[EFFICIENT].items() <= mode.to_dict().items()
    model, _ = window_modes.load(REFERENCE, MODEL)
    assert (model.config.window_overlap, model.config.canvas_scale) == (MFRSVLMConfig().window_overlap, mode.canvas_scale)


def test_stacks_start_from_the_embeddings_of_their_depth_and_phase():
    old = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))  # two depths of 2 x 2 phases
    one = geometry(2, [128])
    assert torch.equal(window_modes.spread(old, one, one), old)
    assert torch.equal(window_modes.spread(old, one, geometry(2, [128, 64])), torch.cat([old, old]))
    torch.testing.assert_close(
        window_modes.spread(old, one, geometry(1, [64])), torch.stack([old[:4].mean(0), old[4:].mean(0)])
    )
    larger = window_modes.spread(old, one, geometry(4, [64])).view(2, 4, 4, 5)
    for row, column, phase in ((0, 0, 0), (0, 3, 1), (3, 0, 2), (3, 3, 3)):  # corners lie beyond the old centers
        torch.testing.assert_close(larger[:, row, column], old.view(2, 4, 5)[:, phase])


def test_the_small_model_in_its_own_layout_is_unchanged():
    model, _ = window_modes.load(OWN, MODEL)
    small, _ = load_model(MODEL, dtype=torch.float32)
    assert model.config.to_dict() == small.config.to_dict()
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arm", [OWN, EFFICIENT, LARGE_CANVAS, SMALL_CANVAS, "global view only"])
def test_answers_from_features_are_those_of_the_images(arm, images, tmp_path):
    """The reference is the processor on the drawn image, with the encoder in the same pass as the decoder."""
    model, processor = window_modes.load(arm, MODEL)
    features = window_modes.features_of(model, arm, images, "test", tmp_path)
    fields = {name: getattr(model.config, name) for name in ("canvas_scale", "window_sizes", "window_overlap")}
    image_processor = type(processor.image_processor).from_dict(processor.image_processor.to_dict() | fields)
    inputs = image_processor([draw(plan("test", index)) for index in range(2)], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**inputs, return_dict=True)
    found = window_modes.FeatureAnswerer(model, processor, features)._encode([[0], [1]]).outputs
    stacks = zip(found.deepstack_features or [], expected.deepstack_features or [], strict=True)
    for one, other in ((found.pooler_output, expected.pooler_output), *stacks):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), atol=2e-2, rtol=2e-2)  # cached in float16


def test_scores_are_those_of_the_images(images, tmp_path):
    model, processor = window_modes.load(OWN, MODEL)
    features = window_modes.features_of(model, OWN, images, "test", tmp_path)
    benchmark = window_modes.test_questions(2)
    scores = window_modes.score(model, processor, features, benchmark, batch=1)
    answerer = Answerer(model, processor, window_modes.MAX_NEW_TOKENS, check_sharing=False)
    right = {}
    for sample in benchmark.samples:
        if not sample.boxes:
            prompt = Prompt(sample.question, 0)
            encoded = answerer.encode_images([[benchmark.open_image(sample.images[0])]], [prompt])
            [answer] = answerer.answer([prompt], encoded)
            task = task_of(sample.task, sample.group)
            right.setdefault(task, []).append(float(answer.text.lower() == sample.references[0].lower()))
    assert right and {task: scores[task] for task in right} == right
    assert len(scores["pointing"]) == sum(bool(sample.boxes) for sample in benchmark.samples)


def test_without_steps_the_small_model_is_scored(tmp_path):
    words = ["--work", str(tmp_path), "--table", str(tmp_path / "table.md"), "--model", MODEL, "--arms", EFFICIENT]
    window_modes.main([*words, "--steps", "0", "--seeds", "1", "--train-scenes", "3", "--test-scenes", "6"])
    [made] = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    model, processor = window_modes.load(EFFICIENT, MODEL)
    [features] = map(np.load, tmp_path.glob("features-test-6-*.npy"))
    assert made["scores"] == window_modes.score(model, processor, features, window_modes.test_questions(6))
    assert made["seconds"] == 0 and np.mean(made["scores"]["presence"]) > 0.5


def row(arm, seed, count, passes=5.0):
    scores = dict.fromkeys((*window_modes.ANSWERED, "grounding", "pointing"), [1.0] * 20)
    scores = scores | {"count": [1.0] * count + [0.0] * (20 - count)}
    return {"arm": arm, "seed": seed, "scores": scores, "encoder_passes": passes, "canvas": 256}


def test_table_compares_seed_by_seed(tmp_path):
    efficient, reference = [12, 15, 13], [14, 15, 16]
    rows = [row(EFFICIENT, seed, count) for seed, count in enumerate(efficient)]
    rows += [row(REFERENCE, seed, count, 22.25) for seed, count in enumerate(reference)] + [row(LARGE_CANVAS, 1, 18, 17.0)]
    summary = window_modes.summarize(rows, dict.fromkeys(ARMS, 0.5))
    mean, half = summary[EFFICIENT]["differences"]["count"]
    paired = stats.ttest_rel(5 * np.array(efficient), 5 * np.array(reference)).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((paired.low, paired.high))
    assert summary[LARGE_CANVAS]["differences"]["mean of these"] == (pytest.approx(3), math.inf)
    window_modes.write_table(summary, {EFFICIENT: 0.25}, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert f"| {EFFICIENT} | 256 | 5 | 0.500 | 3 | 100.0 | 100.0 | 66.7 | 100.0 | 100.0 | 93.3 | 100.0 | 100.0 |" in lines
    assert f"| {LARGE_CANVAS} | 256 | 17 | 0.500 | 1 | +0.0 | +0.0 | +15.0 | +0.0 | +0.0 | +3.0 | +0.0 | +0.0 |" in lines
    assert f"| {EFFICIENT} | 256 | 5 | 0.500 | 0.250 |" in lines
    assert sum(line.startswith(f"| {REFERENCE} |") for line in lines) == 1
    window_modes.write_plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.integration
def test_command_continues_where_it_stopped(tmp_path, capsys):
    work, table = tmp_path / "work", tmp_path / "table.md"
    words = ["--work", str(work), "--table", str(table), "--model", MODEL, "--steps", "1", "--batch", "2", "--float32"]
    words += ["--train-scenes", "3", "--test-scenes", "8"]
    window_modes.main([*words, "--seeds", "1", "--arms", EFFICIENT])
    first = (work / "runs.jsonl").read_text()
    capsys.readouterr()
    window_modes.main(
        [*words, "--seeds", "1", "--arms", "global view only", EFFICIENT, "--plot", str(tmp_path / "plot.png")]
    )
    assert "[1/1," in capsys.readouterr().out
    log = (work / "runs.jsonl").read_text()
    assert log.startswith(first)
    assert [json.loads(line)["arm"] for line in log.splitlines()] == [EFFICIENT, "global view only"]
    written = table.read_text()
    for start, times in ((f"| {EFFICIENT} | 256 | 5 |", 2), ("| global view only | - | 1 |", 1)):  # also of the probes
        assert sum(line.startswith(start) for line in written.splitlines()) == times
    window_modes.main([*words, "--seeds", "1", "--arms", EFFICIENT, "--learning-rate", "1e-5"])  # another setting
    assert "[1/1," in capsys.readouterr().out
