"""`mfrsvlm info`: what it prints, what it writes, and what it rejects."""

import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.control import GroundControlPoint
from tiny_rasters import NORTH_UP, pixels, unnamed, write

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


def truncated(folder):
    path = folder / "cut.tif"
    write(path, pixels(height=400, width=400))
    path.write_bytes(path.read_bytes()[:100_000])
    return str(path)


def truncated_cog(folder):
    """Its header is whole, its pixels are not."""
    source, path = write(folder / "source.tif", pixels(height=700, width=700)), folder / "cut_cog.tif"
    rasterio.shutil.copy(source, path, driver="COG")
    path.write_bytes(path.read_bytes()[:400_000])
    return str(path)


def empty(folder):
    (folder / "empty.tif").touch()
    return str(folder / "empty.tif")


def text(folder):
    (folder / "text.tif").write_text("no raster")
    return str(folder / "text.tif")


def gcps_without_crs(folder):
    points = [GroundControlPoint(row, column, column, -row) for row in (0, 61) for column in (0, 90)]
    return write(folder / "gcps.tif", pixels(), transform=None, crs=rasterio.crs.CRS(), gcps=points)


def subdatasets(folder):
    profile = {"driver": "GPKG", "width": 90, "height": 61, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    for table, append in (("first", "NO"), ("second", "YES")):
        options = {"RASTER_TABLE": table, "APPEND_SUBDATASET": append}
        with rasterio.open(folder / "two.gpkg", "w", **profile, **options, transform=NORTH_UP) as dataset:
            dataset.write(pixels())
    return str(folder / "two.gpkg")


BAD = {
    "truncated": (truncated, "cut.tif"),
    "truncated cog": (truncated_cog, "it may be damaged or cut short"),
    "empty": (empty, "the file is empty"),
    "text": (text, "not recognized as being in a supported file format"),
    "missing": (lambda folder: str(folder / "lost.tif"), "No such file"),
    "directory": (str, "is a folder that GDAL opens as no raster"),
    "unreachable address": (
        lambda folder: "http://127.0.0.1:9/scene.tif",
        "cannot open raster 'http://127.0.0.1:9/scene.tif'",
    ),
    "complex": (
        lambda folder: write(folder / "c.tif", pixels("uint16", bands=1).astype("complex64"), colours=None),
        "complex samples. Open their magnitude: DERIVED_SUBDATASET:AMPLITUDE:",
    ),
    "all nodata": (lambda folder: write(folder / "n.tif", np.zeros((3, 9, 9), "uint16"), nodata=0), "has no valid pixel"),
    "four unnamed bands": (lambda folder: unnamed(folder / "four.tif", pixels(bands=4)), "--bands"),
    "ground control points without crs": (gcps_without_crs, "4 ground control points that name no CRS"),
    "subdatasets": (subdatasets, "holds 2 subdatasets and no bands of its own. Open one of them: GPKG:"),
}


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
