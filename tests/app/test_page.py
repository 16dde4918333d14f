"""The web page: what it reads, what it rejects, and the whole of it in a headless browser."""

import re
import shutil
import warnings

import numpy as np
import pytest
from demo_scene import BUILDING
from PIL import Image
from tiny_rasters import pixels, write


pytest.importorskip("gradio", reason="needs the extra `app`")

import gradio

from mfrsvlm.app.page import histogram, make_page, read_upload
from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.evaluation.answering import load


AUTO = ("", "auto", "auto", "auto")


@pytest.fixture(scope="module")
def loaded():
    return load(str(MODEL), device="cpu")


def check_building(box):
    """The center of a box lies on the one building of `SCENE`."""
    left, top, right, bottom = BUILDING
    assert left < (box[0] + box[2]) / 2 < right and top < (box[1] + box[3]) / 2 < bottom


def call(page, name, *arguments):
    """What a function of the page returns."""
    return next(f.fn for f in page.fns.values() if f.name == name)(*arguments)


def test_histogram_counts_every_valid_pixel_once():
    values = np.random.default_rng(0).normal(size=(3, 40, 50)).astype(np.float32)
    valid = np.random.default_rng(1).random(values.shape) < 0.5
    table = histogram(values, valid)
    assert list(table.groupby("channel", sort=False)["pixels"].sum()) == [int(plane.sum()) for plane in valid]
    assert set(histogram(np.ones((1, 3, 3)), None)["channel"]) == {"value"}


def test_reader_shows_photographs_and_rasters(tmp_path):
    image, record, counts = read_upload(str(SCENE), *AUTO)
    assert image.size == (512, 512) and record is None and counts["pixels"].sum() == 3 * 512 * 512
    raster = write(tmp_path / "scene.tif", pixels())
    image, record, counts = read_upload(str(raster), *AUTO)
    assert record.crs and image.size == record.size
    image, record, _ = read_upload(str(raster), "1", "auto", "auto", "percentile")
    assert record.bands == (1,) and record.stretch.kind.startswith("percentile")


def test_reader_rejects_in_one_line(tmp_path):
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    raster = write(tmp_path / "scene.tif", pixels())
    import rasterio.shutil

    rasterio.shutil.copy(str(raster), str(tmp_path / "pointer.vrt"), driver="VRT")
    for name, options, message in (
        ("broken.tif", AUTO, "broken.tif"),
        ("scene.tif", ("1,9,2", "auto", "auto", "auto"), "9"),
        ("scene.tif", ("", "auto", "auto", "loud"), "loud"),
        ("pointer.vrt", AUTO, "points to other files"),
    ):
        with pytest.raises(gradio.Error) as error:
            read_upload(str(tmp_path / name), *options)
        text = str(error.value.message)
        assert message in text and "\n" not in text and str(tmp_path) not in text


def test_answers_boxes_and_windows(loaded):
    page = make_page(*loaded, "demo", str(SCENE))
    with Image.open(SCENE) as opened:
        image = opened.convert("RGB")
    text, (_, boxes), windows = call(page, "ask", image, "Give the bounding box of the building.")
    [(box, label)] = boxes
    np.testing.assert_allclose(box, np.array([int(number) for number in re.findall(r"\d+", text)]) * 512 / 1000, atol=1)
    assert label == "box 1"
    check_building(box)
    assert [caption.split(":")[0] for _, caption in windows] == ["256 px, depth 2", "256 px, depth 3"]
    assert all(picture.size == image.size for picture, _ in windows)
    for arguments in ((None, "a"), (image, "  ")):
        with pytest.raises(gradio.Error, match="Upload a raster"):
            call(page, "ask", *arguments)


def test_tiles_of_a_raster(loaded, tmp_path):
    """Boxes on the map are where the model finds them in the one image, and a count is that of the image."""
    import geopandas

    page = make_page(*loaded, "demo")
    with Image.open(SCENE) as image:
        raster = write(tmp_path / "scene.tif", np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    summary, table, (_, boxes), file = call(page, "survey", raster, *AUTO, "find", "building", 512)
    [(box, label)] = boxes
    check_building(box)
    assert label == "building" and "found 1" in summary and list(table["object"]) == ["building"]
    layer = geopandas.read_file(file)
    assert len(layer) == 1 and layer.crs is not None
    summary, table, _, _ = call(page, "survey", raster, *AUTO, "count", "aircraft", 512)
    assert summary == "- aircraft: total 9, unanswered 0" and list(table["count"]) == [9]
    _, table, _, _ = call(page, "survey", raster, *AUTO, "ask", "Is there a ship in this scene?", 256)
    assert len(table) == 4
    with pytest.raises(gradio.Error, match="Upload a raster"):
        call(page, "survey", None, *AUTO, "ask", "Why?", 256)


@pytest.mark.slow
def test_page_in_a_browser(loaded, tmp_path):
    """Upload a raster, choose a stretch, ask: the page shows the answer and its box."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs Chromium")
    with Image.open(SCENE) as image, warnings.catch_warnings():
        raster = write(tmp_path / "scene.tif", np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    page = make_page(*loaded, "demo/model", str(SCENE))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1280, "height": 1500})
            tab.goto(address)
            tab.get_by_text("512 x 512 pixels, no raster").wait_for()
            tab.get_by_label("Clear").first.click()
            tab.set_input_files("input[type=file]", str(raster))
            tab.get_by_text("colour interpretation").wait_for()
            tab.get_by_label("Question").fill("Give the bounding box of the building.")
            tab.get_by_role("button", name="Ask").click()
            answers = "() => [...document.querySelectorAll('textarea')].map(area => area.value)"
            tab.wait_for_function(f"() => ({answers})().some(text => /^\\[7.*\\]$/.test(text))", timeout=60_000)
            tab.get_by_text("box 1").wait_for()
            tab.get_by_text("256 px, depth 3").wait_for()
            tab.screenshot(path=tmp_path / "page.png")  # docs/app.jpg
            tab.get_by_text("The whole raster, in tiles").click()
            tab.get_by_role("button", name="Run").click()
            tab.get_by_text("building: found 1").wait_for(timeout=60_000)
            with tab.expect_download() as download:
                tab.locator("a[download]", has_text="").last.click()
            assert download.value.suggested_filename == "answers.gpkg"
            browser.close()
    finally:
        page.close()
    with Image.open(tmp_path / "page.png") as shown:
        assert shown.size == (1280, 1500)
