"""The experiments: arms and tables of the ablation, linear probes of features, and the commands."""

import json
import math

import numpy as np
import pytest
from tiny_scenes import SCENES

from mfrsvlm.experiments import ablation, encoders, linear_probe
from mfrsvlm.scenes import KINDS
from mfrsvlm.training.demo_model.architecture import make_config


def test_encoder_cost_counts_pixels():
    def passes(**overrides):
        return make_config(10, **overrides).encoder_passes

    assert passes(window_sizes=[], injection_layers=[]) == 1
    assert passes(window_sizes=[128]) == 1 + 9
    assert passes(window_sizes=[128, 64]) == 1 + 9 + 49 / 4
    assert passes(window_sizes=[64], window_overlap=0.0, window_encoding="resize") == 1 + 16


def test_every_arm_is_a_valid_model():
    for arm in ablation.ARMS.values():
        features = arm.features
        make_config(
            10,
            features.encoder,
            window_sizes=list(features.window_sizes),
            window_overlap=features.window_overlap,
            window_encoding=features.window_encoding,
            window_weighting=features.window_weighting,
            **arm.injection,
        )


def test_summary_compares_question_by_question(tmp_path):
    rng = np.random.default_rng(0)
    base = {task: (rng.random(200) < 0.5).astype(float).tolist() for task in ablation.MEASURES}
    better = {task: np.maximum(values, rng.random(200) < 0.4).tolist() for task, values in base.items()}
    cost = {"encoder_passes": 1.0, "decoder_tokens": 10, "seconds": 1.0, "peak_memory_gb": 1.0}
    rows = [{"arm": ablation.REFERENCE, "seed": 0, "scores": base, **cost}]
    rows += [{"arm": "zero ring", "seed": seed, "scores": scores, **cost} for seed, scores in enumerate((base, better))]
    first, second = ablation.summarize(rows)
    assert first["gain"]["count"] == (0, 0, 0)
    assert second["tasks"]["count"][0] == pytest.approx((np.mean(base["count"]) + np.mean(better["count"])) / 2)
    mean, low, high = second["gain"]["count"]
    assert low < mean < high and low > 0
    ablation.write_table([first, second], {"count": 0.1}, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().count("| zero ring |") == 3  # accuracy, difference, range of its seeds
    # Without the arm that others are compared with, there is no comparison.
    ablation.write_table(ablation.summarize(rows[1:]), {"count": 0.1}, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().count("| zero ring |") == 2
    assert ablation.REFERENCE not in (tmp_path / "table.md").read_text()


def test_a_log_holds_runs_of_other_arms_and_lengths(tmp_path):
    log = tmp_path / "runs.jsonl"
    assert ablation.finished_runs(log, ["zero ring"], 10) == []
    rows = [{"arm": arm, "seed": 0, "steps": steps} for arm in ("zero ring", "no overlap") for steps in (10, 20)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablation.finished_runs(log, ["zero ring"], 10) == rows[:1]
    assert ablation.finished_runs(log, ["zero ring", "no overlap"], 20) == rows[1::2]


def test_read_out_pools_tokens_and_phases():
    features = np.random.default_rng(0).normal(size=(3, 1 + 16, 4, 5)).astype(np.float16)
    pooled = linear_probe.pool(features, 4)
    assert pooled.shape == (3, 5 * 5)
    np.testing.assert_allclose(pooled[:, :5], features[:, 0].mean(1), atol=2e-3)
    # Stacks are ordered by scale, depth and phase: four phases make a group.
    np.testing.assert_allclose(pooled[:, 10:15], features[:, 5:9].mean((1, 2)), atol=2e-3)
    np.testing.assert_allclose(linear_probe.pool(features[:, :1], 0), pooled[:, :5])


def test_read_out_counts_objects_and_small_ones():
    table = linear_probe.targets(SCENES)
    assert table[:, : len(KINDS)].tolist() == [list(scene.counts.values()) for scene in SCENES]
    small = [sum(item.length < 12 for item in scene.objects) for scene in SCENES]
    assert table[:, len(KINDS) :].sum(1).tolist() == small


def test_scores_come_from_the_predictions_of_an_evaluation():
    rows = [
        {"task": "vqa", "group": "presence", "score": 1.0},
        {"task": "counting", "group": "count", "score": 0.0},
        {"task": "classification", "group": "river", "score": 1.0},
        {"task": "grounding", "group": "grounding", "score": 0.0, "parsed": [[0, 0, 10, 10]], "boxes": [[5, 0, 15, 10]]},
        {"task": "grounding", "group": "grounding", "score": 0.0, "parsed": [], "boxes": [[5, 0, 15, 10]]},
    ]
    assert ablation.scores_of(rows) == {
        "classification": [1.0], "presence": [1.0], "count": [0.0], "grounding": [0.0, 0.0],
        "mean IoU": [pytest.approx(1 / 3), 0.0], "pointing": [1.0, 0.0],
    }  # fmt: skip
    benchmark = ablation.test_questions(12)
    assert {ablation.task_of(sample.task, sample.group) for sample in benchmark.samples} == set(ablation.TASKS)


def test_boxes_are_apart_by_the_distance_of_their_centers():
    true = (100.0, 200.0, 110.0, 210.0)
    boxes = {(100, 200, 110, 210): 0, (103, 204, 113, 214): 5, (95, 195, 115, 215): 0}
    for box, distance in boxes.items():
        assert ablation.center_distance([box, (0, 0, 9, 9)], true) == pytest.approx(distance)
    assert ablation.center_distance([], true) == math.inf


def test_the_majority_baseline_has_no_boxes():
    majority = ablation.majority_baseline(40)
    assert set(majority) == set(ablation.TASKS) - {"grounding"} and all(0 < value < 1 for value in majority.values())


TINY = ("--crowded-scenes", "2", "--encoder-steps", "1")


@pytest.mark.integration
def test_ablation_command_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    arms = {name: ablation.Arm(ablation.ARMS[name].features, ablation.ARMS[name].injection) for name in ablation.KEPT}
    monkeypatch.setattr(ablation, "ARMS", arms)
    sizes = ("--train-scenes=13", "--test-scenes=4", "--start-scenes=13", "--start-steps=2", "--steps=2", "--workers=1")
    table, plot = tmp_path / "table.md", tmp_path / "plot.png"
    command = ["--work", str(tmp_path / "work"), "--table", str(table), "--plot", str(plot), *sizes, *TINY]
    ablation.main(command)
    assert "[2/2" in capsys.readouterr().out
    written = table.read_text()
    assert all(f"| {name} | 1 |" in written for name in arms) and plot.stat().st_size > 10_000
    assert len(list((tmp_path / "work" / "models-2").iterdir())) == 2
    ablation.main(command)
    assert "[1/" not in capsys.readouterr().out
    assert table.read_text() == written


@pytest.mark.integration
def test_linear_probe_command(tmp_path, monkeypatch):
    sets = {name: linear_probe.SETS[name] for name in ("global view only", ablation.REFERENCE)}
    monkeypatch.setattr(linear_probe, "SETS", sets)
    sizes = ("--train-scenes=12", "--test-scenes=4")
    linear_probe.main(["--work", str(tmp_path / "work"), "--table", str(tmp_path / "table.md"), *sizes, *TINY])
    assert (tmp_path / "table.md").read_text().count("\n") == 4


@pytest.mark.integration
def test_encoders_command(tmp_path):
    encoders.main(["--work", str(tmp_path / "work"), "--table", str(tmp_path / "table.md"), "--test-scenes=4", *TINY])
    assert (tmp_path / "table.md").read_text().count("global view") == 2
