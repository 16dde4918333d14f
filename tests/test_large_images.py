"""Memory of large images is bounded, and their numbers are those of the plain way: convert, pad to a square, resize."""

import io
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import PILImageResampling

import mfrsvlm
from mfrsvlm import MFRSVLMImageProcessor, image_processing_mfrsvlm, image_sources_mfrsvlm
from mfrsvlm.image_processing_mfrsvlm import pad_colors, pad_to_square, resize


MEAN = (0.48145466, 0.4578275, 0.40821073)
SIZES = [(40, 24), (24, 40), (37, 37), (1, 60), (60, 1), (33, 32), (64, 31)]  # (width, height)
TARGETS = [(28, 28), (56, 56), (37, 37), (60, 60), (24, 90)]


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    generator, (width, height) = np.random.default_rng(0), size
    if mode == "F":
        return Image.fromarray(generator.random((height, width), dtype=np.float32))
    image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("resample", list(PILImageResampling))
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "F", "1"])
def test_resizing_in_strips_is_exact(mode, resample, monkeypatch):
    """As if the padded square had been made, for every strip of rows, and without padding."""
    working = {"F": "F"}.get(mode, "RGB")
    for size, target, pixels in product(SIZES, TARGETS, [100, 10**6]):
        monkeypatch.setattr(image_processing_mfrsvlm, "ROWS_PIXELS", pixels)
        image = picture(mode, size)
        mean = MEAN if working == "RGB" else MEAN[:1]
        (color,) = pad_colors(working, 1, mean)
        (square,) = pad_to_square([image.convert(working)], mean)
        for expected, padding in ((square, color), (image.convert(working), None)):
            seen = resize(image, working, target, resample, padding)
            assert seen.mode == working and seen.size == target
            np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected.resize(target, resample)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("quantize", [True, False])
def test_value_ranges_in_strips_are_exact(dtype, quantize, monkeypatch):
    values = (np.random.default_rng(1).random((3, 20, 30)) * 200).astype(dtype)
    limits = (10, 150)
    whole = image_sources_mfrsvlm.to_eight_bits(values, limits, quantize)
    monkeypatch.setattr(image_sources_mfrsvlm, "ROWS_PIXELS", 70)
    np.testing.assert_array_equal(image_sources_mfrsvlm.to_eight_bits(values, limits, quantize), whole)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK"])
def test_modes_are_those_of_rgb(mode):
    """What is converted strip by strip is what is converted at once."""
    image = picture("RGB", (50, 40)).convert(mode) if mode != "RGBA" else picture("RGBA", (50, 40))
    processor = MFRSVLMImageProcessor(window_sizes=[168])
    for options in ({}, {"do_pad": False}, {"do_resize": False, "canvas_source": "global_view", "size": None}):
        if "do_resize" in options:
            image = image.resize((400, 340))
        seen = processor(image, return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(seen, processor(image.convert("RGB"), return_tensors="pt", **options)["pixel_values"])


MEASURE = """
import resource, sys
import numpy as np
from PIL import Image
from mfrsvlm import MFRSVLMImageProcessor
processor = MFRSVLMImageProcessor()
processor(np.zeros((50, 60, 3), np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processor(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "size", "limit"),
    [("RGB", (13377, 13377), 800), ("RGBA", (13377, 13377), 800), ("P", (13377, 13376), 300), ("RGB", (100, 13377), 150)],
)
def test_memory_at_the_limit_of_pixels(mode, size, limit, tmp_path: Path):
    """MiB beyond those of the process: 4 bytes a pixel of the image, which Pillow needs, and little more."""
    path = tmp_path / "large.png"
    Image.new(mode, size).save(path)
    assert size[0] * size[1] <= max(size) ** 2 <= MFRSVLMImageProcessor().max_image_pixels
    environment = {**os.environ, "PYTHONPATH": str(Path(mfrsvlm.__file__).parents[1])}
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, path], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert float(output) < limit


def test_limits_hold_before_anything_is_decoded(monkeypatch):
    """A header of a few bytes may promise a huge image."""

    def load(*args):
        raise AssertionError("decoded")

    file = io.BytesIO()
    Image.new("RGB", (13378, 1000)).save(file, "PNG")
    long = io.BytesIO()
    Image.new("L", (5000, 10)).save(long, "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match="178970884 pixels after padding to a square"):
        MFRSVLMImageProcessor()(file.getvalue())
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        MFRSVLMImageProcessor()(long.getvalue())
