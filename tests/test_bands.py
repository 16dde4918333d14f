"""Models of more than three bands: images, and encoders that are widened without a change of what they make of RGB."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import ENCODERS, encoder_model
from tiny_models import tiny_config
from tiny_parts import refused, weights
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMImageProcessor
from mfrsvlm.convert_checkpoint import main, widen, widen_weight
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.processing_mfrsvlm import cut_windows


BANDS = ["nir", "red", "green", "blue", "vv"]
PLACES = [1, 2, 3]


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


def test_settings_of_three_bands_are_saved_as_before(tmp_path):
    MFRSVLMImageProcessor.for_model(tiny_config()).save_pretrained(tmp_path)
    assert "image_bands" not in (tmp_path / "preprocessor_config.json").read_text()
    processor_of(BANDS).save_pretrained(tmp_path)
    assert list(MFRSVLMImageProcessor.from_pretrained(tmp_path).image_bands) == BANDS


def widened(config, channels):
    config = copy.deepcopy(config)
    config.vision_config.num_channels = channels
    return config


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_sees_rgb_as_before_and_nothing_else(family):
    model = encoder_model(family)
    wide = MFRSVLMForConditionalGeneration(widened(model.config, 5)).eval()
    shapes = {name: tensor.shape for name, tensor in wide.state_dict().items()}
    state = model.state_dict()
    wide.load_state_dict({name: widen_weight(name, tensor, shapes[name], PLACES) for name, tensor in state.items()})
    assert sum(shapes[name] != tensor.shape for name, tensor in state.items()) == 1  # nothing but the first layer
    rng, side = np.random.default_rng(0), model.config.image_size
    canvas = rng.normal(size=(5, 2 * side, 2 * side)).astype(np.float32)
    view = rng.normal(size=(5, side, side)).astype(np.float32)

    def features(model, bands):
        windows = cut_windows(canvas[bands], model.config.windows)
        row = torch.from_numpy(np.concatenate([view[bands].ravel(), windows.ravel()]))[None]
        with torch.no_grad():
            made = model.get_image_features(row, return_dict=True)
        return [made.pooler_output[0], *(stack[0] for stack in made.deepstack_features)]

    for three, five in zip(features(model, PLACES), features(wide, list(range(5))), strict=True):
        scale = three.abs().max()
        assert torch.isfinite(scale) and (three - five).abs().max() <= 1e-4 * scale  # sums have another order


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
            logits.append(each(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    before, after = weights(folder), weights(output)
    changed = [name for name in before if before[name].shape != after[name].shape]
    assert changed == ["model.vision_tower.embeddings.patch_embedding.weight"]
    assert all(torch.equal(before[name], after[name]) for name in before if name not in changed)
    assert torch.equal(after[changed[0]][:, PLACES], before[changed[0]]) and not after[changed[0]][:, [0, 4]].any()
    # Again, from five bands to six.
    more = [*BANDS, "vh"]
    widen(str(output), more, tmp_path / "wider")
    assert list(load_model(tmp_path / "wider")[1].image_processor.image_bands) == more


@pytest.mark.parametrize(
    ("bands", "needle"),
    [
        ("red,green,nir", "['red', 'green', 'blue']"),
        ("red,green,blue,blue", "different names"),
        ("red,green,blue,", "different names"),
    ],
)
def test_wrong_bands_are_one_line(tmp_path, capsys, bands, needle):
    folder = tiny_folder(tmp_path / "model")
    refused(main, capsys, ["widen", str(folder), "--bands", bands, "--output", str(tmp_path / "wide")], needle)
    assert not (tmp_path / "wide").exists()


def test_no_model_is_one_line(tmp_path, capsys):
    command = ["widen", str(tmp_path / "none"), "--bands", "red,green,blue,nir", "--output", str(tmp_path / "wide")]
    refused(main, capsys, command, "cannot be loaded")
