"""`mfrsvlm demo` and `mfrsvlm ask`: answers, boxes, pictures, mistakes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from demo_scene import BUILDING, SCENE_PLAN
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_rasters import pixels, unnamed, write
from tiny_training import tiny_folder

from mfrsvlm.demo import MODEL, PHOTO_MODEL, SCENE, ask
from mfrsvlm.demo.__main__ import main
from mfrsvlm.demo.picture import draw_answers
from mfrsvlm.evaluation.metrics.visual_grounding import iou
from mfrsvlm.scenes import draw


BOX = "Give the bounding box of the building."


def check_box(text, box):
    """The box of an answer about `SCENE`, in pixels, is that of its text, and that of the building."""
    assert re.fullmatch(r"\[\d{3}, \d{3}, \d{3}, \d{3}\]", text)
    np.testing.assert_allclose(box, np.array([int(number) for number in re.findall(r"\d+", text)]) * 512 / 1000, atol=0.51)
    assert iou(box, BUILDING) > 0.4


def test_image_that_comes_along_is_a_scene_of_the_demo():
    with Image.open(SCENE) as image:
        assert image.tobytes() == draw(SCENE_PLAN).tobytes()


def test_demo_prints_answers_beside_the_truth(tmp_path, capsys):
    assert main(["--scene", "6", "--picture", str(tmp_path / "answers.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Q: ") == printed.count("(true: ") == 8
    assert "A: 9   (true: 9)" in printed and "yellow is the model's" in printed
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.size == (1072, 512)


def test_demo_takes_an_image_and_questions(tmp_path, capsys):
    Image.new("RGB", (300, 200), (90, 120, 80)).save(tmp_path / "field.png")
    picture = tmp_path / "answers.png"
    assert (
        main([str(tmp_path / "field.png"), "--question", "Is there a ship in this scene?", "--picture", str(picture)]) == 0
    )
    printed = capsys.readouterr().out
    assert "A: " in printed and "true" not in printed and "300 x 200" in printed
    assert f"Model: {PHOTO_MODEL}\n" in printed
    assert main([str(tmp_path / "field.png"), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.count("Q: ") == 3
    assert main([str(tmp_path / "missing.png")]) == 1
    assert "missing.png" in capsys.readouterr().err


def test_ask_prints_answers_and_boxes(capsys):
    assert ask.main([SCENE, "How many aircraft are there?", BOX, "--model", MODEL]) == 0
    *lines, text, box = capsys.readouterr().out.splitlines()
    assert lines == ["Q: How many aircraft are there?", "A: 9", f"Q: {BOX}"]
    assert text.startswith("A: ") and box.startswith("   box in pixels: ")
    check_box(text.removeprefix("A: "), [float(number) for number in re.findall(r"\d+", box)])


def test_incomplete_weights_are_used_only_if_asked(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "projector" not in n}, folder / "model.safetensors", {"format": "pt"})
    for command in (ask.main, main):
        line = [SCENE, "Why?"] if command is ask.main else [SCENE, "--question", "Why?"]
        picture = ["--picture", str(tmp_path / "picture.png")]
        assert command([*line, "--model", str(folder), *picture]) == 1
        error = capsys.readouterr().err
        assert "model.safetensors has" in error and "checksums.json" in error and error.count("\n") == 1
        (folder / "checksums.json").rename(folder / "kept.json")
        assert command([*line, "--model", str(folder), *picture]) == 1
        assert "4 tensors are missing: model.multi_modal_projector" in capsys.readouterr().err
        (folder / "kept.json").rename(folder / "checksums.json")
        assert command([*line, "--model", str(folder), *picture, "--allow-incomplete"]) == 0
        assert "Why?" in capsys.readouterr().out


def test_ask_prints_json_and_draws(tmp_path, capsys):
    picture = tmp_path / "answers.jpg"
    assert ask.main([SCENE, BOX, "--model", MODEL, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    (answer,) = found.pop("answers")
    assert found == {"model": MODEL, "image": SCENE, "width": 512, "height": 512}
    (box,) = answer.pop("boxes")
    check_box(answer.pop("text"), box)
    assert answer == {"question": BOX}
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("image", "model", "message"),
    [
        ("lost.png", MODEL, "error: cannot open image 'lost.png'"),
        (SCENE, "no/such-model", "error: no/such-model is no folder, and no model of that name was found"),
        (SCENE, "{tmp_path}", "is no model folder"),
    ],
)
def test_ask_names_what_is_missing(image, model, message, tmp_path, capsys):
    assert ask.main([image, "Why?", "--model", model.format(tmp_path=tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("device", ["gpuu", "cuda:99"])
def test_ask_names_a_device_that_is_not_there(device, capsys):
    assert ask.main([SCENE, "Why?", "--model", MODEL, "--device", device]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: device={device!r} cannot be used here: ") and error.count("\n") == 1


@pytest.mark.integration
def test_console_command(tmp_path):
    command = [sys.executable, "-m", "mfrsvlm.cli", "ask", SCENE, "How many aircraft are there?", "--model", MODEL, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["answers"] == [{"question": "How many aircraft are there?", "text": "9", "boxes": []}]


def test_picture_shows_boxes_in_their_place():
    picture = np.asarray(
        draw_answers(Image.new("RGB", (256, 256)), [("Where?", "There.")], [("yellow", [64, 64, 128, 128])])
    )
    yellow = (picture == (255, 255, 0)).all(-1)
    rows, columns = np.nonzero(yellow)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (125, 125, 259, 259)


def test_ask_reads_georeferenced_rasters(tmp_path, capsys):
    """The answers about a scene of 16 bits with a collar are those about its PNG."""
    question = "How many aircraft are there?"
    scene = np.asarray(Image.open(SCENE).convert("RGB")).transpose(2, 0, 1)
    path = write(tmp_path / "scene.tif", np.maximum(scene.astype(np.uint16) * 257, 1), nodata=0)
    assert ask.main([path, question, BOX, "--model", MODEL, "--stretch", "0,65535", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ask.main([SCENE, question, BOX, "--model", MODEL, "--json"]) == 0
    assert found["answers"] == json.loads(capsys.readouterr().out)["answers"]
    assert found["answers"][0]["text"] == "9"
    assert found["raster"]["crs"] == "EPSG:32631" and found["raster"]["stretch"]["high"] == [65535] * 3


def test_ask_rejects_a_raster_whose_bands_nothing_names(tmp_path, capsys):
    path = unnamed(tmp_path / "four.tif", pixels(bands=4))
    assert ask.main([path, "Why?", "--model", MODEL]) == 2
    error = capsys.readouterr().err
    assert "--bands" in error and "--sensor" in error and error.count("\n") == 1


def test_ask_reads_plain_images_as_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ask, "find_spec", lambda name: None)  # without rasterio
    assert ask.main([SCENE, "How many aircraft are there?", "--model", MODEL]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "A: 9"
