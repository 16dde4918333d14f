"""The commands that put answers on the map: tables, layers, stopped runs, and bad input in one line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
from bad_rasters import BAD
from PIL import Image
from rasterio.transform import Affine
from tiny_assistants import PerfectAnswerer, perfect, rectangles
from tiny_rasters import CRS, NORTH_UP, pixels, unnamed, write

from mfrsvlm.demo import MODEL, ask
from mfrsvlm.geospatial import GeoAssistant, read_record
from mfrsvlm.geospatial.commands import main


BOXES = [[5, 7, 25, 17], [40, 3, 44, 33], [60, 40, 80, 55]]


@pytest.fixture
def answerer(monkeypatch):
    """Instead of a model, one without mistakes."""
    made = PerfectAnswerer()
    monkeypatch.setattr(GeoAssistant, "from_pretrained", classmethod(lambda cls, *args, **options: perfect(answerer=made)))
    return made


@pytest.fixture
def scene(tmp_path):
    return write(tmp_path / "scene.tif", rectangles(90, 61, BOXES))


def test_detect_writes_a_layer(scene, answerer, tmp_path, capsys):
    output = tmp_path / "ships.gpkg"
    command = ["detect", scene, "--object", "ship", "--model", "m", "--tile", "32", "--overlap", "8"]
    assert main([*command, "--output", str(output)]) == 0
    assert f"3 features in {output}" in capsys.readouterr().out
    read = pyogrio.read_dataframe(output, layer="answers")
    assert len(read) == 3 and set(read["source"]) == {scene} and set(read["object"]) == {"ship"}
    assert read_record(output)["grid"]["overlap"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "ships.gpkg"]  # no log is left
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 3 and lines[0].endswith("12 images answered, 0 without data, 0 failed")
    assert main([*command, "--output", str(output)]) == 2
    assert "exists: name another file" in capsys.readouterr().err


def test_count_prints_totals(scene, answerer, capsys):
    assert main(["count", scene, "--object", "ships", "--model", "m"]) == 0
    assert capsys.readouterr().out == f"{scene!r}: 3 ships\n"
    assert main(["count", scene, "--object", "ships", "--model", "m", "--tile", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["crs"] == CRS and len(found["rows"]) == 4 and found["record"]["totals"]["ships"]["total"] >= 3
    assert found["rows"][0]["score"] is None and shapely.from_wkt(found["rows"][0]["geometry"]).area > 0


def test_several_files_make_one_table(answerer, tmp_path, capsys):
    """A folder and a file; one in another CRS."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b", "a"):
        write(folder / f"{name}.tif", rectangles(90, 61, BOXES[:1]))
    write(tmp_path / "c.tif", rectangles(90, 61, BOXES), crs="EPSG:4326", transform=Affine(1e-4, 0, 3, 0, -1e-4, 36))
    output = tmp_path / "all.geojson"
    command = ["detect", str(folder), str(tmp_path / "c.tif"), "--object", "ship", "--model", "m", "--output", str(output)]
    assert main(command) == 0
    read = geopandas.read_file(output)
    assert [os.path.basename(source) for source in read["source"]] == ["a.tif", "b.tif", *["c.tif"] * 3]
    assert len(read_record(output)["runs"]) == 3
    far = ",".join(map(str, (500_000, 3_999_900, 500_180, 4_000_000)))
    assert main(["count", str(folder), "--object", "ships", "--model", "m", f"--area={far}"]) == 0
    assert capsys.readouterr().out.count("1 ships") == 2


def test_describe_ask_and_compare(scene, answerer, capsys):
    assert main(["describe", scene, "--model", "m"]) == 0
    assert main(["compare", scene, scene, "--model", "m", "--question", "What?"]) == 0
    assert ask.main([scene, "How many ships?", "--model", "m", "--tile", "50"]) == 0
    assert ask.main([scene, scene, "--question", "How many?", "--question", "Why?", "--model", "m"]) == 0
    assert answerer.prompts == ["Describe this image.", "What?", *["How many ships?"] * 4, *["How many?", "Why?"] * 2]
    assert len(answerer.images[1]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["There are 3."] * 2 and "4 images answered, 0 without data, 0 failed" in lines[2]
    with pytest.raises(SystemExit, match="2"):
        ask.main([scene, "--model", "m"])
    assert "a question is missing" in capsys.readouterr().err


def test_features_become_a_copy_of_the_layer(scene, answerer, tmp_path):
    left, top = NORTH_UP.c, NORTH_UP.f
    parcels = geopandas.GeoDataFrame({"id": [7]}, geometry=[shapely.box(left, top - 60, left + 60, top)], crs=CRS)
    parcels.to_file(tmp_path / "parcels.gpkg")
    command = [scene, "How many ships?", "--model", "m", "--features", str(tmp_path / "parcels.gpkg")]
    assert ask.main([*command, "--output", str(tmp_path / "out.gpkg")]) == 0
    read = pyogrio.read_dataframe(tmp_path / "out.gpkg", layer="answers")
    assert read["id"].tolist() == [7] and read["answer"].tolist() == ["There are 1."] and "source" not in read


def test_several_rasters_answer_about_the_same_features(scene, answerer, tmp_path, capsys):
    """Two dates and a raster that lies elsewhere: a row for each date and polygon."""
    later = write(tmp_path / "later.tif", rectangles(90, 61, BOXES[:2]))
    far = write(tmp_path / "far.tif", rectangles(90, 61, BOXES), transform=NORTH_UP @ Affine.translation(9000, 0))
    left, top = NORTH_UP.c, NORTH_UP.f
    shapes = [shapely.box(left, top - 122, left + 180, top), shapely.box(left - 9, top, left - 5, top + 9)]
    parcels = geopandas.GeoDataFrame({"source": ["map", "map"]}, geometry=shapes, crs=CRS)
    parcels.to_file(tmp_path / "parcels.gpkg")
    command = [scene, later, far, "--question", "How many ships?", "--model", "m", "--features"]
    assert ask.main([*command, str(tmp_path / "parcels.gpkg"), "--output", str(tmp_path / "out.gpkg")]) == 0
    read = pyogrio.read_dataframe(tmp_path / "out.gpkg", layer="answers")
    assert read["source"].tolist() == ["map"] * 4 and read["source_new"].tolist() == [scene, scene, later, later]
    assert read["count"].fillna(-1).tolist() == [3, -1, 2, -1] and set(read["error"].dropna()) == {"outside of the raster"}
    assert "no feature overlaps" in capsys.readouterr().err


def test_dry_run_and_preview_load_no_model(scene, tmp_path, capsys):
    preview = tmp_path / "p.png"
    command = ["detect", scene, "--object", "ship", "--tile", "32", "--overlap", "8", "--dry-run", "--preview", str(preview)]
    assert main(command) == 0
    assert "12 images, the largest of 32 x 32 pixels, 2 x 2 m a pixel" in capsys.readouterr().out
    with Image.open(preview) as image:
        drawn = np.asarray(image)
    assert drawn.shape == (61, 90, 3) and tuple(drawn[0, 0]) == (255, 255, 0)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rasters"][0]["images"] == 12
    assert main(["describe", scene]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_failed_images_are_said(scene, answerer, tmp_path, capsys):
    answerer.fails = lambda image: np.asarray(image)[10, 10].any()
    output = tmp_path / "out.csv"
    command = ["count", scene, "--object", "ships", "--model", "m", "--tile", "50", "--output", str(output)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "1 tiles without a number" in captured.out and "repeat the command with --resume" in captured.err
    answerer.fails = None
    answerer.images.clear()
    output.unlink()
    assert main([*command, "--resume"]) == 0
    assert len(answerer.images) == 4 + 8  # of the groups with a failed one, on both partitions
    assert not list(tmp_path.glob("*.unfinished*"))


@pytest.mark.parametrize("case", BAD)
def test_bad_rasters_are_one_line_and_nothing_is_written(case, answerer, tmp_path, capfd):
    make, message = BAD[case]
    (tmp_path / "out").mkdir()
    path = make(tmp_path)
    for name in ("count", "detect"):
        command = [name, path, "--object", "ship", "--model", "m", "--output", str(tmp_path / "out" / "a.gpkg")]
        assert main(command) == 2
        captured = capfd.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        left = [path.name for path in (tmp_path / "out").iterdir() if ".unfinished." not in path.name]
        assert captured.out == "" and not left
        for log in (tmp_path / "out").iterdir():
            log.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such-model"], "no/such-model is no folder"),
        (["--model", MODEL, "--device", "gpuu"], "device='gpuu'"),
    ],
)
def test_models_that_cannot_be_loaded_are_one_line(options, message, scene, tmp_path, capsys):
    assert main(["describe", scene, *options, "--output", str(tmp_path / "a.gpkg")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a.gpkg").exists()


def no_crs(folder):
    path = folder / "polygons.gpkg"
    with pytest.warns(UserWarning, match="crs"):
        geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)]).to_file(path)
    return str(path)


BAD_OPTIONS = {
    "no overlap": (lambda folder: ["--area", "0,0,1,1"], "the area and .* do not overlap"),
    "polygons without a crs": (lambda folder: ["--area", no_crs(folder)], "names no CRS, so its place is unknown"),
    "lost polygons": (lambda folder: ["--features", "lost.gpkg"], "features 'lost.gpkg' cannot be read"),
    "unknown ending": (lambda folder: ["--output", str(folder / "a.shp")], "must end in one of"),
    "no folder": (lambda folder: ["--output", str(folder / "no" / "a.gpkg")], "no does not exist, so"),
    "preview": (lambda folder: ["--preview", str(folder / "a.tiffy")], "names no image format"),
    "tile": (lambda folder: ["--tile", "0"], "tile=0 must be"),
    "resolution": (lambda folder: ["--resolution", "0"], "must be a positive length"),
    "resume": (lambda folder: ["--resume"], "--resume needs the --output"),
    "features and tiles": (lambda folder: ["--features", "a.gpkg", "--tile", "5"], "no --area and no --tile"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_bad_options_are_one_line_and_nothing_is_written(case, scene, answerer, tmp_path, capfd):
    make, message = BAD_OPTIONS[case]
    options = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["describe", scene, "--model", "m", *options]) == 2
    captured = capfd.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert captured.out == "" and sorted(tmp_path.iterdir()) == before and not answerer.images


def test_unnamed_bands_name_the_options(tmp_path, answerer, capsys):
    path = unnamed(tmp_path / "four.tif", pixels(bands=4))
    assert main(["count", path, "--object", "ships", "--model", "m"]) == 2
    assert "--sensor" in capsys.readouterr().err
    assert main(["count", path, "--object", "ships", "--model", "m", "--sensor", "naip"]) == 0


def test_one_file_per_band(tmp_path, answerer, capsys):
    values = rectangles(90, 61, BOXES)
    files = [
        f"{name}={write(tmp_path / f'{name}.tif', band[None], colours=None)}"
        for name, band in zip(("red", "green", "blue"), values, strict=True)
    ]
    assert main(["count", *files, "--object", "ships", "--model", "m"]) == 0
    assert "3 ships" in capsys.readouterr().out


def test_a_full_disk_is_one_line(scene, answerer, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.gpkg"

    def full(path, content):
        raise OSError(28, f"No space left on device, so {path} was not written", str(path))

    monkeypatch.setattr("mfrsvlm.geospatial.vectors.write_file", full)
    assert main(["count", scene, "--object", "ships", "--model", "m", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1 and not output.exists()
    assert list(tmp_path.glob("out.gpkg.unfinished.*"))  # the answers are kept
    monkeypatch.undo()


@pytest.mark.integration
def test_a_killed_run_continues_to_equal_bytes(scene, answerer, tmp_path, capsys):
    """kill -9 after some tiles; the layer is that of an undisturbed run, byte for byte."""
    command = ["detect", scene, "--object", "ship", "--model", "m", "--tile", "16", "--output"]
    whole, resumed = tmp_path / "whole.gpkg", tmp_path / "resumed.gpkg"
    assert main([*command, str(whole)]) == 0
    asked = len(answerer.images)
    answerer.images.clear()
    worker = [sys.executable, str(Path(__file__).parents[1] / "map_worker.py"), *command, str(resumed)]
    process = subprocess.Popen(worker, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "resumed.gpkg.unfinished.0"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    process.kill()
    process.wait()
    groups = log.read_bytes().count(b"\n") - 1
    assert not resumed.exists() and 1 <= groups < asked / 8
    assert main([*command, str(resumed)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*command, str(resumed), "--resume"]) == 0
    assert len(answerer.images) == asked - 8 * groups
    assert resumed.read_bytes() == whole.read_bytes() and not log.exists()
