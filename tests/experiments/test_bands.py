"""The experiment on bands: what each arm shows, its tables, and the command on a few scenes."""

import json

import numpy as np
import pytest
from PIL import Image

from mfrsvlm.experiments import SCENE_MODEL as MODEL
from mfrsvlm.experiments import bands
from mfrsvlm.scenes.sensors import twins_of


def test_arms_show_what_they_say(tmp_path):
    scenes = bands.Scenes(tmp_path, "train", 0, 2)
    shown = scenes.bands(1, "bands")
    assert list(shown) == bands.BROAD and all(plane.shape == (256, 256) for plane in shown.values())
    assert all(np.array_equal(shown[name], scenes.bands(1, "bands")[name]) for name in shown)  # from the file
    red, green, nir = (shown[name] for name in ("red", "green", "nir"))
    false_color, rgb = bands.images_of(shown, "views")
    assert np.array_equal(np.asarray(rgb)[..., 0], red)
    assert np.array_equal(np.asarray(false_color), np.stack([nir, red, green], axis=2))
    assert bands.images_of(shown, "bands") == [shown] and isinstance(bands.images_of(shown, "composite")[0], Image.Image)
    new, rgb = bands.images_of(shown, bands.BESIDE)
    assert list(new) == ["nir", "vv"] and list(rgb) == ["red", "green", "blue"] and {**rgb, **new} == shown
    assert bands.images_of(rgb, bands.BESIDE) == [rgb]
    assert bands.prompt_begins("rgb") == bands.prompt_begins("bands") == bands.prompt_begins("30 bands") == ""
    assert bands.prompt_begins("views") == (
        "Image 1 shows false color (near infrared, red, green), image 2 shows true color. "
    )
    assert len(bands.bands_of("30 bands")) == 30 and len(bands.bands_of("10 bands")) == 10
    tasks = [question.task for question in bands.questions_of(scenes.plans[1], "30 bands")]
    assert "moisture" not in tasks and twins_of(scenes.plans[1]).vegetation in ("healthy", "dry")


def test_table_gives_means_and_intervals_over_seeds():
    scores = {task: [1.0, 0.0] for task in bands.ORDINARY}
    rows = [
        {"arm": "bands", "seed": seed, "scores": {"vegetation": [1.0] * seed + [0.0] * (4 - seed), **scores}, "drift": 0.0}
        | {"bands": 5, "images": 1, "seconds": 2.0, "peak_memory_gb": 1.0}
        for seed in (1, 2, 3)
    ]
    line = bands.tables(rows).splitlines()[2]
    # Of 25, 50 and 75 %: the deviation is 25, divided by the root of 3, times 4.303 of Student's t.
    assert line == "| bands | 5 | 1 | 3 | 50.0 ± 62.1 | - | 50.0 ± 0.0 | 0 | 2 | 1 |"


@pytest.mark.integration
def test_command_continues_where_it_stopped(tmp_path, capsys):
    work, table = tmp_path / "work", tmp_path / "table.md"
    command = [
        "--model",
        str(MODEL),
        "--work",
        str(work),
        "--table",
        str(table),
        "--steps",
        "2",
        "--scenes",
        "2",
    ]
    bands.main([*command, "--seeds", "1", "--arms", "views", bands.BESIDE])
    rows = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["before training", "views", bands.BESIDE, "shuffled", "missing"]
    assert all(row["drift"] == 0 for row in rows if row["arm"] == bands.BESIDE)
    assert len(table.read_text().splitlines()) == 2 + 5
    (work / "wide-5").rename(tmp_path / "unused")  # nothing is run again
    bands.main([*command, "--seeds", "1", "--arms", "views", bands.BESIDE])
    assert len((work / "runs.jsonl").read_text().splitlines()) == 5
