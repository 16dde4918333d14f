"""The same pixels give the same tensor, whatever form they are stored in."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from tiny_rasters import CRS, NORTH_UP, data_array, pixels, write

from mfrsvlm import MFRSVLMImageProcessor
from mfrsvlm.geospatial import Raster


COLLAR = 7
NAMES = ("red", "green", "blue")
PROCESSOR = MFRSVLMImageProcessor(window_sizes=[])


def copy(folder: Path, values: np.ndarray, driver: str, ending: str, **options: Any) -> str:
    source, target = write(folder / "source.tif", values), str(folder / f"copy{ending}")
    rasterio.shutil.copy(source, target, driver=driver, **options)
    return target


def zipped(folder: Path, values: np.ndarray) -> str:
    with zipfile.ZipFile(folder / "scene.zip", "w") as archive:
        archive.write(write(folder / "scene.tif", values), "inner/scene.tif")
    return f"/vsizip/{folder / 'scene.zip'}/inner/scene.tif"


def with_world_file(folder: Path, values: np.ndarray) -> str:
    path = copy(folder, values, "PNG", ".png", WORLDFILE="YES")
    assert list(folder.glob("*.wld"))
    for extra in folder.glob("*.aux.xml"):  # the world file alone places it
        extra.unlink()
    return path


def south_up(folder: Path, values: np.ndarray) -> str:
    transform = NORTH_UP @ Affine.translation(0, values.shape[1]) @ Affine.scale(1, -1)
    return write(folder / "south.tif", values[:, ::-1], transform=transform)


def bgr(folder: Path, values: np.ndarray) -> str:
    return write(folder / "bgr.tif", values[::-1], colours=(ColorInterp.blue, ColorInterp.green, ColorInterp.red))


def described(folder: Path, values: np.ndarray) -> str:
    grey = (ColorInterp.gray, *[ColorInterp.undefined] * 3)
    four = np.concatenate([values[:1][::-1], values[::-1]])  # another band in front
    names = ("B8", "Blue", "green", "red")
    return write(folder / "names.tif", four, colours=grey, photometric="MINISBLACK", names=names)


def collar(folder: Path, values: np.ndarray, masked: bool = False) -> str:
    widths = ((0, 0), (COLLAR, COLLAR), (COLLAR, COLLAR))
    mask = np.pad(np.full(values.shape[1:], True), COLLAR)
    padded = np.pad(values, widths, constant_values=3 if masked else 0)
    transform = NORTH_UP @ Affine.translation(-COLLAR, -COLLAR)
    if masked:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            return write(folder / "collar.tif", padded, transform=transform, mask=mask)
    return write(folder / "collar.tif", padded, transform=transform, nodata=0)


def alpha(folder: Path, values: np.ndarray) -> str:
    full = np.full_like(values[:1], np.iinfo(values.dtype).max)
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    return write(folder / "alpha.tif", np.concatenate([values, full]), colours=colours)


def per_band(folder: Path, values: np.ndarray) -> dict[str, str]:
    pairs = zip(NAMES, values, strict=True)
    return {name: write(folder / f"{name}.tif", band[None], colours=None) for name, band in reversed(list(pairs))}


FORMS = {
    "cog": lambda folder, values: copy(folder, values, "COG", ".tif"),
    "jp2": lambda folder, values: copy(folder, values, "JP2OpenJPEG", ".jp2", QUALITY="100", REVERSIBLE="YES"),
    "vrt": lambda folder, values: copy(folder, values, "VRT", ".vrt"),
    "nitf": lambda folder, values: copy(folder, values, "NITF", ".ntf"),
    "lerc": lambda folder, values: write(folder / "lerc.tif", values, compress="LERC_DEFLATE", tiled=True),
    "zstd": lambda folder, values: write(folder / "zstd.tif", values, compress="ZSTD", interleave="band", bigtiff="YES"),
    "webp": lambda folder, values: write(folder / "webp.tif", values, compress="WEBP", WEBP_LOSSLESS=True),
    "zip": zipped,
    "png with world file": with_world_file,
    "south-up": south_up,
    "bgr": bgr,
    "descriptions": described,
    "nodata collar": collar,
    "mask band": lambda folder, values: collar(folder, values, masked=True),
    "alpha": alpha,
    "one file per band": per_band,
    "data array": lambda folder, values: data_array(values, NAMES),
    "plain data array": lambda folder, values: data_array(values, NAMES, rio=False),
    "dataset": lambda folder, values: rasterio.open(write(folder / "open.tif", values)),
}
DRIVERS = {"cog": "COG", "jp2": "JP2OpenJPEG", "nitf": "NITF", "png with world file": "PNG"}
COMPRESSIONS = {"lerc": "LERC", "zstd": "ZSTD", "webp": "WEBP"}
EIGHT_BITS_ONLY = {"webp"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("form", FORMS)
def test_same_pixels_same_tensor(form, dtype, tmp_path):
    if form in EIGHT_BITS_ONLY and dtype != "uint8":
        pytest.skip(f"{form} holds 8 bits only")
    with rasterio.Env() as env:
        if form in DRIVERS and DRIVERS[form] not in env.drivers():
            pytest.skip(f"this GDAL was built without the driver {DRIVERS[form]}")
    values = pixels(dtype)
    with Raster.open(write(tmp_path / "reference.tif", values)) as raster:
        expected = raster.read()
    (tmp_path / "form").mkdir()
    try:
        source = FORMS[form](tmp_path / "form", values)
    except rasterio.errors.RasterioError as error:
        if form in COMPRESSIONS and "COMPRESS" in str(error).upper():
            pytest.skip(f"this GDAL was built without the compression {COMPRESSIONS[form]}")
        raise
    window = (COLLAR, COLLAR, values.shape[2], values.shape[1]) if form in ("nodata collar", "mask band") else None
    with Raster.open(source) as raster:
        found = raster.read(window)
    tensors = [PROCESSOR(view.image, return_tensors="pt")["pixel_values"] for view in (found, expected)]
    assert tensors[0].equal(tensors[1])
    assert found.record.stretch == expected.record.stretch
    assert found.record.nodata_share == 0.0
    assert found.record.names == NAMES
    assert found.record.transform == pytest.approx(expected.record.transform)
    if form not in ("png with world file", "plain data array"):  # which state no CRS
        assert found.record.crs == CRS


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_reference_is_the_array_itself(dtype, tmp_path):
    """The image of the reference, by numpy alone."""
    values = pixels(dtype)
    with Raster.open(write(tmp_path / "reference.tif", values)) as raster:
        image = np.asarray(raster.read().image).transpose(2, 0, 1)
    if dtype == "uint8":
        assert np.array_equal(image, values)
        return
    low, high = np.percentile(values, (2, 98), axis=(1, 2))[:, :, None, None]
    assert np.abs(image - 255 * np.clip((values - low) / (high - low), 0, 1)).max() <= 0.51


@pytest.mark.parametrize("form", ["nodata collar", "mask band"])
def test_collar_is_grey_and_counted(form, tmp_path):
    values = pixels("uint16")
    with Raster.open(FORMS[form](tmp_path, values)) as raster:
        view, red = raster.read(), raster.read(fill=(255, 0, 0))
    inner = np.pad(np.ones(values.shape[1:], bool), COLLAR)
    assert np.array_equal(view.valid, inner)
    assert (np.asarray(view.image)[~inner] == 127).all()
    assert (np.asarray(red.image)[~inner] == (255, 0, 0)).all()
    assert np.array_equal(np.asarray(red.image)[inner], np.asarray(view.image)[inner])
    assert view.record.nodata_share == pytest.approx(1 - inner.mean())
