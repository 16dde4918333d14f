"""Mutated rasters, and random options.

What is read has the size that was asked for. Of an 8-bit RGB file, it is what rasterio itself reads from the mutated file.
"""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from fuzz._mutations import BYTE_MUTATIONS, restored
from fuzz.harness import Case, outcome, random_of
from tiny_rasters import pixels, write

from mfrsvlm.geospatial import Raster, View
from mfrsvlm.geospatial.raster import FILL


AREA = "rasters"
TEST_COUNT = 300
SIDE = 64  # of the images that are read

OPTIONS: dict[str, tuple[Any, ...]] = {
    "bands": (1, [1, 2, 3], [3, 1, 2], [1], 0, -1, 99, [], "red", ["red", "red", "red"], "x" * 3000, [1, 2]),
    "sensor": ("sentinel-2", "landsat-8", "", "x", "x" * 3000),
    "composite": ("true", "ndvi", "false", "", "x\ny"),
    "stretch": (
        "none", "percentile", "percentile:1,99", "percentile:99,1", "physical", "0,3000", "3000,0", "nan,inf", "a,b", "",
        (1,),
    ),
    "nodata": (0, 1e30, float("nan"), -1),
}  # fmt: skip
WINDOWS = ((0, 0, 10, 10), (0, 0, 0, 0), (-1, 0, 5, 5), (80, 50, 100, 100), (10**12, 0, 1, 1), (5, 5, 1, 1))


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    files = make_files(folder)
    for number in range(count):
        random = random_of(seed, number)
        path = random.choice(files)
        content, kind = path.read_bytes(), random.choice((*BYTE_MUTATIONS, "header", "header", "options", "options"))
        options: dict[str, Any] = {}
        window = None
        if kind == "options":
            options = {name: random.choice(OPTIONS[name]) for name in random.sample(sorted(OPTIONS), random.randint(1, 2))}
            window = random.choice((None, *WINDOWS))
        elif kind == "header":
            content = BYTE_MUTATIONS["flip"](content[:512], random) + content[512:]
        else:
            content = BYTE_MUTATIONS[kind](content, random)
        call = functools.partial(run, path, content, options, window)
        yield Case(f"{number} {path.name} {kind} {options} {window}"[:300], call)


def make_files(folder: Path) -> list[Path]:
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    profiles: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "plain.tif": (pixels(), {}),
        "deflate.tif": (pixels(), {"compress": "deflate", **tiled}),
        "lzw.tif": (pixels(), {"compress": "lzw", "interleave": "band"}),
        "jpeg.tif": (pixels(), {"compress": "jpeg"}),
        "sixteen.tif": (pixels("uint16"), {"compress": "deflate", "predictor": 2}),
        "float.tif": (pixels("float32"), {"nodata": -1.0}),
        "bands.tif": (pixels("uint16", bands=4), {"names": ["blue", "green", "red", "nir"]}),
        "masked.tif": (pixels(), {"mask": (pixels()[0] > 60).astype(np.uint8) * 255}),
        "photo.png": (pixels(), {"driver": "PNG"}),
        "photo.jpg": (pixels(), {"driver": "JPEG"}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [Path(write(folder / name, values, **profile)) for name, (values, profile) in profiles.items()]


def run(path: Path, content: bytes, options: dict[str, Any], window: Any) -> str:
    beside = [path.with_name(f"{path.name}{suffix}") for suffix in (".aux.xml", ".msk", ".ovr")]
    with restored(path, *beside), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(content)
        return outcome(lambda: read(path, options, window), lambda view: is_right(view, path, options, window))


def read(path: Path, options: dict[str, Any], window: Any) -> View:
    with Raster.open(str(path), **options) as raster:
        return raster.read(window, max_side=SIDE if window is None else 10)


def is_right(view: View, path: Path, options: dict[str, Any], window: Any) -> bool:
    width, height = view.image.size
    assert view.image.mode == "RGB" and view.valid.shape == (height, width)
    assert max(width, height) <= (SIDE if window is None else 10)
    with rasterio.open(path) as dataset:
        is_plain = set(dataset.dtypes) == {"uint8"} and dataset.count == 3 and not options and window is None
        turned = dataset.transform.e > 0 or dataset.transform.a < 0 or dataset.transform.b or dataset.transform.d
        colours = tuple(colour.name for colour in dataset.colorinterp)
        if is_plain and not turned and colours == ("red", "green", "blue") and view.record.stretch.kind == "none":
            shape = (3, height, width)
            expected = dataset.read(out_shape=shape, resampling=rasterio.enums.Resampling.cubic).transpose(1, 2, 0)
            assert np.array_equal(np.asarray(view.image)[view.valid], expected[view.valid])
    assert (np.asarray(view.image)[~view.valid] == FILL).all()  # pixels without data
    return True
