"""Settings of the processors: what makes no sense is rejected by name, at construction, at a call and in a file."""

import json
import math
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor
from mfrsvlm.configuration_mfrsvlm import packed_lengths, window_table


BOX = Path(__file__).parents[1] / "demo" / "model"
TINY = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "patch_size": 7, "window_sizes": [28, 14]}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))

NONSENSE = [
    {"image_mean": 1e30},
    {"image_mean": [0.5, math.nan, 0.5]},
    {"image_mean": [0.5, 0.5]},
    {"image_mean": -1.0},
    {"image_mean": ["a", "b", "c"]},
    {"image_mean": [[0.5, 0.5, 0.5]]},
    {"image_std": [0.5, 0.5, 0.0]},
    {"image_std": [0.5, 0.5, -0.5]},
    {"image_std": math.inf},
    {"image_std": 1e-300},
    {"rescale_factor": [1 / 255]},
    {"rescale_factor": "1/255"},
    {"rescale_factor": math.nan},
    {"rescale_factor": 0.0},
    {"rescale_factor": -1.0},
    {"resample": 99},
    {"resample": "bicubic"},
    {"size": {"shortest_edge": 0}},
    {"size": {"shortest_edge": -5}},
    {"size": {"shortest_edge": 10**9}},
    {"size": {"height": 10**9, "width": 28}},
    {"size": {"side": 28}},
    {"size": "large"},
    {"crop_size": {"height": 0, "width": 0}},
    {"crop_size": {"height": 7 * 10**8, "width": 7 * 10**8}},
    {"do_resize": "yes"},
    {"do_normalize": "false"},
    {"do_pad": 3},
    {"do_convert_rgb": "true"},
    {"patch_size": 0},
    {"patch_size": True},
    {"canvas_scale": 10**9},
    {"canvas_scale": 1.5},
    {"window_sizes": ["14"]},
    {"window_sizes": [10**9]},
    {"window_sizes": [True]},
    {"window_overlap": math.nan},
    {"num_channels": 10**9, "image_mean": 0.5, "image_std": 0.5},
    {"num_channels": "3"},
    {"value_range": ["a", "b"]},
    {"value_range": [0, math.nan]},
    {"max_image_pixels": 0},
    {"max_image_pixels": "many"},
    {"max_aspect_ratio": math.nan},
    {"pixel_dtype": ["float32"]},
    {"pixel_dtype": "float16", "image_std": 1e-5},
    {"pixle_dtype": "float16"},
]


@pytest.mark.parametrize("settings", NONSENSE, ids=str)
def test_nonsense_is_rejected_by_name(settings):
    name = {"window_sizes": "[Ww]indow"}.get(next(iter(settings)), next(iter(settings)))
    for call in (
        lambda: MFRSVLMImageProcessor(**{**TINY, **settings}),
        lambda: MFRSVLMImageProcessor(**TINY)(IMAGE, **settings),
    ):
        with pytest.raises((ValueError, TypeError), match=name) as error:
            call()
        assert len(str(error.value).splitlines()) == 1


def saved(folder: Path, **changes) -> Path:
    """The model folder in the box with other settings of the image processor; `...` removes one."""
    content = json.loads((BOX / "processor_config.json").read_text())
    for name, value in changes.items():
        content["image_processor"].pop(name, None)
        if value is not ...:
            content["image_processor"][name] = value
    for file in BOX.glob("*.json"):
        shutil.copy(file, folder)
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_std": ...}, "lack image_std"),
        ({"image_mean": None}, "lack image_mean"),
        ({"rescale_factor": ..., "size": ...}, "lack size, rescale_factor"),
        ({"image_standard": [0.5]}, "no settings image_standard"),
        ({"do_resize": "true"}, "do_resize"),
        ({"image_mean": [0.5, 1e30, 0.5]}, "image_mean"),
        ({"rescale_factor": [1]}, "rescale_factor"),
        ({"crop_size": {"height": 10**9, "width": 10**9}}, "crop_size"),
    ],
    ids=str,
)
def test_saved_settings(changes, message, tmp_path):
    for processor in (MFRSVLMImageProcessor, MFRSVLMProcessor):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            processor.from_pretrained(saved(tmp_path, **changes))
        assert len(str(error.value).splitlines()) == 1
    assert MFRSVLMProcessor.from_pretrained(saved(tmp_path)).image_token == "<image>"


def test_unknown_settings_of_the_processor(tmp_path):
    saved(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_placment": "prefix"}))
    with pytest.raises(ValueError, match="unknown names: image_placment"):
        MFRSVLMProcessor.from_pretrained(tmp_path)


VALUES = {
    "do_resize": [True, False, "yes", None],
    "do_pad": [True, False, 0, "no"],
    "do_center_crop": [True, False],
    "do_rescale": [True, False, 1],
    "do_normalize": [True, False],
    "do_convert_rgb": [True, False, None],
    "size": [
        {"shortest_edge": 28},
        {"height": 40, "width": 30},
        {"shortest_edge": -1},
        {},
        28,
        [28, 28],
        {"height": 28},
        10**9,
    ],
    "crop_size": [
        {"height": 28, "width": 28},
        {"height": 14, "width": 28},
        28,
        None,
        {"height": 10**9, "width": 10**9},
        "a",
    ],
    "patch_size": [7, 14, 0, -7, 3, 28, None],
    "resample": [0, 1, 2, 3, 4, 5, 6, -1, "a"],
    "rescale_factor": [1 / 255, 1.0, 0, 1e300, [1], math.nan],
    "image_mean": [0.5, [0.1, 0.2, 0.3], (0.5,), [1, 2], 1e30, None, "a", [], [0.5] * 4],
    "image_std": [0.5, [0.1, 0.2, 0.3], 0, 1e-40, -1.0, [math.inf] * 3],
    "num_channels": [3, 1, 4, 0, 10**9],
    "value_range": [None, (0, 255), [0, 1], (1, 0), "ab", 3],
    "pixel_dtype": ["float32", "bfloat16", "float16", "int8", 3],
    "canvas_scale": [1, 2, 3, 0, 10**9, 2.0],
    "canvas_source": ["image", "global_view", "none"],
    "window_sizes": [[28, 14], [], [14], (28,), [7], [10**9], 28, [0], ["a"]],
    "window_overlap": [0.5, 0, 0.9, 1, -1, 0.3, "a"],
    "window_packing": ["windows_first", "channels_first", None, 1],
    "max_aspect_ratio": [200.0, 1, 0, math.inf, math.nan],
    "max_image_pixels": [10**6, 100, -1, 1.5],
    "return_tensors": ["pt", "np", None, "tf", 3],
}
IMAGES = [
    IMAGE,
    IMAGE.convert("RGBA"),
    IMAGE.convert("L"),
    np.asarray(IMAGE),
    np.random.default_rng(1).random((4, 20, 30)),
    np.full((20, 30), 100, np.uint16),
    np.random.default_rng(2).random((1, 28, 28), dtype=np.float32),
]


@pytest.mark.integration
def test_random_settings_give_finite_pixels_or_one_line():
    random, right = Random(0), 0
    for _ in range(2000):
        names = random.sample(list(VALUES), random.randint(1, 5))
        settings, image = {name: random.choice(VALUES[name]) for name in names}, random.choice(IMAGES)
        try:
            if random.random() < 0.5:
                processor, options = MFRSVLMImageProcessor(**TINY), settings
            else:
                options = {name: settings.pop(name) for name in ("return_tensors",) if name in settings}
                processor = MFRSVLMImageProcessor(**{**TINY, **settings})
            rows = processor(image, **options)["pixel_values"]
        except (ValueError, TypeError) as error:
            assert len(str(error).splitlines()) == 1, settings
            continue
        given = {name: getattr(processor, name) for name in VALUES if hasattr(processor, name)}
        standard = processor._standardize_kwargs(**options)
        given |= {name: standard[name] for name in options if options[name] is not None}
        side = given["crop_size"]["height"]
        windows = window_table(
            side, given["patch_size"], given["canvas_scale"], given["window_sizes"], given["window_overlap"]
        )
        (row,) = rows
        row = torch.as_tensor(row)
        assert row.shape == (sum(packed_lengths(side, windows, given["num_channels"])),), settings
        assert torch.isfinite(row.float()).all(), settings
        right += 1
    assert right > 300
