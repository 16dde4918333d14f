"""Models of more than three bands: images, and encoders that are widened without a change of what they make of RGB."""

import copy
import os

import numpy as np
import pytest
import torch
from external_data import external_data
from PIL import Image
from test_families import ENCODERS, encoder_model
from tiny_models import VIT_SIZES, tiny_config
from tiny_parts import refused, weights
from tiny_training import tiny_folder
from transformers import AutoModelForImageTextToText, CLIPVisionConfig

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration, MFRSVLMImageProcessor
from mfrsvlm.convert_checkpoint import main, widen
from mfrsvlm.demo import MODEL, PHOTO_MODEL, SCENE
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.image_sources_mfrsvlm import image_size, open_image
from mfrsvlm.processing_mfrsvlm import cut_windows


BANDS = ["nir", "red", "green", "blue", "vv"]
PLACES = [1, 2, 3]
EXTRA = "model.vision_tower.embeddings.patch_embedding.extra_bands.weight"


def processor_of(bands, **settings):
    mean, std = [0.1 * (n + 1) for n in range(len(bands))], [0.2 + 0.01 * n for n in range(len(bands))]
    options = {"num_channels": len(bands), "image_bands": bands, "image_mean": mean, "image_std": std}
    return MFRSVLMImageProcessor.for_model(tiny_config(), **options | settings)


def planes(row, config, channels):
    """(parts, each (n, channels, size, size)) of a row of pixel_values."""
    views, start = [], 0
    for side, count in [(config.image_size, 1), *((w.size, w.num_windows) for w in config.windows)]:
        length = count * channels * side**2
        views.append(row[start : start + length].reshape(count, channels, side, side))
        start += length
    assert start == len(row)
    return views


def picture(kind):
    array = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    if kind == "image":
        return Image.fromarray(array)
    if kind == "gray":
        return Image.fromarray(array[..., 0])
    if kind == "transparent":
        return Image.fromarray(np.concatenate([array, array[..., :1]], axis=2))
    return array.astype(np.float32) / 255 if kind == "float" else array


@pytest.mark.parametrize("kind", ["image", "gray", "transparent", "array", "float"])
@pytest.mark.parametrize("settings", [{}, {"do_rescale": False}, {"canvas_source": "global_view"}, {"do_pad": False}])
def test_rgb_has_the_values_of_a_processor_of_three_bands_and_zeros(kind, settings):
    if settings.get("do_rescale") is False and kind != "float":
        settings = {}
    wide = processor_of(BANDS, **settings)
    mean, std = ([getattr(wide, name)[place] for place in PLACES] for name in ("image_mean", "image_std"))
    narrow = MFRSVLMImageProcessor.for_model(tiny_config(), image_mean=mean, image_std=std, **settings)
    expected, row = (each(picture(kind), return_tensors="pt")["pixel_values"][0] for each in (narrow, wide))
    for three, five in zip(planes(expected, tiny_config(), 3), planes(row, tiny_config(), 5), strict=True):
        assert torch.equal(five[:, PLACES], three)
        assert (five[:, [0, 4]] == 0).all()


def test_all_bands_are_taken_in_their_order():
    wide = processor_of(BANDS)
    array = np.random.default_rng(0).integers(0, 256, (5, 40, 40), dtype=np.uint8)
    (row,) = wide(array, return_tensors="pt")["pixel_values"]
    for band in range(5):
        mean, std = wide.image_mean[band], wide.image_std[band]
        alone = MFRSVLMImageProcessor.for_model(tiny_config(), num_channels=1, image_mean=[mean], image_std=[std])
        (single,) = alone(array[band], return_tensors="pt")["pixel_values"]
        parts = zip(planes(single, tiny_config(), 1), planes(row, tiny_config(), 5), strict=True)
        assert all(torch.equal(five[:, band], one[:, 0]) for one, five in parts)


@pytest.mark.parametrize(
    ("bands", "message"),
    [(["red", "red", "blue"], "different names"), (["red"], "must be num_channels=3"), ([1, 2, 3], "image_bands")],
)
def test_bad_bands_are_named(bands, message):
    with pytest.raises((TypeError, ValueError), match=message):
        processor_of(["a", "b", "c"], image_bands=bands)


def test_images_without_names_or_of_other_sizes_are_rejected():
    with pytest.raises(ValueError, match="not num_channels=5 bands"):
        processor_of(BANDS, image_bands=None)(picture("image"))
    with pytest.raises(ValueError, match="not num_channels=5 bands"):
        processor_of(["a", "b", "c", "d", "e"])(picture("image"))
    with pytest.raises(ValueError, match="channel dimension"):
        processor_of(BANDS)(np.zeros((7, 40, 40), np.uint8))


@pytest.mark.parametrize("form", ["mapping", "tensors", "file"])
def test_bands_by_name_are_put_in_order_and_those_that_lack_are_zero(form, tmp_path):
    wide = processor_of(BANDS)
    array = np.random.default_rng(0).integers(0, 256, (5, 40, 31), dtype=np.uint8)
    (whole,) = wide(array, return_tensors="pt")["pixel_values"]
    bands = dict(zip(BANDS, array, strict=True))
    shuffled = {name: bands[name] for name in ("vv", "blue", "red", "nir")}
    source = {name: torch.from_numpy(band) for name, band in shuffled.items()} if form == "tensors" else shuffled
    if form == "file":
        np.savez(tmp_path / "scene.npz", **shuffled)
        source = open_image("scene.npz", tmp_path)
        assert image_size(source) == (40, 31)
    (row,) = wide(source, return_tensors="pt")["pixel_values"]
    for some, every in zip(planes(row, tiny_config(), 5), planes(whole, tiny_config(), 5), strict=True):
        assert torch.equal(some[:, [0, 1, 3, 4]], every[:, [0, 1, 3, 4]]) and (some[:, 2] == 0).all()


def test_red_green_and_blue_by_name_are_an_image_of_three_channels():
    for kind in ("array", "float"):
        array = picture(kind)
        bands = dict(zip(("blue", "green", "red"), array.transpose(2, 0, 1)[::-1], strict=True))
        for processor in (processor_of(BANDS), MFRSVLMImageProcessor.for_model(tiny_config())):
            rows = [processor(source, return_tensors="pt")["pixel_values"] for source in (array, bands)]
            assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({"red": (4, 4), "swir": (4, 4)}, r"it has the bands swir, but image_bands=\['nir', 'red'"),
        ({"red": (4, 4), "nir": (2, 2)}, r"'red': \(4, 4\), 'nir': \(2, 2\)\}: resample them to one height and width"),
        ({"red": (1, 4, 4)}, "resample them"),
    ],
)
def test_bands_that_do_not_fit_are_named(bands, message):
    with pytest.raises(ValueError, match=message):
        processor_of(BANDS)({name: np.zeros(shape, np.uint8) for name, shape in bands.items()})


def test_a_band_of_other_samples_is_named():
    red = np.zeros((4, 4), np.uint8)
    for nir, reason in (
        (np.full((4, 4), np.nan, np.float32), "band nir: 16 values are NaN or infinite: fill them first"),
        (np.zeros((4, 4), np.complex64), "band nir: an array must hold integers or floats, got dtype complex64"),
        (np.zeros((4, 4), np.uint16), r"band nir: samples of uint16 do not say what is white: pass value_range"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor_of(BANDS)({"red": red, "nir": nir})


def test_files_of_bands_that_are_damaged_or_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "b.npz", red=np.array([{}], dtype=object))
    np.savez(tmp_path / "c.npz", red=np.zeros((100, 100)))
    monkeypatch.setattr("mfrsvlm.image_sources_mfrsvlm.BANDS_BYTES", 10_000)
    for name, reason in (("a", "not a zip file"), ("b", "allow_pickle=False"), ("c", "more than 10000")):
        with pytest.raises(ValueError, match=rf"cannot open image '{name}.npz': .*{reason}"):
            open_image(f"{name}.npz", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_normalized_on_the_device_bit_for_bit(dtype):
    wide, narrow = processor_of(BANDS), MFRSVLMImageProcessor.for_model(tiny_config())
    array = np.random.default_rng(0).integers(0, 256, (5, 40, 31), dtype=np.uint8)
    bands = dict(zip(BANDS[:4], array, strict=False))
    for processor, images in ((wide, [array, bands, picture("array")]), (narrow, [picture("gray"), picture("image")])):
        expected = processor(images, return_tensors="pt")["pixel_values"]
        inputs = processor(images, return_tensors="pt", pixel_dtype="uint8")
        assert inputs["pixel_values"].dtype == torch.uint8 and inputs["pixel_values"].nbytes == expected.nbytes / 4
        made = processor.to_device({**inputs, "input_ids": torch.ones(1, 2)}, "cpu", dtype)
        assert set(made) == {"pixel_values", "input_ids"} and torch.equal(made["pixel_values"], expected.to(dtype))
    assert inputs["pixel_bands"].all() and isinstance(wide([array], pixel_dtype="uint8")["pixel_values"][0], np.ndarray)


def test_samples_that_are_not_normalized_are_refused():
    model = encoder_model("clip_vision_model")
    rows = MFRSVLMImageProcessor.for_model(model.config)(picture("image"), return_tensors="pt", pixel_dtype="uint8")
    with pytest.raises(ValueError, match=r"pixel_values hold torch.uint8, which are not normalized yet: .*to_device"):
        model.get_image_features(rows["pixel_values"])
    for settings in ({"window_packing": "channels_first"}, {"canvas_source": "global_view"}):
        with pytest.raises(ValueError, match=r'pixel_dtype="uint8" does not go with'):
            processor_of(BANDS, pixel_dtype="uint8", **settings)
    with pytest.raises(ValueError, match="Image 0 has samples of float32"):
        processor_of(BANDS, pixel_dtype="uint8", do_rescale=False)(picture("float"))


def test_files_of_bands_with_changed_bytes_are_read_or_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", red=np.arange(600, dtype=np.uint8).reshape(20, 30), nir=np.ones((20, 30)))
    whole, random, refused = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for place in random.integers(0, len(content), random.integers(1, 6)):
            content[place] = random.integers(256)
        cut = random.integers(1, len(content)) if random.random() < 0.3 else len(content)
        (tmp_path / "scene.npz").write_bytes(content[:cut])
        try:
            bands = open_image("scene.npz", tmp_path)
            assert all(isinstance(band, np.ndarray) for band in bands.values())
            processor_of(BANDS)(bands)
        except ValueError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 100


def test_settings_of_three_bands_are_saved_as_before(tmp_path):
    MFRSVLMImageProcessor.for_model(tiny_config()).save_pretrained(tmp_path)
    assert "image_bands" not in (tmp_path / "preprocessor_config.json").read_text()
    processor_of(BANDS).save_pretrained(tmp_path)
    assert list(MFRSVLMImageProcessor.from_pretrained(tmp_path).image_bands) == BANDS


def aligned(model):
    """The model with weights at the addresses of new tensors. Those of files lie anywhere, and last digits depend on it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def wide_config(config, channels=5, stem=PLACES):
    config = copy.deepcopy(config)
    config.vision_config.num_channels, config.stem_channels = channels, stem
    return config


def wide_state(model, wide):
    """State of a widened model: the tensors of the first one, and zeros for its new bands."""
    (name,) = set(wide.state_dict()) - set(model.state_dict())
    assert name.endswith(".extra_bands.weight")
    return model.state_dict() | {name: torch.zeros_like(wide.state_dict()[name])}


def rows_of(config, bands, packing="windows_first", stem=None, seed=0):
    """(1, L): bands of a random image of five."""
    rng, side = np.random.default_rng(seed), config.image_size
    canvas = rng.normal(size=(5, 2 * side, 2 * side)).astype(np.float32)
    view = rng.normal(size=(5, side, side)).astype(np.float32)
    for plane in range(5):
        if plane not in bands:
            canvas[plane] = view[plane] = 0
    present = slice(None) if len(bands) == 5 or stem is not None else bands
    windows = cut_windows(canvas[present], config.windows, packing, stem=stem)
    return torch.from_numpy(np.concatenate([view[present].ravel(), windows.ravel()]))[None]


def features(model, row):
    with torch.no_grad():
        made = model.get_image_features(row, return_dict=True)
    return torch.stack([made.pooler_output[0], *(stack[0] for stack in made.deepstack_features)])


@pytest.mark.parametrize("encoding", ["native", "resize"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_sees_rgb_as_before_bit_for_bit(family, encoding):
    model = encoder_model(family, window_encoding=encoding)
    wide = MFRSVLMForConditionalGeneration(wide_config(model.config)).eval()
    wide.load_state_dict(wide_state(model, wide))
    before = features(model, rows_of(model.config, PLACES))
    everything, alone = rows_of(model.config, range(5)), rows_of(model.config, PLACES, stem=PLACES)
    assert torch.equal(features(wide, everything), before)  # before the new bands are trained, their pixels mean nothing
    assert torch.equal(features(wide, alone), before)
    with torch.no_grad():
        for module in wide.modules():
            if hasattr(module, "extra_bands"):
                module.extra_bands.weight.normal_()
    assert torch.equal(features(wide, alone), before)  # and afterwards, images without them stay as they were
    assert (features(wide, everything) - before).abs().max() > 1e-4 * before.abs().max()


@pytest.mark.parametrize("family", ENCODERS)
def test_weights_of_three_bands_load_into_more(family, tmp_path):
    model = encoder_model(family)
    model.save_pretrained(tmp_path / "model")
    model = aligned(MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "model"))
    config = wide_config(model.config)
    row = rows_of(config, PLACES, stem=PLACES)
    before = features(model, rows_of(model.config, PLACES))
    wide = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "model", config=config)
    assert torch.equal(features(aligned(wide), row), before)
    wide.save_pretrained(tmp_path / "wide")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "wide", trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules.") and again.config.stem_channels == PLACES
    assert torch.equal(features(aligned(again), row), before)
    # A config of more bands on weights of three, through the code in the folder.
    (tmp_path / "model" / "model.safetensors").replace(tmp_path / "wide" / "model.safetensors")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "wide", trust_remote_code=True)
    assert torch.equal(features(aligned(again), row), before)


def test_published_packing_keeps_rgb_bit_for_bit():
    """Windows packed channels first are mixed up among red, green and blue, as before."""
    model = encoder_model("clip_vision_model")
    wide = MFRSVLMForConditionalGeneration(wide_config(model.config)).eval()
    wide.load_state_dict(wide_state(model, wide))
    packing = {"packing": "channels_first"}
    row = rows_of(model.config, PLACES, stem=PLACES, **packing)
    before = features(model, rows_of(model.config, PLACES, **packing))
    assert torch.equal(features(wide, row), before)
    assert not torch.equal(features(wide, rows_of(model.config, PLACES, stem=PLACES)), before)
    narrow, processor = (processor_of(b, window_packing="channels_first") for b in (["red", "green", "blue"], BANDS))
    narrow.image_mean, narrow.image_std = processor.image_mean[1:4], processor.image_std[1:4]
    rows = [each(picture("image"), return_tensors="pt")["pixel_values"] for each in (narrow, processor)]
    assert torch.equal(features(model, rows[0]), features(wide, rows[1]))


@pytest.mark.parametrize(
    ("stem", "channels"), [([0, 1, 2], 3), ([0, 0, 1], 4), ([0, 1, 4], 4), ([], 4), ([0, -1], 4)], ids=str
)
def test_wrong_stems_are_named(stem, channels):
    vision_config = CLIPVisionConfig(**VIT_SIZES, num_channels=channels)
    with pytest.raises(Exception, match="must be different places among the vision_config"):
        tiny_config(vision_config=vision_config, stem_channels=stem)


def test_config_of_three_bands_is_saved_as_before():
    assert "stem_channels" not in tiny_config().to_json_string()
    assert MFRSVLMConfig.from_dict(wide_config(tiny_config()).to_dict()).stem_channels == PLACES


@pytest.mark.parametrize("family", ENCODERS)
def test_new_bands_reach_the_features_once_their_weights_are_not_zero(family):
    model = encoder_model(family, num_channels=4)
    rows, size = torch.randn(1, sum(model.config.packed_lengths)).repeat(2, 1), model.config.image_size**2
    rows[1][3 * size : 4 * size] += torch.randn(size)  # the fourth band of the global view
    with torch.no_grad():
        first, second = model.get_image_features(rows, return_dict=True).pooler_output
    assert (first - second).abs().max() > 1e-4 * first.abs().max()


def test_the_command_keeps_answers_about_rgb(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    output = tmp_path / "wide"
    assert main(["widen", str(folder), "--bands", ",".join(BANDS), "--mean", "0.3", "--output", str(output)]) == 0
    (model, processor), (wide, wide_processor) = (load_model(path) for path in (folder, output))
    assert list(wide_processor.image_processor.image_bands) == BANDS and wide.config.num_channels == 5
    assert [wide_processor.image_processor.image_mean[place] for place in (0, 4)] == [0.3, 0.3]
    text = "USER: <image>\nIs there a river? ASSISTANT:"
    logits = []
    for each, prepare in ((model, processor), (wide, wide_processor)):
        inputs = prepare(images=picture("image"), text=text, return_tensors="pt")
        with torch.no_grad():
            logits.append(aligned(each)(**inputs).logits)
    assert torch.equal(*logits)
    before, after = weights(folder), weights(output)
    assert set(after) - set(before) == {EXTRA} and not after[EXTRA].any() and after[EXTRA].shape[1] == 2
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.integration
@pytest.mark.parametrize("model", [MODEL, PHOTO_MODEL], ids=["scenes", "photographs"])
def test_trained_models_keep_their_logits_on_scenes_and_photographs(model, tmp_path):
    widen(model, [*BANDS, "swir16"], tmp_path / "wide", dtype="float32")
    both = [load_model(path, dtype=torch.float32) for path in (model, tmp_path / "wide")]
    images = [Image.open(SCENE)]
    if os.environ.get("MFRSVLM_TEST_DATA"):
        images.append(Image.open(external_data("images/rt_colorado.tif")).convert("RGB"))
    for image in images:
        logits = []
        for each, prepare in both:
            inputs = prepare(images=image, text="USER: <image>\nIs there a river? ASSISTANT:", return_tensors="pt")
            with torch.no_grad():
                logits.append(aligned(each)(**inputs).logits)
        assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip2_vision_model"])
def test_a_widened_model_is_widened_again(family, tmp_path):
    vision_config = encoder_model(family).config.vision_config
    folder = tiny_folder(tmp_path / "model", vision_config=vision_config)
    widen(str(folder), BANDS, tmp_path / "wide")
    wide, _ = load_model(tmp_path / "wide")
    with torch.no_grad():
        (layer,) = (module.extra_bands for module in wide.modules() if hasattr(module, "extra_bands"))
        layer.weight.normal_()
    wide.save_pretrained(tmp_path / "wide")
    widen(str(tmp_path / "wide"), ["vh", *BANDS], tmp_path / "wider")
    wider, processor = load_model(tmp_path / "wider")
    assert list(processor.image_processor.image_bands) == ["vh", *BANDS] and wider.config.stem_channels == [2, 3, 4]
    planes = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 28, 28)).astype(np.float32))
    with torch.no_grad():
        five, six = (model.model._encode(pixels[None], [0])[1][0] for model, pixels in ((wide, planes[1:]), (wider, planes)))
    torch.testing.assert_close(five, six)  # sums of three bands may have another order than sums of two


@pytest.mark.parametrize(
    ("bands", "needle"),
    [
        ("red,green,nir", "['red', 'green', 'blue']"),
        ("red,green,blue,blue", "different names"),
        ("red,green,blue,", "different names"),
        ("red,green,blue", "and more among them"),
    ],
)
def test_wrong_bands_are_one_line(tmp_path, capsys, bands, needle):
    folder = tiny_folder(tmp_path / "model")
    refused(main, capsys, ["widen", str(folder), "--bands", bands, "--output", str(tmp_path / "wide")], needle)
    assert not (tmp_path / "wide").exists()


def test_no_model_is_one_line(tmp_path, capsys):
    command = ["widen", str(tmp_path / "none"), "--bands", "red,green,blue,nir", "--output", str(tmp_path / "wide")]
    refused(main, capsys, command, "cannot be loaded")
