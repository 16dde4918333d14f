"""Rasters for models with more than three bands, composites as arrays, and several views of one place."""

import json

import numpy as np
import pytest
import torch
from rasterio.enums import ColorInterp
from tiny_assistants import PerfectAnswerer, perfect
from tiny_rasters import NORTH_UP, pixels, unnamed, write
from tiny_training import tiny_folder

from mfrsvlm.convert_checkpoint import widen
from mfrsvlm.demo import ask
from mfrsvlm.files.model_folder import read_image_bands
from mfrsvlm.geospatial import GeoAssistant, Raster, RasterError, RasterWarning, compose, open_views
from mfrsvlm.geospatial.commands import find_sources, main
from mfrsvlm.geospatial.composites import COMPOSITES


NAMES = ["red", "green", "blue", "nir"]
MODEL_BANDS = ["blue", "green", "red", "nir", "vv"]


def four_bands(path, dtype="uint16", names=NAMES, **profile):
    return write(path, pixels(dtype, len(names)), colours=None, photometric="MINISBLACK", names=names, **profile)


def test_bands_of_the_model_are_read_in_its_order_each_with_its_own_stretch(tmp_path):
    path = four_bands(tmp_path / "scene.tif")
    with pytest.warns(
        RasterWarning, match=r"lacks vv of the bands of the model \(blue, green, red, nir, vv\): they are zero"
    ):
        raster = Raster.open(path, image_bands=MODEL_BANDS)
    with raster:
        view = raster.read()
        window = raster.read((10, 5, 30, 20))
    assert list(view.bands) == ["blue", "green", "red", "nir"] and view.record.composite == "bands"
    values = pixels("uint16", 4).astype(float)
    for name, plane in view.bands.items():
        stored = values[NAMES.index(name)]
        low, high = np.percentile(stored, [2, 98])
        expected = np.clip((stored - low) / (high - low), 0, 1) * 255
        assert plane.dtype == np.uint8 and np.abs(plane - expected).max() <= 1
        assert np.array_equal(window.bands[name], plane[5:25, 10:40])
    assert np.array_equal(np.asarray(view.image), np.stack([view.bands[n] for n in NAMES[:3]], axis=2))


def test_eight_bits_stay_as_they_are_and_nir08_serves_as_nir(tmp_path):
    path = four_bands(tmp_path / "scene.tif", "uint8", ["red", "green", "blue", "nir08"])
    with Raster.open(path, image_bands=NAMES) as raster:
        view = raster.read()
    assert all(np.array_equal(plane, view.bands[name]) for name, plane in zip(NAMES, pixels(bands=4), strict=True))


def test_missing_bands_are_refused_on_wish(tmp_path):
    path = four_bands(tmp_path / "scene.tif")
    with pytest.raises(RasterError, match=r"lacks vv of the bands of the model \(.*\)\. Name its bands with --sensor"):
        Raster.open(path, image_bands=MODEL_BANDS, missing_bands="refuse")
    with pytest.raises(RasterError, match=r"missing_bands='guess' must be 'fill' or 'refuse'"):
        Raster.open(path, image_bands=MODEL_BANDS, missing_bands="guess")
    with pytest.raises(RasterError, match="give no bands and no composite with it"):
        Raster.open(path, image_bands=MODEL_BANDS, composite="ndvi")


def test_a_raster_without_names_is_shown_in_true_colours_or_refused(tmp_path):
    with pytest.warns(RasterWarning, match="taken as red, green and blue"):
        raster = Raster.open(unnamed(tmp_path / "three.tif", pixels()), image_bands=MODEL_BANDS)
    with raster:
        assert raster.read().bands is None and raster.selection.composite == "true_color"
    with pytest.raises(RasterError, match=r"has 4 bands \(unnamed\), and nothing says which is red"):
        Raster.open(unnamed(tmp_path / "four.tif", pixels(bands=4)), image_bands=MODEL_BANDS)


def test_two_bands_of_one_name_name_none(tmp_path):
    path = four_bands(tmp_path / "scene.tif", names=["red", "green", "green", "nir"])
    with pytest.raises(RasterError, match=r"has 4 bands \(red, green, green, nir\), and nothing says which is red"):
        Raster.open(path, image_bands=MODEL_BANDS)
    with pytest.raises(RasterError, match="two files have the same band's name"):
        find_sources("ask", [f"red={path}", f"red={path}"])


def test_a_band_without_data_is_named(tmp_path):
    values = pixels("float32", 4)
    values[3] = np.nan
    path = write(tmp_path / "scene.tif", values, colours=None, photometric="MINISBLACK", names=NAMES, nodata=np.nan)
    with Raster.open(path, image_bands=NAMES) as raster, pytest.raises(RasterError, match="no valid pixel in band nir: all"):
        raster.read()
    # Known limits need no statistics: the band is the value that stands for nothing, and a note says so.
    with Raster.open(path, image_bands=NAMES, stretch="0,4000") as raster:
        with pytest.warns(RasterWarning, match="has places where band nir holds no data and others do: it is 99 there"):
            view = raster.read(fill={"nir": 99})
    assert (view.bands["nir"] == 99).all() and view.bands["red"].std() > 1


def test_nan_in_one_band_is_filled_in_that_band_alone(tmp_path):
    values = pixels("float32", 4)
    values[3, :30] = np.nan
    path = write(tmp_path / "scene.tif", values, colours=None, photometric="MINISBLACK", names=NAMES, nodata=np.nan)
    with Raster.open(path, image_bands=NAMES) as raster:
        view = raster.read(fill={"red": 1, "green": 2, "blue": 3, "nir": 4})
    assert (view.bands["nir"][:30] == 4).all() and (view.bands["nir"][30:] != 4).any() and view.record.nodata_share == 0


def test_complex_radar_is_refused_with_the_way_to_its_amplitude(tmp_path):
    values = (pixels(bands=1) * np.exp(1j)).astype(np.complex64)
    path = write(tmp_path / "slc.tif", values, colours=None)
    with pytest.raises(RasterError, match=r"complex samples\. .*DERIVED_SUBDATASET:LOGAMPLITUDE:.*slc\.tif"):
        Raster.open(path, image_bands=MODEL_BANDS)
    with Raster.open(f"DERIVED_SUBDATASET:LOGAMPLITUDE:{path}", bands=1) as raster:
        np.testing.assert_allclose(20 * raster.sample()[0], 20 * np.log10(np.abs(values)), atol=1e-4)


def test_bands_of_other_resolution_and_crs_are_laid_over_the_finest(tmp_path):
    fine, coarse = pixels(bands=3), np.full((1, 31, 45), 77, np.uint8)
    files = {name: write(tmp_path / f"{name}.tif", fine[[i]], colours=None) for i, name in enumerate(NAMES[:3])}
    transform = NORTH_UP @ NORTH_UP.scale(2)
    files["nir"] = write(tmp_path / "nir.tif", coarse, colours=None, transform=transform)
    with Raster.open(files, image_bands=NAMES) as raster:
        view = raster.read()
    assert view.bands["nir"].shape == (61, 90) and (view.bands["nir"][5:-5, 5:-5] == 77).all()
    assert np.array_equal(view.bands["red"], fine[0])
    files["nir"] = write(tmp_path / "lost.tif", coarse, colours=None, crs=None)
    with pytest.raises(RasterError, match="cannot be laid over each other, since a file has no CRS"):
        Raster.open(files, image_bands=NAMES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    widen(str(tiny_folder(folder / "narrow")), MODEL_BANDS, folder / "model")
    return folder / "model"


class Seen:
    """An image processor that keeps what it is given."""

    def __init__(self, processor):
        self.processor, self.images = processor, []

    def __call__(self, images, **kwargs):
        self.images += images
        return self.processor(images, **kwargs)

    def __getattr__(self, name):
        return getattr(self.processor, name)


def test_an_assistant_passes_all_bands_of_its_model(wide, tmp_path):
    """End to end: file, bands by name, pixels, answer. The near infrared counts once its weights are not zero."""
    assistant = GeoAssistant.from_pretrained(str(wide), max_new_tokens=8, device="cpu", dtype="float32")
    assert assistant.opening["image_bands"] == MODEL_BANDS and set(assistant.fill) == set(MODEL_BANDS)
    model = assistant.answerer.model
    (layer,) = (module.extra_bands for module in model.modules() if hasattr(module, "extra_bands"))
    with torch.no_grad():
        layer.weight.normal_(std=3.0)
    seen = assistant.answerer.processor.image_processor = Seen(assistant.answerer.processor.image_processor)
    values = pixels("uint16", 4)
    first = write(tmp_path / "a.tif", values, colours=None, photometric="MINISBLACK", names=NAMES)
    values[3] = values[3][::-1]
    second = write(tmp_path / "b.tif", values, colours=None, photometric="MINISBLACK", names=NAMES)
    scores = []
    for path in (first, second):
        with pytest.warns(RasterWarning, match="lacks vv"):
            scores.append(assistant.query(path, "Is there a river?")["score"].iloc[0])
    shown = [image for image in seen.images if isinstance(image, dict)]  # others try whether images can be shared
    assert len(shown) == 2 and all(set(image) == set(NAMES) for image in shown) and scores[0] != scores[1]
    with pytest.warns(RasterWarning, match="lacks vv"):
        frame = assistant.count(first, "cars", tile=40)  # tiles of half size are pasted on canvases, band by band
    assert len(frame) == 6 and frame.attrs["record"]["rasters"][0]["names"] == ["blue", "green", "red", "nir"]
    # What is opened as something else is shown as that, in three channels.
    with Raster.open(first, composite="false_color") as raster:
        assistant.query(raster, "Is there a river?")
    assert seen.images[-1].size == (90, 61)
    assistant.opening["missing_bands"] = "refuse"
    with pytest.raises(RasterError, match="lacks vv"):
        assistant.query(first, "Is there a river?")


def test_bytes_that_are_normalized_on_the_device_give_the_same_answers(wide, tmp_path):
    path, scores = four_bands(tmp_path / "scene.tif"), []
    for dtype in ("float32", "uint8"):
        assistant = GeoAssistant.from_pretrained(str(wide), max_new_tokens=8, device="cpu", dtype="float32")
        assistant.answerer.processor.image_processor.pixel_dtype = dtype
        with pytest.warns(RasterWarning, match="lacks vv"):
            frame = assistant.query(path, ["Is there a river?", "How many ships are there?"], tile=60)
        scores.append(frame[["answer", "score"]].values.tolist())
        assert frame["error"].isna().all()
    assert scores[0] == scores[1]


def test_commands_pass_all_bands(wide, tmp_path, capsys):
    path = four_bands(tmp_path / "scene.tif")
    command = [path, "--model", str(wide), "--device", "cpu", "--max-new-tokens", "4", "--json"]
    assert read_image_bands(wide) == MODEL_BANDS
    for run in (lambda: main(["describe", *command]), lambda: ask.main([*command, "--question", "Is there a river?"])):
        assert run() == 0
        captured = capsys.readouterr()
        (raster,) = json.loads(captured.out)["record"]["rasters"]
        assert raster["composite"] == "bands" and raster["names"] == ["blue", "green", "red", "nir"]
        assert "lacks vv of the bands of the model" in captured.err
    assert main(["describe", *command, "--missing-bands", "refuse"]) == 2
    assert "error: " in (error := capsys.readouterr().err) and "lacks vv" in error and len(error.splitlines()) == 1
    assert main(["describe", *command, "--composite", "ndvi"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["rasters"][0]["composite"] == "ndvi"


def test_views_are_images_of_one_question_with_their_names(tmp_path):
    path = four_bands(tmp_path / "scene.tif")
    answerer = PerfectAnswerer()
    with open_views(path, ["true_color", "ndvi"]) as views:
        frame = perfect(answerer=answerer).query(views, "Is there a river?", tile=50)
        expected = [view.read().image for view in views]
    assert set(frame["question"]) == {"Is there a river?"}
    assert set(answerer.prompts) == {"Image 1 shows true color, image 2 shows NDVI. Is there a river?"}
    assert [len(group) for group in answerer.images] == [2] * 4
    for shown, whole in zip(answerer.images[0], expected, strict=True):
        assert np.array_equal(np.asarray(shown), np.asarray(whole)[:30, :45])
    record = frame.attrs["record"]
    assert [raster["composite"] for raster in record["rasters"]] == ["true_color", "ndvi"]
    assert record["prompt_begins"] == "Image 1 shows true color, image 2 shows NDVI. "
    with Raster.open(path, composite="ndvi") as raster:
        perfect(answerer=answerer).query(raster, "Is there a river?")
    assert answerer.prompts[-1] == "The image shows NDVI. Is there a river?"
    perfect(answerer=answerer).query(path, "Is there a river?")
    assert answerer.prompts[-1] == "Is there a river?"


def test_new_bands_are_an_image_of_their_own_before_true_color(wide, tmp_path, capsys):
    path = four_bands(tmp_path / "scene.tif")
    with open_views(path, ["new_bands", "true_color"], image_bands=NAMES) as (new, rgb):
        assert list(new.read().bands) == ["nir"] and rgb.read().bands is None
    with Raster.open(path, image_bands=["nir"]) as alone, Raster.open(path) as colours:
        expected = [alone.read().bands["nir"], np.asarray(colours.read().image)]
    assistant = GeoAssistant.from_pretrained(str(wide), max_new_tokens=8, device="cpu", dtype="float32")
    seen = assistant.answerer.processor.image_processor = Seen(assistant.answerer.processor.image_processor)
    with pytest.warns(RasterWarning, match="lacks vv"):
        views = open_views(path, ["new_bands", "true_color"], image_bands=MODEL_BANDS)
        with views as opened_views:
            frame = assistant.query(opened_views, "Is there a river?")
    assert frame["error"].isna().all() and "prompt_begins" not in frame.attrs["record"]
    first, second = seen.images[-2:]
    assert np.array_equal(first["nir"], expected[0]) and np.array_equal(np.asarray(second), expected[1])
    command = [path, "Is there a river?", "--model", str(wide), "--max-new-tokens", "4", "--dtype", "float32", "--json"]
    assert ask.main([*command, "--composite", "New-Bands", "--composite", "true_color"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert [raster["names"] for raster in record["rasters"]] == [["nir"], ["red", "green", "blue"]]
    assert main(["compare", path, path, "--model", str(wide), "--composite", "new_bands"]) == 2
    assert "compare cannot show new_bands alone" in capsys.readouterr().err
    for options in ({}, {"image_bands": ["red", "green", "blue"]}):
        with pytest.raises(RasterError, match="new_bands are bands of a model with more"):
            open_views(path, ["new_bands", "true_color"], **options).__enter__()


def test_commands_take_several_composites(tmp_path, monkeypatch, capsys):
    path, answerer = four_bands(tmp_path / "scene.tif"), PerfectAnswerer()
    monkeypatch.setattr(GeoAssistant, "from_pretrained", classmethod(lambda cls, *args, **more: perfect(answerer=answerer)))
    views = ["--composite", "true_color", "--composite", "ndwi"]
    assert main(["count", path, "--object", "cars", "--model", str(tmp_path), *views]) == 0
    assert ask.main([path, "Is it wet?", "--model", str(tmp_path), *views]) == 0
    begin = "Image 1 shows true color, image 2 shows NDWI. "
    assert answerer.prompts == [f"{begin}How many cars are there?", f"{begin}Is it wet?"]
    assert main(["compare", path, path, "--model", str(tmp_path), *views]) == 2
    assert "compare takes one --composite" in capsys.readouterr().err


def test_views_that_make_no_sense_are_refused(tmp_path):
    path = four_bands(tmp_path / "scene.tif")
    other = four_bands(tmp_path / "small.tif", names=NAMES[:3])
    for names, message in (([], "give different ones"), (["ndvi", "NDVI"], "ndvi, ndvi: give different ones")):
        with pytest.raises(RasterError, match=message), open_views(path, names):
            pass
    with pytest.raises(RasterError, match="must be opened rasters"):
        perfect().query([path, path], "What?")
    small = write(tmp_path / "other.tif", pixels(height=20, width=20))
    with Raster.open(other) as first, Raster.open(small) as second, pytest.raises(RasterError, match="2 sizes"):
        perfect().query([first, second], "What?")


def test_compose_equals_the_picture_of_the_raster_room(tmp_path):
    names = ["red", "green", "blue", "nir", "swir22", "vv", "vh"]
    values = pixels("float32", 7) / 4000 + 0.01
    path = write(tmp_path / "scene.tif", values, colours=None, photometric="MINISBLACK", names=names)
    bands = dict(zip(names, values, strict=True))
    for key, composite in COMPOSITES.items():
        made = compose(key.replace("_", "-").upper(), bands)
        with Raster.open(path, composite=key) as raster:
            sampled, valid = raster.sample()
        assert valid.all() and np.array_equal(made, sampled) and made.dtype == np.float32
        assert len(made) == (composite.channels if composite.formula else 3)
    ratio = compose("sar_ratio", bands)
    np.testing.assert_allclose(ratio[2], 10 * np.log10(bands["vv"] / bands["vh"]), atol=1e-4)
    np.testing.assert_allclose(ratio[0], 10 * np.log10(bands["vv"]), atol=1e-4)
    np.testing.assert_allclose(compose("ndvi", bands)[0], (bands["nir"] - bands["red"]) / (bands["nir"] + bands["red"]))
    with pytest.raises(RasterError, match=r"sar_ratio needs vh or hv, and the bands are vv"):
        compose("sar_ratio", {"vv": values[0]})
    with pytest.raises(RasterError, match="unknown composite 'evi'"):
        compose("evi", bands)


def test_alpha_and_colours_do_not_disturb(tmp_path):
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined)
    path = write(tmp_path / "naip.tif", pixels(bands=4), colours=colours, photometric="RGB", ALPHA="UNSPECIFIED")
    with Raster.open(path, sensor="naip", image_bands=NAMES) as raster:
        assert list(raster.read().bands) == NAMES
