"""Files of images with changed bytes, and images in odd modes: read exactly, or rejected."""

import io
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from fuzz.harness import Case, outcome, random_of
from PIL import Image, ImageOps

from mfrsvlm import MFRSVLMImageProcessor


AREA = "image files"
SIDE = 28
SETTINGS = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "patch_size": 7}
MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16", "F", "I")
FORMATS = {
    "PNG": ("RGB", "L", "RGBA", "P", "LA", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "TIFF": MODES,
    "GIF": ("P", "L", "1"),
    "BMP": ("RGB", "L", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TGA": ("RGB", "L", "RGBA", "P"),
    "JPEG2000": ("RGB", "L"),
    "PPM": ("RGB", "L"),
}


@cache
def processor() -> MFRSVLMImageProcessor:
    return MFRSVLMImageProcessor(**SETTINGS, window_sizes=[28, 14], max_image_pixels=10**6)


def encoded(random: Random) -> tuple[str, bytes]:
    """A small image in a random format, mode and size, with random metadata."""
    name = random.choice(list(FORMATS))
    mode = random.choice(FORMATS[name])
    generator = np.random.default_rng(random.getrandbits(32))
    height, width = random.choice([(20, 30), (30, 20), (1, 1), (1, 40), (9, 9), (64, 48)])
    if mode in ("I;16", "I"):
        image = Image.fromarray(generator.integers(0, 2**16, (height, width), dtype=np.uint16))
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(generator.random((height, width), dtype=np.float32))
    else:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    options: dict = {}
    exif = Image.Exif()
    exif[0x0112] = random.choice([1, 3, 6, 8] if name == "TIFF" else [0, 1, 3, 6, 8, 9, 255])
    if name in ("JPEG", "PNG", "WEBP", "TIFF") and random.random() < 0.5:
        options["exif"] = exif
    if name in ("JPEG", "PNG", "WEBP", "TIFF") and random.random() < 0.3:
        options["icc_profile"] = random.randbytes(random.choice([1, 128, 500]))
    if name == "TIFF":
        options["compression"] = random.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    if name == "PNG" and mode == "P" and random.random() < 0.5:
        options["transparency"] = random.choice([0, bytes(random.randrange(256) for _ in range(40))])
    if name in ("GIF", "WEBP", "TIFF", "PNG") and random.random() < 0.15:
        options |= {"save_all": True, "append_images": [image.copy().rotate(180)]}
    file = io.BytesIO()
    image.save(file, name, **options)
    return f"{name} {mode} {height}x{width}", file.getvalue()


def mutated(random: Random, content: bytes) -> tuple[str, bytes]:
    kind = random.choice(["none", "flip", "header", "truncate", "insert", "remove", "zeros", "repeat", "number", "join"])
    data = bytearray(content)
    place = random.randrange(len(data))
    if kind in ("flip", "header"):
        for _ in range(random.choice([1, 2, 8])):
            data[random.randrange(min(64, len(data)) if kind == "header" else len(data))] ^= 1 << random.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "insert":
        data[place:place] = random.randbytes(random.randint(1, 20))
    elif kind == "remove":
        del data[place : place + random.randint(1, 20)]
    elif kind == "zeros":
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    elif kind == "repeat":
        data[place:place] = data[: random.randint(1, len(data))]
    elif kind == "number":
        number = random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF0000])
        data[place : place + 4] = number.to_bytes(4, random.choice(["big", "little"]))
    elif kind == "join":
        data += bytes(data)
    return kind, bytes(data)


def is_right(content: bytes, row: np.ndarray) -> bool:
    """Whether the pixels are those that Pillow alone gives for the file, and the row is that of these pixels."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        expected = ImageOps.exif_transpose(image).convert("RGB")
    pixels = processor().process_image(content)
    same = np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))
    whole = processor()(expected, return_tensors="np")["pixel_values"][0]
    return same and np.isfinite(row).all() and np.array_equal(row, whole)


def run(content: bytes) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(
            lambda: processor()(content, return_tensors="np")["pixel_values"][0],
            lambda row: is_right(content, row),
            "Image 0",
        )


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        random = random_of(seed, number)
        what, content = encoded(random)
        how, content = mutated(random, content)
        yield Case(f"{number}: {what}, {how}", lambda content=content: run(content))
