"""The image processor: exact pixels, windows that can be put together again, and a clear error for every bad image."""

import base64
import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from external_data import external_data
from fake_network import fake_network
from hypothesis import HealthCheck, given, settings
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPVisionConfig

from mfrsvlm import MFRSVLMConfig, MFRSVLMImageProcessor, image_processing_mfrsvlm, image_sources_mfrsvlm
from mfrsvlm.configuration_mfrsvlm import packed_lengths, window_table
from mfrsvlm.image_processing_mfrsvlm import cut_windows, join_windows


REFERENCE = Path(__file__).parent / "reference"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# 28-pixel views in 16 tokens, 9 windows of 28 and 49 of 14: as the default, but small.
TINY = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "patch_size": 7, "window_sizes": [28, 14]}
TINY_LENGTH = 3 * 28**2 + 9 * 3 * 28**2 + 49 * 3 * 14**2


def tiny(**overrides) -> MFRSVLMImageProcessor:
    return MFRSVLMImageProcessor(**{**TINY, **overrides})


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 (height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def assert_same(first, second) -> None:
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def parts(row, side: int = 28) -> tuple:
    """One row of the output: the global view (3, side, side) and the packed windows."""
    row = np.asarray(row)
    return row[: 3 * side**2].reshape(3, side, side), row[3 * side**2 :]


def resized_by_pil(image: Image.Image, side: int) -> np.ndarray:
    """The published preprocessing with Pillow and numpy: pad, resize, scale, normalize. (3, side, side)"""
    long = max(image.size)
    square = Image.new("RGB", (long, long), (122, 116, 104))
    square.paste(image.convert("RGB"), ((long - image.width) // 2, (long - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def upsampled_twice(view: np.ndarray) -> np.ndarray:
    """Bilinear upsampling by 2 with pixel centers aligned: every new pixel is 3/4 its nearest and 1/4 the next."""
    for axis in (1, 2):
        padded = np.pad(view, [(1, 1) if axis == i else (0, 0) for i in range(3)], mode="edge")
        nearest = padded.take(range(1, padded.shape[axis] - 1), axis)
        before = 0.75 * nearest + 0.25 * padded.take(range(padded.shape[axis] - 2), axis)
        after = 0.75 * nearest + 0.25 * padded.take(range(2, padded.shape[axis]), axis)
        shape = list(view.shape)
        shape[axis] *= 2
        view = np.stack([before, after], axis + 1).reshape(shape)
    return view


# Pixels


@pytest.mark.parametrize("name", ["a_square_noise", "b_landscape", "c_portrait", "d_tiny_objects", "e_grey_L", "f_rgba"])
def test_pixels_of_the_reference(name):
    """The global view of every reference image. (Stored: every 112th row of two images, and statistics of all.)"""
    golden = load_file(REFERENCE / "golden.safetensors")
    pixels = MFRSVLMImageProcessor(window_sizes=[])(str(REFERENCE / "images" / f"{name}.png"))["pixel_values"][0]
    pixels = pixels.reshape(3, 336, 336)
    if f"{name}/pixel_values" in golden:
        np.testing.assert_allclose(pixels[:, ::112], golden[f"{name}/pixel_values"], atol=1e-6)
    wide = pixels.astype(np.float64)
    statistics = [wide.mean(), wide.std(), np.sqrt((wide**2).sum()), np.abs(wide).max()]
    np.testing.assert_allclose(statistics, golden[f"{name}/pixel_stats"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 40), (41, 20), (20, 41), (57, 28), (3, 50), (28, 29), (1, 1), (1, 7), (100, 33)])
def test_views_and_canvases_match_pillow_and_numpy(size):
    """Both canvas sources, for odd and even remainders of the padding. (size: width, height)"""
    image = Image.fromarray(noise(size[1], size[0]))
    windows = window_table(28, 7, 2, [28, 14], 0.5)
    expected = {"image": resized_by_pil(image, 56), "global_view": upsampled_twice(resized_by_pil(image, 28))}
    for source, canvas in expected.items():
        view, packed = parts(tiny(canvas_source=source)(image)["pixel_values"][0])
        np.testing.assert_allclose(view, resized_by_pil(image, 28), atol=1e-6)
        for joined in join_windows(packed, windows, 56):
            np.testing.assert_allclose(joined, canvas, atol=1e-6, err_msg=source)


def test_canvas_of_the_image_holds_more_detail():
    """Stripes one pixel wide are lost in a view of half the size, and in a canvas made from it."""
    stripes = np.zeros((56, 56, 3), np.uint8)
    stripes[:, ::2] = 255
    spread = {
        source: parts(tiny(canvas_source=source)(stripes)["pixel_values"][0])[1].std() for source in ("image", "global_view")
    }
    assert spread["image"] > 10 * spread["global_view"]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 5), (5, 4), (4, 7), (7, 4), (1, 6), (6, 1)])
def test_padding_is_centered_with_floor_divided_offsets(height, width):
    (padded,) = image_processing_mfrsvlm.pad_to_square([Image.fromarray(noise(height, width))], tuple(MEAN))
    side = max(height, width)
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = (122, 116, 104)  # the mean times 255, truncated
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = noise(height, width)
    np.testing.assert_array_equal(padded, expected)


def test_without_padding_the_middle_is_kept():
    image = noise(40, 60)
    view, _ = parts(tiny(do_pad=False, size={"shortest_edge": 28})(image)["pixel_values"][0])
    # 40 -> 28 and 60 -> 42, of which columns 7 to 35 remain.
    resized = np.asarray(Image.fromarray(image).resize((42, 28), Image.Resampling.BICUBIC))[:, 7:35] / 255
    np.testing.assert_allclose(view, ((resized - MEAN) / STD).transpose(2, 0, 1), atol=1e-6)


def test_default_sizes():
    """The view, 9 windows of 336 and 49 of 168 pixels, at their own size, in one row of at most 32 MB."""
    pixels = MFRSVLMImageProcessor()(noise(30, 50), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3 * 336**2 + 9 * 3 * 336**2 + 49 * 3 * 168**2)
    assert pixels.dtype == torch.float32 and pixels.nbytes <= 32e6
    assert MFRSVLMImageProcessor().num_image_tokens == 576


def test_no_windows():
    outputs = tiny(window_sizes=[])(noise(30, 50), return_tensors="pt")
    assert set(outputs) == {"pixel_values"} and outputs["pixel_values"].shape == (1, 3 * 28**2)


# Windows


@pytest.mark.parametrize("packing", ["windows_first", "channels_first"])
@pytest.mark.parametrize(
    ("image_size", "patch_size", "scale", "sizes", "overlap"),
    [
        (28, 7, 2, [28, 14], 0.5),
        (28, 7, 2, [14, 28], 0.0),
        (28, 7, 2, [56], 0.5),
        (28, 7, 3, [28, 14, 7], 0.5),
        (28, 7, 1, [14], 0.75),
        (28, 14, 2, [14], 0.9),
    ],
)
def test_windows_round_trip(packing, image_size, patch_size, scale, sizes, overlap):
    windows = window_table(image_size, patch_size, scale, sizes, overlap)
    side = scale * image_size
    canvas = np.random.default_rng(0).standard_normal((3, side, side)).astype(np.float32)
    packed = cut_windows(canvas, windows, packing)
    assert packed.shape == (sum(packed_lengths(image_size, windows)[1:]),)
    joined = join_windows(packed, windows, side, packing)
    assert len(joined) == len(sizes)
    for each in joined:
        np.testing.assert_allclose(each, canvas, atol=1e-6)


@pytest.mark.parametrize("packing", ["windows_first", "channels_first"])
def test_windows_lie_where_the_table_says(packing):
    """Against plain slices, window by window, in the memory order of each packing."""
    windows = window_table(28, 7, 2, [28, 14], 0.5)
    canvas = np.arange(3 * 56 * 56, dtype=np.float32).reshape(3, 56, 56)
    expected = []
    for window in windows:
        tiles = [canvas[:, top : top + window.size, left : left + window.size] for top, left in window.offsets]
        expected.append(np.stack(tiles, axis=0 if packing == "windows_first" else 1).ravel())
    np.testing.assert_array_equal(cut_windows(canvas, windows, packing), np.concatenate(expected))


# Kinds of input


def forms_of(pixels: np.ndarray) -> dict:
    """One uint8 image (height, width, 3) in every form that means the same."""
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    unit = torch.from_numpy(first).float() / 255
    return {
        "pil": Image.fromarray(pixels),
        "pil_rgba": Image.fromarray(np.dstack([pixels, noise(*pixels.shape[:2], 1)])),
        "numpy_last": pixels,
        "numpy_first": first,
        "numpy_rgba": np.dstack([pixels, noise(*pixels.shape[:2], 1)]),
        "numpy_int64": first.astype(np.int64),
        "numpy_float_1": first / 255,
        "numpy_float16_1": (first / 255).astype(np.float16),
        "numpy_strided": np.repeat(pixels, 2, axis=1)[:, ::2],
        "torch_first": torch.from_numpy(first),
        "torch_last": torch.from_numpy(pixels),
        "torch_float_1": unit,
        "torch_int64": torch.from_numpy(first).long(),
        "masked_nowhere": np.ma.masked_array(pixels, mask=False),
        "torch_half_1": unit.half(),
        "torch_with_gradient": unit.clone().requires_grad_(),
        "list": [pixels],
        "nested": [[pixels]],
        "batch": pixels[None],
    }


FORMS = forms_of(noise(31, 44))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same(form):
    processor = tiny()
    assert_same(processor(FORMS[form], return_tensors="pt"), processor(FORMS["pil"], return_tensors="pt"))


def test_many_images_are_the_single_ones_in_order():
    processor = tiny()
    images = [*list(FORMS.values())[:15], Image.fromarray(noise(9, 50, seed=1)), noise(60, 33, seed=2)]
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (len(images), TINY_LENGTH)
    for index, image in enumerate(images):
        single = processor(image, return_tensors="pt")
        assert torch.equal(batch["pixel_values"][index], single["pixel_values"][0])
    nested = processor([images[:2], [], images[2:]], return_tensors="pt")
    assert_same(nested, batch)


@pytest.mark.parametrize("stack", [np.stack, lambda images: torch.from_numpy(np.stack(images))])
def test_a_4d_array_is_a_list_of_images(stack):
    images = [noise(20, 30, seed=seed) for seed in range(3)]
    assert_same(tiny()(stack(images), return_tensors="pt"), tiny()(images, return_tensors="pt"))


@pytest.mark.parametrize("gray", [noise(20, 30, 1)[..., 0], noise(20, 30, 1), noise(20, 30, 1).transpose(2, 0, 1)])
def test_gray_arrays(gray):
    color = np.repeat(gray.reshape(20, 30, 1), 3, axis=2)
    assert_same(tiny()(gray, return_tensors="pt"), tiny()(color, return_tensors="pt"))
    assert_same(tiny()([gray], return_tensors="pt"), tiny()(color, return_tensors="pt"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_of_8_bits(mode):
    """As Pillow itself converts them; alpha is dropped, not composited."""
    image = Image.fromarray(noise(20, 30))
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert_same(tiny()(image, return_tensors="pt"), tiny()(image.convert("RGB"), return_tensors="pt"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 3), (1, 1)),
        ((3, 1, 1), (1, 1)),
        ((1, 1, 1), (1, 1)),
        ((1, 20, 3), (1, 20)),
        ((4, 20, 1), (20, 1)),
        ((4, 4, 3), (4, 4)),
    ],
)
def test_three_channels_are_likelier_than_four_or_one(shape, expected):
    assert image_sources_mfrsvlm.to_array(np.zeros(shape, np.uint8), None, 3).shape[1:] == expected


@pytest.mark.parametrize("shape", [(3, 20, 3), (4, 20, 4), (1, 20, 1), (3, 3, 3)])
def test_ambiguous_shapes_ask_for_the_format(shape):
    with pytest.raises(ValueError, match=r"Image 0 of 1.*input_data_format"):
        tiny()(np.zeros(shape, np.uint8))
    image = noise(*shape[1:], channels=shape[0])
    if shape[0] != 1:
        first = tiny()(image.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt")
        last = tiny()(image, input_data_format="channels_last", return_tensors="pt")
        assert_same(first, last)


def test_floats_without_rescaling_are_kept():
    image = np.random.default_rng(0).random((28, 28, 3), dtype=np.float32)
    outputs = tiny(do_rescale=False, window_sizes=[], do_resize=False)(image)["pixel_values"][0]
    np.testing.assert_allclose(outputs, ((image - MEAN) / STD).transpose(2, 0, 1).ravel(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_floats_without_rescaling_are_resized_as_floats(dtype):
    """Against Pillow, channel by channel; bicubic overshoot is cut, as with 8 bits."""
    image = noise(40, 60) if dtype == "uint8" else noise(40, 60) / np.float32(255)
    view = np.asarray(tiny(do_rescale=False, do_normalize=False, window_sizes=[])(image)["pixel_values"][0]).reshape(
        3, 28, 28
    )
    color = np.array([122, 116, 104]) if dtype == "uint8" else MEAN
    square = np.broadcast_to(color, (60, 60, 3)).astype(dtype)
    square[10:50] = image
    channels = [
        Image.fromarray(np.ascontiguousarray(square[..., c])).resize((28, 28), Image.Resampling.BICUBIC) for c in range(3)
    ]
    np.testing.assert_allclose(view, np.stack(channels).clip(0, 255 if dtype == "uint8" else 1), atol=1e-6)


# Channels, ranges, types of output


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("packing", ["windows_first", "channels_first"])
def test_other_numbers_of_channels(channels, packing, tmp_path):
    """Every band is resized by itself: the fourth is no alpha. Saved and loaded, cut and joined, padded and gray."""
    mean, std = [0.1 * (c + 1) for c in range(channels)], [0.2 + 0.1 * c for c in range(channels)]
    made = tiny(num_channels=channels, image_mean=mean, image_std=std, window_packing=packing)
    made.save_pretrained(tmp_path)
    loaded = MFRSVLMImageProcessor.from_pretrained(tmp_path)
    image = noise(40, 30, channels)
    (row,) = loaded(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.equal(
        row, made(image.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
    )
    windows = window_table(28, 7, 2, [28, 14], 0.5)
    assert len(row) == sum(packed_lengths(28, windows, channels))
    square = np.empty((40, 40, channels), np.uint8)
    square[:] = [int(value * 255) for value in mean]
    square[:, 5:35] = image

    def expected(side: int) -> np.ndarray:
        bands = [Image.fromarray(np.ascontiguousarray(square[..., c])).resize((side, side), 3) for c in range(channels)]
        return (np.stack(bands) / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))

    length = channels * 28**2
    np.testing.assert_allclose(row[:length].reshape(channels, 28, 28), expected(28), atol=1e-5)
    for joined in join_windows(row[length:].numpy(), windows, 56, packing, channels):
        np.testing.assert_allclose(joined, expected(56), atol=1e-5)
    for wrong in (noise(40, 30), Image.fromarray(noise(40, 30, 3)), Image.fromarray(noise(40, 30, 4))):
        with pytest.raises(ValueError, match=f"num_channels={channels}"):
            made(wrong)


def test_means_must_fit_the_channels():
    with pytest.raises(ValueError, match=r"image_mean.*num_channels=4"):
        tiny(num_channels=4)
    assert tiny(num_channels=4, image_mean=0.5, image_std=[0.5]).num_channels == 4


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64", "float16"])
def test_a_declared_range_is_scaled_linearly_and_clipped(dtype):
    low, high = (3, 203) if dtype == "uint8" else (100, 2100)
    values = np.random.default_rng(0).integers(0, 256 if dtype == "uint8" else 3000, (30, 40, 3)).astype(dtype)
    seen = tiny().process_image(values, value_range=(low, high))
    expected = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255
    assert seen.dtype == np.uint8
    assert np.abs(seen - expected.transpose(2, 0, 1)).max() <= 0.5 + 1e-4
    for form in (torch.from_numpy(values), [values]):
        outputs = tiny(value_range=[low, high])(form, return_tensors="pt")
        assert_same(outputs, tiny()(seen, return_tensors="pt"))
    gray = tiny().process_image(values[..., 0], value_range=(low, high))
    np.testing.assert_array_equal(gray, np.repeat(seen[:1], 3, axis=0))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_declared_range_reads_deep_files(mode, tmp_path):
    values = (
        np.random.default_rng(0).integers(0, 3000, (30, 40)).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
    )
    image = Image.fromarray(values)
    assert image.mode == mode
    image.save(tmp_path / "image.tif")
    for source in (image, tmp_path / "image.tif", values):
        seen = tiny().process_image(source, value_range=(0, 2000))
        np.testing.assert_array_equal(seen, tiny().process_image(values, value_range=(0, 2000)))
        with pytest.raises(ValueError, match=r"white|outside 0"):
            tiny().process_image(source)


def test_what_a_value_means_does_not_depend_on_the_others():
    """One glint above 1 is an error, or clipped where the range is declared; it never turns the rest black."""
    reflectance = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)
    plain = tiny().process_image(reflectance)
    reflectance[3, 4] = 1.3
    with pytest.raises(ValueError, match=r"range from .* to 1\.3, outside 0\.\.1"):
        tiny()(reflectance)
    seen = tiny().process_image(reflectance, value_range=(0, 1))
    assert (np.delete(seen.reshape(3, -1), 3 * 30 + 4, 1) == np.delete(plain.reshape(3, -1), 3 * 30 + 4, 1)).all()
    assert (seen[:, 3, 4] == 255).all()


def test_a_range_that_the_samples_cannot_reach_is_refused():
    with pytest.raises(ValueError, match=r"value_range=\(0, 10000\) does not fit samples of uint8"):
        tiny()([RGB], value_range=(0, 10000))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", ["image", "global_view"])
def test_types_of_output(name, source):
    exact = tiny(canvas_source=source)(RGB, return_tensors="pt")["pixel_values"]
    made = tiny(canvas_source=source, pixel_dtype=name)
    pixels = made(RGB, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == getattr(torch, name)
    assert torch.equal(pixels, exact.to(pixels.dtype))
    assert torch.equal(torch.stack([torch.as_tensor(row) for row in made(RGB)["pixel_values"]]), pixels)
    if name == "bfloat16":
        with pytest.raises(ValueError, match='return_tensors="pt"'):
            made(RGB, return_tensors="np")
    else:
        assert made(RGB, return_tensors="np")["pixel_values"].dtype == name


@pytest.mark.parametrize(
    "settings", [{}, {"window_sizes": [], "injection_layers": []}, {"window_overlap": 0.0, "window_sizes": [168]}]
)
def test_an_image_processor_for_a_model(settings):
    config = MFRSVLMConfig(**settings)
    made = MFRSVLMImageProcessor.for_model(config)
    assert made.num_image_tokens == config.image_seq_length
    row = made(RGB)["pixel_values"][0]
    assert row.shape == (sum(packed_lengths(config.image_size, config.windows if config.has_details else [])),)
    overridden = MFRSVLMImageProcessor.for_model(config, canvas_source="global_view", window_sizes=[])
    assert (overridden.canvas_source, overridden.window_sizes) == ("global_view", [])
    vision = CLIPVisionConfig(num_channels=4, image_size=56, patch_size=14, hidden_size=48)
    config = MFRSVLMConfig(vision_config=vision, window_sizes=[28], detail_feature_layers=[12])
    made = MFRSVLMImageProcessor.for_model(config, image_mean=0.5, image_std=0.5)
    assert made(noise(30, 50, 4))["pixel_values"][0].shape == (sum(packed_lengths(56, config.windows, 4)),)


# Files


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def test_paths_and_base64(tmp_path):
    image = Image.fromarray(noise(20, 30))
    content = encoded(image, "PNG")
    (tmp_path / "image.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    expected = tiny()(image, return_tensors="pt")
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), text, f"data:image/png;base64,{text}"):
        assert_same(tiny()(source, return_tensors="pt"), expected)
    several = tiny()([image, [str(tmp_path / "image.png")]], return_tensors="pt")
    assert torch.equal(several["pixel_values"][0], several["pixel_values"][1])


def test_urls(monkeypatch):
    image = Image.fromarray(noise(20, 30))
    fake_network(monkeypatch, encoded(image, "PNG"), "image.png")
    outputs = tiny()("https://example.com/image.png", return_tensors="pt")
    assert_same(outputs, tiny()(image, return_tensors="pt"))
    with pytest.raises(ValueError, match=r"Image 1 of 2.*https://example\.com/missing\.png.*404 Not Found"):
        tiny()(["https://example.com/image.png", "https://example.com/missing.png"])


def test_files_are_turned_upright(tmp_path):
    """EXIF orientation 6: to be turned by 90 degrees clockwise, also where the file was opened already."""
    image = Image.fromarray(noise(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert_same(
        tiny()(tmp_path / "turned.png", return_tensors="pt"), tiny()(image.rotate(-90, expand=True), return_tensors="pt")
    )
    assert_same(
        tiny()(Image.open(tmp_path / "turned.png"), return_tensors="pt"),
        tiny()(tmp_path / "turned.png", return_tensors="pt"),
    )


def test_overviews_and_masks_of_a_tiff_are_no_frames(tmp_path):
    """As in a cloud-optimized GeoTIFF: page 1 is a smaller copy, page 2 a mask, page 3 both."""
    image = Image.fromarray(noise(40, 60))
    pages = [image.resize((30, 20)), image.convert("1"), image.convert("1").resize((30, 20))]
    for page, kind in zip(pages, (1, 4, 5), strict=True):
        page.encoderinfo = {"tiffinfo": {254: kind}}
    image.save(tmp_path / "overviews.tif", save_all=True, append_images=pages)
    with Image.open(tmp_path / "overviews.tif") as opened:
        assert opened.n_frames == 4
        opened.seek(1)
        if 254 not in opened.tag_v2:
            pytest.skip("this Pillow does not write the tags of single pages")
        opened.seek(0)
        assert_same(tiny()(opened, return_tensors="pt"), tiny()(image, return_tensors="pt"))
        assert opened.tell() == 0
    assert_same(tiny()(tmp_path / "overviews.tif", return_tensors="pt"), tiny()(image, return_tensors="pt"))


def test_previews_of_a_drone_jpeg_are_no_frames(tmp_path):
    image = Image.fromarray(noise(40, 60))
    image.save(tmp_path / "drone.jpg", format="MPO", save_all=True, append_images=[image.resize((30, 20))])
    with Image.open(tmp_path / "drone.jpg") as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
        expected = tiny()(opened.convert("RGB"), return_tensors="pt")
    assert_same(tiny()(tmp_path / "drone.jpg", return_tensors="pt"), expected)


def frames(format: str, tmp_path: Path) -> Path:
    path = tmp_path / f"frames.{format.lower()}"
    images = [Image.fromarray(noise(20, 30, seed=seed)) for seed in range(3)]
    images[0].save(path, format, save_all=True, append_images=images[1:])
    return path


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_frames_are_refused(format, tmp_path):
    path = frames(format, tmp_path)
    for image in (path, str(path), Image.open(path)):
        with pytest.raises(ValueError, match="Image 0 of 1: it has 3 frames"):
            tiny()(image)
    opened = Image.open(path)
    opened.seek(1)
    tiny()(opened.copy())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be large, without pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PNG = encoded(Image.fromarray(noise(20, 30)), "PNG")
TIFF = encoded(Image.fromarray(noise(20, 30)), "TIFF")
JPEG = encoded(Image.fromarray(noise(200, 300)), "JPEG")
GIF = encoded(Image.fromarray(noise(20, 30)), "GIF")
FILES = {
    "empty": (b"", "cannot identify"),
    "text": (b"This is no image.", "cannot identify"),
    "garbage_after_magic": (PNG[:8] + bytes(100), "cannot"),
    "truncated_png": (PNG[: len(PNG) // 2], "damaged"),
    "truncated_jpeg": (JPEG[: len(JPEG) // 2], "damaged"),
    "truncated_tiff": (TIFF[: len(TIFF) // 2], "cannot|damaged"),
    "truncated_tiff_header": (TIFF[:10], "cannot"),
    "truncated_gif": (GIF[: len(GIF) // 2], "cannot|damaged"),
    "png_bad_checksum": (PNG[:60] + b"\0\0\0\0" + PNG[64:], "damaged"),
    "bomb": (png_header(30000, 30000), "decompression bomb"),
    "large": (png_header(13300, 13300), "damaged"),
    "thin": (png_header(20000, 1), "max_aspect_ratio"),
    "16_bit": (encoded(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PNG"), "I;16.*white"),
    "float": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "'F'.*white"),
    "32_bit": (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "signed, mixed, or too large|'I'.*white"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_bad_files(content, message, tmp_path):
    """By path and as a PIL image, alone and as the second of two. The message says which and why."""
    good = Image.fromarray(noise(20, 30))
    path = tmp_path / "bad.img"
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=rf"(?s)Image 1 of 2: .*({message})"):
            tiny()([good, source])
    try:
        opened = Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError):
        return  # Pillow refuses already
    with pytest.raises(ValueError, match=rf"(?s)Image 0 of 2: .*({message})"):
        tiny()([opened, good])


@pytest.mark.parametrize(
    "source", ["missing.png", "/no/such/folder/missing.tif", ".", "", "x" * 5000, "a\0b", "data:image/png;,"]
)
def test_missing_files(source):
    with pytest.raises(ValueError, match=r"(?s)Image 0 of 1: cannot open image") as error:
        tiny()(source)
    assert len(str(error.value)) < 800
    assert source[:40].encode("unicode_escape").decode() in str(error.value).replace("\\\\", "\\")


def test_missing_file_says_so():
    with pytest.raises(ValueError, match=r"'missing\.png': it is neither a file"):
        tiny()("missing.png")


def test_a_folder_whose_name_is_base64_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'demo': it is a folder"):
        tiny()("demo")


# Size


def test_pillows_own_limit_is_reported(tmp_path, monkeypatch):
    Image.fromarray(noise(20, 30)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image\.png.*decompression bomb"):
        tiny()(tmp_path / "image.png")


def test_large_images_are_refused_before_they_are_decoded():
    """Only the headers exist here, so that decoding would fail in another way."""
    header = Image.open(io.BytesIO(png_header(300, 200)))
    with pytest.raises(ValueError, match=r"Image 0 of 1: .*300.*max_image_pixels=50000"):
        tiny()(header, max_image_pixels=50_000)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(200, 20_000, "400000000 pixels after padding"), (20_000, 150, "400000000"), (1, 20_000, "max_aspect_ratio=200")],
)
def test_memory_stays_bounded(height, width, message):
    image = np.zeros((height, width, 3), np.uint8)
    tracemalloc.start()
    try:
        for kind in (image, Image.fromarray(image)):
            with pytest.raises(ValueError, match=message):
                tiny()(kind)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_long_images_pass_without_padding_or_with_a_wider_limit():
    strip = noise(2, 600)
    with pytest.raises(ValueError, match="height 2 and width 600"):
        tiny()(strip)
    assert tiny(max_aspect_ratio=300)(strip, return_tensors="pt")["pixel_values"].isfinite().all()
    assert tiny(do_pad=False)(strip, max_aspect_ratio=300.0, return_tensors="pt")["pixel_values"].isfinite().all()


def test_one_pixel():
    for image in (Image.new("RGB", (1, 1), (9, 99, 200)), np.full((1, 1, 3), (9, 99, 200), np.uint8)):
        pixels, _ = parts(tiny()(image)["pixel_values"][0])
        expected = (np.array([9, 99, 200]) / 255 - MEAN) / STD
        np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], (3, 28, 28)), atol=1e-6)


# Bad arrays and types

RGB = noise(20, 30)
ARRAYS = {
    "no_dimension": (np.array(3, np.uint8), "shape"),
    "one_dimension": (RGB.ravel(), "shape"),
    "five_dimensions": (RGB[None, None], "shape"),
    "two_channels": (RGB[..., :2], "channel"),
    "seven_channels": (noise(20, 30, 7), "channel"),
    "zero_height": (RGB[:0], "empty"),
    "zero_width": (RGB[:, :0], "empty"),
    "zero_gray": (RGB[:0, :0, 0], "empty"),
    "zero_channels": (RGB[..., :0], "channel"),
    "int8": ((RGB // 2).astype(np.int8), "int8 do not say what is white.*value_range"),
    "uint16": (RGB.astype(np.uint16), "uint16 do not say what is white.*value_range"),
    "uint16_bright": (RGB.astype(np.uint16) * 200, "uint16 do not say what is white"),
    "int16": (RGB.astype(np.int16), "int16 do not say what is white"),
    "int32": (RGB.astype(np.int32), "int32 do not say what is white"),
    "int64_bright": (RGB.astype(np.int64) * 200, r"outside 0\.\.255.*value_range"),
    "masked": (np.ma.masked_array(RGB, mask=RGB > 200), "values are masked"),
    "bool": (RGB > 128, "bool"),
    "complex": (RGB.astype(np.complex64), "complex64"),
    "object": (RGB.astype(object), "object"),
    "text": (RGB.astype(str), "dtype"),
    "negative": (RGB.astype(np.int64) - 1, "-1 to"),
    "negative_float": (RGB / 255 - 0.5, "-0.5 to"),
    "bright_float": (RGB.astype(np.float32), r"255, outside 0\.\.1.*value_range"),
    "overshot": (RGB / 250, r"1\.02, outside 0\.\.1"),
    "nan": (np.where(RGB > 250, np.nan, RGB), "NaN"),
    "inf": (np.where(RGB > 250, np.inf, RGB), "infinite"),
    "minus_inf": (np.where(RGB > 250, -np.inf, RGB), "infinite"),
}


@pytest.mark.parametrize(("array", "message"), ARRAYS.values(), ids=ARRAYS)
def test_bad_arrays(array, message):
    with pytest.raises(ValueError, match=rf"Image 0 of 1: .*{message}"):
        tiny()(array)
    with pytest.raises(ValueError, match=rf"Image 1 of 2: .*{message}"):
        tiny()([RGB, array])
    if array.dtype.kind in "iuf" and not isinstance(array, np.ma.MaskedArray):
        with pytest.raises(ValueError, match=rf"Image 0 of 1: .*{message}"):
            tiny()(torch.from_numpy(array.copy()))


@pytest.mark.parametrize("thing", [None, 3, 2.5, object(), {3}, RGB.tolist()[0][0]])
def test_wrong_types(thing):
    with pytest.raises(TypeError, match=r"Image 0 of .*expected a PIL image"):
        tiny()(thing)
    with pytest.raises(TypeError, match=r"Image 1 of .*expected a PIL image"):
        tiny()([RGB, thing])


@pytest.mark.parametrize("images", [[], [[]], [[], []], (), np.zeros((0, 20, 30, 3), np.uint8)])
def test_no_images(images):
    with pytest.raises(ValueError, match="No images given"):
        tiny()(images)


# Settings

NONSENSE = {
    "canvas_source": ("x", ValueError, "canvas_source='x'.*global_view"),
    "canvas_source_type": (3, TypeError, "canvas_source"),
    "window_packing": ("x", ValueError, "window_packing='x'.*channels_first"),
    "window_sizes": ([100], ValueError, "100.*patch_size=7"),
    "window_sizes_large": ([63], ValueError, "63.*56"),
    "window_sizes_gap": ([49], ValueError, "49.*21.*56"),
    "window_sizes_type": (28, TypeError, "window_sizes"),
    "window_sizes_none": (None, TypeError, "window_sizes"),
    "window_sizes_float": ([0.5], TypeError, "window_sizes"),
    "window_overlap": (1.0, ValueError, r"window_overlap=1\.0"),
    "window_overlap_nan": (float("nan"), ValueError, "window_overlap=nan"),
    "canvas_scale": (0, ValueError, "canvas_scale=0"),
    "canvas_scale_type": (2.0, TypeError, "canvas_scale"),
    "patch_size": (0, ValueError, "patch_size=0"),
    "patch_size_13": (13, ValueError, "28.*patch_size=13"),
    "crop_size": ({"height": 28, "width": 14}, ValueError, "crop_size.*14.*equal"),
    "crop_size_none": (None, ValueError, "crop_size"),
    "crop_size_keys": ({"shortest_edge": 28}, ValueError, "crop_size"),
    "size_negative": ({"shortest_edge": -28}, ValueError, "> 0"),
    "size_longest": ({"longest_edge": 28}, ValueError, "size.*shortest_edge"),
    "size_type": ("large", TypeError, "size"),
    "num_channels": (4, ValueError, "image_mean.*num_channels=4"),
    "num_channels_none": (0, ValueError, "num_channels=0"),
    "value_range": ((5, 5), ValueError, r"value_range=\(5, 5\)"),
    "value_range_one": ([5], ValueError, "value_range"),
    "value_range_nan": ((0, float("nan")), ValueError, "value_range"),
    "value_range_type": (255, TypeError, "value_range"),
    "pixel_dtype": ("float64", ValueError, "pixel_dtype='float64'.*bfloat16"),
    "image_mean": ([0.5, 0.5], (TypeError, ValueError), "image_mean"),
    "image_mean_nan": (float("nan"), ValueError, "image_mean=nan"),
    "image_mean_type": ("a", TypeError, "image_mean"),
    "image_std": (0.0, ValueError, r"image_std=0\.0 must not be 0"),
    "rescale_factor": (float("inf"), ValueError, "rescale_factor=inf"),
    "rescale_factor_type": ("a", TypeError, "rescale_factor"),
    "resample": (99, ValueError, "99"),
    "do_resize": (False, ValueError, "do_resize=True"),
    "do_rescale_type": ("yes", TypeError, "do_rescale"),
    "max_aspect_ratio": (0.5, ValueError, r"max_aspect_ratio=0\.5"),
    "max_image_pixels": (0, ValueError, "max_image_pixels=0"),
    "input_data_format": ("channels_middle", ValueError, "channels_middle"),
    "return_tensors": ("tf2", ValueError, "tf2"),
    "no_such_setting": (1, TypeError, "no_such_setting"),
}
NAMES = sorted((*MFRSVLMImageProcessor.valid_kwargs.__annotations__, "no_such_setting"), key=len, reverse=True)


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsensical_settings(case):
    value, error, message = NONSENSE[case]
    name = next(name for name in NAMES if case.startswith(name))
    with pytest.raises(error, match=f"(?s){message}"):
        tiny()(RGB, **{name: value})
    assert name == "no_such_setting" or hasattr(tiny(), name)  # the call left the processor as it was
    tiny()(RGB)


@pytest.mark.parametrize(
    "settings",
    [
        {"canvas_source": "x"},
        {"window_packing": "x"},
        {"window_sizes": [100]},
        {"window_overlap": 1.5},
        {"canvas_scale": 0},
        {"patch_size": 5},
        {"crop_size": {"height": 28, "width": 14}},
        {"image_std": [0.0, 1.0, 1.0]},
        {"max_aspect_ratio": 0.0},
    ],
)
def test_nonsensical_settings_fail_when_the_processor_is_made(settings):
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0] + "|Window"):
        tiny(**settings)


def test_settings_of_a_call_are_those_of_a_processor():
    overrides = {
        "canvas_source": "global_view",
        "window_packing": "channels_first",
        "window_sizes": [14],
        "window_overlap": 0,
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
    }
    assert_same(tiny()(RGB, return_tensors="pt", **overrides), tiny(**overrides)(RGB, return_tensors="pt"))
    assert_same(tiny()(RGB, window_sizes=(14,), return_tensors="pt"), tiny(window_sizes=[14])(RGB, return_tensors="pt"))


def test_saved_and_loaded_unchanged(tmp_path):
    overrides = {"canvas_source": "global_view", "window_packing": "channels_first", "max_aspect_ratio": 50, "resample": 2}
    overrides |= {"value_range": [0, 200], "pixel_dtype": "bfloat16"}
    for number, processor in enumerate((MFRSVLMImageProcessor(), tiny(**overrides), tiny(window_sizes=[]))):
        folder = tmp_path / str(number)
        processor.save_pretrained(folder)
        loaded = MFRSVLMImageProcessor.from_pretrained(folder)
        ours, theirs = processor.to_dict(), loaded.to_dict()
        ours.pop("auto_map", None), theirs.pop("auto_map", None)
        assert ours == theirs
        outputs = [each(RGB, return_tensors="pt") for each in (processor, loaded)]
        assert outputs[0].keys() == outputs[1].keys()
        assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
        saved = json.loads((folder / "preprocessor_config.json").read_text())
        assert saved["auto_map"]["AutoImageProcessor"] == "image_processing_mfrsvlm.MFRSVLMImageProcessor"


def test_inputs_are_left_alone():
    image, array = Image.fromarray(RGB), RGB.copy()
    tiny()([image, array, torch.from_numpy(array)])
    np.testing.assert_array_equal(array, RGB)
    np.testing.assert_array_equal(np.asarray(image), RGB)


# Real rasters


@pytest.mark.parametrize("name", ["rasterio_RGB.byte.tif", "rt_colorado.tif", "og_naip_2020.tif"])
def test_real_rasters(name):
    """8-bit GeoTIFFs of three and four bands, one of them with an overview, read as Pillow reads their first page."""
    path = external_data(f"images/{name}")
    with Image.open(path) as image:
        bands = np.asarray(image)
    outputs = tiny()(path, return_tensors="pt")
    assert_same(outputs, tiny()(bands[..., :3], return_tensors="pt"))
    assert_same(outputs, tiny()(Image.open(path), return_tensors="pt"))


@pytest.mark.parametrize("name", ["rt_mosaic_cog1.tif", "og_landsat_2020.tif"])
def test_rasters_that_pillow_cannot_read(name):
    """Three bands of 16 bits, and four bands without a color interpretation: the message says what to do."""
    path = external_data(f"images/{name}")
    with pytest.raises(ValueError, match=rf"Image 0 of 1: .*{name}.*rasterio.*value_range"):
        tiny()(path)


# Anything else

DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
SETTINGS = {
    "canvas_source": ["image", "global_view", "x"],
    "window_packing": ["windows_first", "channels_first"],
    "window_sizes": [[28, 14], [14], [], [56], [100], [14, 14], None],
    "window_overlap": [0.5, 0.0, 0, 0.75, 0.3, 1.0, float("nan")],
    "canvas_scale": [1, 2, 3, 0, "2"],
    "patch_size": [7, 14, 5, 0],
    "do_pad": [True, False, None],
    "do_resize": [True, False],
    "do_center_crop": [True, False],
    "do_rescale": [True, False],
    "do_normalize": [True, False],
    "do_convert_rgb": [True, False, None],
    "resample": [0, 1, 2, 3, 99],
    "image_mean": [0.5, [0.1, 0.2, 0.3], [0.5], [0.5] * 4, float("inf")],
    "image_std": [0.5, 0.0, [0.1, 0.2, 0.3]],
    "size": [{"shortest_edge": 28}, {"height": 28, "width": 28}, {"shortest_edge": 20}, {"longest_edge": 28}, 28],
    "crop_size": [28, {"height": 28, "width": 28}, {"height": 28, "width": 14}, {"height": 14, "width": 14}],
    "input_data_format": ["channels_first", "channels_last", "none"],
    "max_aspect_ratio": [200.0, 2, 0],
    "max_image_pixels": [10**6, 400, -1],
    "num_channels": [3, 1, 4, 0],
    "value_range": [(0, 255), [0, 1], (0, 65535), (1, 0), None],
    "pixel_dtype": ["float32", "bfloat16", "float16", "x"],
    "return_tensors": ["pt", "np", None],
}


@st.composite
def arrays(draw):
    dimensions = draw(st.sampled_from([3, 3, 3, 3, 2, 2, 4, 1, 0, 5]))
    shape = [draw(st.integers(0, 12) | st.sampled_from([1, 3, 4])) for _ in range(dimensions)]
    if dimensions >= 3 and draw(st.booleans()):
        shape[draw(st.sampled_from([-1, -3]))] = draw(st.sampled_from([1, 3, 4]))
    low, high = draw(st.sampled_from([(0, 255), (0, 1), (0, 1.01), (-1, 1), (0, 65535), (-(10**6), 10**6)]))
    values = np.random.default_rng(draw(st.integers(0, 99))).uniform(low, high, shape)
    if values.size and draw(st.integers(0, 5)) == 0:
        values.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    dtype = draw(st.sampled_from(DTYPES))
    with np.errstate(all="ignore"):
        array = values.astype(dtype)
    if draw(st.booleans()):
        array = torch.from_numpy(np.atleast_1d(array))
        if array.is_floating_point() and draw(st.booleans()):
            array = array.bfloat16()
    return array


@st.composite
def pil_images(draw):
    size = (draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    mode = draw(st.sampled_from(MODES))
    bands = len(Image.new(mode, (1, 1)).getbands())
    color = tuple(draw(st.integers(0, 255)) for _ in range(bands))
    return Image.new(mode, size, color if bands > 1 else color[0])


good_image = st.builds(noise, st.integers(1, 40), st.integers(5, 40)) | st.builds(
    lambda mode, width, height: Image.new(mode, (width, height)),
    st.sampled_from(["L", "RGB", "RGBA", "P", "CMYK"]),
    st.integers(1, 40),
    st.integers(1, 40),
)
any_image = (
    arrays()
    | pil_images()
    | st.sampled_from(
        [None, 3, "no-such-file.png", b"", b"bytes", {}, {"path": None}, {"bytes": b"x"}, {"url": "http"}, [], "", Path("x")]
    )
)
any_setting = st.sampled_from([(name, value) for name, values in SETTINGS.items() for value in values])


@st.composite
def calls(draw):
    """Images and settings: one call in two with good images, and one in two with no settings."""
    one = good_image if draw(st.booleans()) else any_image
    images = draw(one | st.lists(one, max_size=3) | st.lists(st.lists(one, max_size=2), max_size=3))
    return images, dict(draw(st.lists(any_setting, max_size=4))) if draw(st.booleans()) else {}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_input_gives_a_batch_or_a_clear_error(call):
    """Whatever comes in: finite tensors of the shapes that the settings promise, or an error with a message."""
    images, overrides = call
    processor = tiny()
    try:
        outputs = processor(images, **overrides)
    except (ValueError, TypeError) as error:
        assert str(error).strip()
        return
    side = overrides.get("crop_size", 28)
    side = side if isinstance(side, int) else side["height"]
    sizes, scale = overrides.get("window_sizes", [28, 14]), overrides.get("canvas_scale", 2)
    windows = window_table(side, overrides.get("patch_size", 7), scale, sizes, overrides.get("window_overlap", 0.5))
    length = sum(packed_lengths(side, windows, overrides.get("num_channels", 3)))
    assert len(outputs["pixel_values"]) == len(image_processing_mfrsvlm.flatten_images(images)) > 0
    for row in map(torch.as_tensor, outputs["pixel_values"]):
        assert row.shape == (length,) and row.isfinite().all()
        assert row.dtype == getattr(torch, overrides.get("pixel_dtype", "float32"))
