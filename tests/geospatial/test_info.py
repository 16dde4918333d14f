"""`mfrsvlm info`: what it prints, what it writes, and what it rejects."""

import json
import subprocess
import sys

import numpy as np
import pytest
from bad_rasters import BAD
from PIL import Image
from tiny_rasters import pixels, unnamed, write

from mfrsvlm.geospatial import Raster
from mfrsvlm.geospatial.__main__ import main


def test_prints_what_the_model_sees_and_draws_it(tmp_path, capsys):
    path, preview = write(tmp_path / "scene.tif", pixels("uint16"), nodata=0), tmp_path / "scene.png"
    assert main([path, "--preview", str(preview)]) == 0
    printed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "90 x 61 pixels" in printed["raster"] and printed["place"].strip() == "EPSG:32631, affine"
    assert "1 red, 2 green, 3 blue as true_color (from: colour interpretation)" in printed["shown"]
    assert printed["no data"].strip() == "0.0 % of the pixels" and "each 2 x 2 metre" in printed["image"]
    with Image.open(preview) as image, Raster.open(path) as raster:
        assert np.array_equal(np.asarray(image), np.asarray(raster.read().image))


def test_json_and_notes(tmp_path, capsys):
    assert main([unnamed(tmp_path / "scene.tif", pixels()), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["stretch"]["kind"] == "none" and found["notes"] and found["width"] == 90
    assert captured.err.startswith("note: ") and captured.err.count("\n") == 1


def test_one_file_per_band(tmp_path, capsys):
    values = pixels()
    files = [
        f"{name}={write(tmp_path / f'{name}.tif', band[None], colours=None)}"
        for name, band in zip(("blue", "green", "red"), values, strict=True)
    ]
    assert main([*files, "--preview", str(tmp_path / "p.png")]) == 0
    with Image.open(tmp_path / "p.png") as image:
        assert np.array_equal(np.asarray(image), values[::-1].transpose(1, 2, 0))
    assert main([*files, "--sensor", "ikonos"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["a.tif", "b.tif"])
    assert "NAME=FILE" in capsys.readouterr().err


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, tmp_path, capfd):
    make, message = BAD[case]
    preview = tmp_path / "out" / "preview.png"
    preview.parent.mkdir()
    assert main([make(tmp_path), "--preview", str(preview)]) == 2
    captured = capfd.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert captured.out == "" and not list(preview.parent.iterdir())


def test_magnitude_of_complex_samples_opens_as_the_message_says(tmp_path):
    magnitude = pixels("uint16", bands=1).astype("complex64")
    path = write(tmp_path / "complex.tif", magnitude, colours=None)
    with Raster.open(f"DERIVED_SUBDATASET:AMPLITUDE:{path}", stretch="0,4000") as raster:
        image = np.asarray(raster.read().image)[..., 0]
    assert np.abs(image - 255 * np.clip(magnitude[0].real / 4000, 0, 1)).max() <= 0.51


@pytest.mark.parametrize("preview", ["p.jpg", "nowhere/p.png"])
def test_preview_that_cannot_be_written_is_rejected_first(preview, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lost.tif", "--preview", str(tmp_path / preview)])
    assert "--preview" in capsys.readouterr().err


@pytest.mark.integration
def test_console_command(tmp_path):
    command = [sys.executable, "-m", "mfrsvlm.cli", "info", write(tmp_path / "scene.tif", pixels())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stderr == "" and "colour interpretation" in result.stdout
