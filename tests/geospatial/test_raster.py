"""Reading: overviews and windows, what is no data, scales, several files, and what is rejected."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.env import get_gdal_config
from rasterio.transform import Affine
from tiny_rasters import NORTH_UP, data_array, pixels, unnamed, write

from mfrsvlm.geospatial import Raster, RasterError, RasterWarning
from mfrsvlm.geospatial.errors import NoValidPixelError
from mfrsvlm.geospatial.raster import gdal, is_georeferenced


def read(source, window=None, max_side=2048, **options):
    with Raster.open(source, **options) as raster:
        return raster.read(window, max_side)


def test_reduced_read_is_pillows_bicubic(tmp_path):
    values = pixels(height=240, width=320)
    view = read(write(tmp_path / "scene.tif", values), max_side=80)
    expected = Image.fromarray(values.transpose(1, 2, 0)).resize((80, 60), Image.Resampling.BICUBIC)
    assert view.image.size == (80, 60)
    assert np.abs(np.asarray(view.image).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert view.record.resolution == (8.0, 8.0) and view.record.unit == "metre"


@pytest.mark.parametrize("overviews", [[], [2, 4]])
def test_reduced_read_of_a_window_is_rasterios_cubic(overviews, tmp_path):
    path = write(tmp_path / "scene.tif", pixels("uint16", height=300, width=400))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews(overviews)
    view = read(path, (40, 20, 320, 240), max_side=80, stretch="0,4000")
    with rasterio.open(path) as dataset:
        window = rasterio.windows.Window(40, 20, 320, 240)
        stored = dataset.read(out_shape=(3, 60, 80), window=window, resampling=rasterio.enums.Resampling.cubic)
    expected = 255 * np.clip(stored / 4000, 0, 1)
    assert np.abs(np.asarray(view.image).transpose(2, 0, 1) - expected).max() <= 1


def test_enlarged_read_is_cubic(tmp_path):
    values = pixels(height=60, width=80)
    path = write(tmp_path / "scene.tif", values)
    with Raster.open(path) as raster, rasterio.open(path) as dataset:
        view = raster.read((10, 20, 40, 30), size=(100, 45))
        window = rasterio.windows.Window(10, 20, 40, 30)
        expected = dataset.read(out_shape=(3, 45, 100), window=window, resampling=rasterio.enums.Resampling.cubic)
    assert np.abs(np.asarray(view.image).transpose(2, 0, 1).astype(int) - expected).max() <= 1
    assert view.record.size == (100, 45) and view.record.resolution == pytest.approx((0.8, 4 / 3))


def test_thin_line_survives_a_reduced_read(tmp_path):
    values = np.ones((3, 400, 400), np.uint8)
    values[:, :, 201] = 255
    assert np.asarray(read(write(tmp_path / "line.tif", values), max_side=50).image).max() > 20


def test_stretch_is_that_of_the_scene_in_every_window(tmp_path):
    path = write(tmp_path / "scene.tif", pixels("uint16"))
    with Raster.open(path) as raster:
        whole = raster.read()
        part = raster.read((10, 20, 30, 25))
    assert part.record.stretch == whole.record.stretch
    assert np.array_equal(np.asarray(part.image), np.asarray(whole.image)[20:45, 10:40])
    assert part.record.window == (10, 20, 30, 25)
    # Corner of the window in the CRS, by rasterio.
    with rasterio.open(path) as dataset:
        assert part.record.transform == pytest.approx(tuple(dataset.window_transform(((20, 45), (10, 40))))[:6])


@pytest.mark.parametrize("window", [(-1, 0, 5, 5), (0, 0, 91, 5), (0, 60, 5, 2), (0, 0, 0, 5)])
def test_window_outside_is_rejected(window, tmp_path):
    with pytest.raises(RasterError, match="leaves its 90 x 61 pixels"):
        read(write(tmp_path / "scene.tif", pixels()), window)


def test_statistics_leave_out_nan(tmp_path):
    values = pixels("uint16", height=300, width=400).astype("float32")
    holes = np.random.default_rng(1).random(values.shape[1:]) < 0.02
    values[:, holes] = np.nan
    path = write(tmp_path / "scene.tif", values, compress="deflate")
    view = read(path)
    assert view.record.stretch.low == pytest.approx(np.nanpercentile(values, 2, axis=(1, 2)))
    assert view.record.stretch.high == pytest.approx(np.nanpercentile(values, 98, axis=(1, 2)))
    assert np.array_equal(view.valid, ~holes) and view.record.nodata_share == pytest.approx(holes.mean())
    # A NaN among the 64 pixels below one does not blacken it.
    assert read(path, max_side=50).record.nodata_share == 0.0


def test_nodata_given_against_the_file(tmp_path):
    values = pixels("uint16")
    values[:, :20] = 65535
    path = write(tmp_path / "scene.tif", values)
    view = read(path, nodata=65535)
    assert view.record.stretch.high == pytest.approx(np.percentile(values[:, 20:], 98, axis=(1, 2)))
    assert view.record.nodata_share == pytest.approx(20 / 61)
    assert read(path).record.stretch.high == (65535, 65535, 65535)
    with rasterio.open(path) as dataset:
        assert read(dataset, nodata=65535).record.stretch == view.record.stretch
        assert not dataset.closed


def test_dark_pixel_of_one_band_is_data(tmp_path):
    values = pixels()
    values[2, 5, 5] = 0
    view = read(write(tmp_path / "scene.tif", values, nodata=0))
    assert view.valid.all() and np.array_equal(np.asarray(view.image)[5, 5], values[:, 5, 5])


def test_transparent_pixels_are_no_data(tmp_path):
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    values = np.concatenate([pixels("uint16"), np.full((1, 61, 90), 65535, np.uint16)])
    values[3, :, :30] = 0
    view = read(write(tmp_path / "scene.tif", values, colours=colours))
    assert view.record.nodata_share == pytest.approx(1 / 3)
    assert view.record.stretch.low == pytest.approx(np.percentile(values[:3, :, 30:], 2, axis=(1, 2)))


def test_palette_is_looked_up(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)[None]
    path = tmp_path / "palette.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=2, height=2, count=1, dtype="uint8", photometric="palette"
    ) as dataset:
        dataset.write(indices)
        dataset.write_colormap(1, {0: (10, 20, 30), 1: (200, 100, 0), 2: (0, 0, 255)})
    assert np.asarray(read(str(path)).image).tolist() == [[[10, 20, 30], [200, 100, 0]], [[0, 0, 255], [200, 100, 0]]]


@pytest.mark.parametrize(
    "transform",
    [Affine.translation(5e5, 4e6) @ Affine.rotation(30) @ Affine.scale(2, -3), Affine(2, 0.5, 5e5, 0.1, -2, 4e6)],
)
def test_rotated_and_sheared_rasters_keep_their_transform(transform, tmp_path):
    view = read(write(tmp_path / "scene.tif", pixels(height=60), transform=transform), (30, 20, 60, 40), max_side=30)
    corner = transform @ (60, 20 + 40 / 3)
    assert Affine(*view.record.transform) @ (15, 20 / 3) == pytest.approx(corner)


def test_files_of_different_resolution_are_laid_over_each_other(tmp_path):
    """A slope sampled at 2 m and at 4 m is the same slope."""

    def slope(step):
        x, y = np.meshgrid(*[np.arange(0, 160, step) + step / 2] * 2)
        return (1000 + 10 * x + 5 * y)[None].astype(np.uint16)

    files = {"red": slope(2), "green": slope(4), "blue": slope(2)}
    for name, values in files.items():
        transform = NORTH_UP @ Affine.scale(80 / values.shape[1])
        files[name] = write(tmp_path / f"{name}.tif", values, colours=None, transform=transform)
    image = np.asarray(read(files, stretch="1000,3400").image).astype(int)
    assert image.shape == (80, 80, 3)
    assert np.abs(image[3:-3, 3:-3, 0] - image[3:-3, 3:-3, 1]).max() <= 1
    assert np.array_equal(image[..., 0], image[..., 2])


def test_band_that_covers_a_part_leaves_the_rest_out_of_its_statistics(tmp_path):
    red = pixels("uint16", bands=1, height=80, width=80) + np.uint16(100)
    files = {name: write(tmp_path / f"{name}.tif", red, colours=None) for name in ("red", "green")}
    files["blue"] = write(
        tmp_path / "blue.tif", red[:, :, 40:], colours=None, transform=NORTH_UP @ Affine.translation(40, 0)
    )
    view = read(files)
    assert view.record.stretch.low[2] == pytest.approx(np.percentile(red[:, :, 40:], 2), rel=0.01)


def test_files_of_different_size_need_a_crs(tmp_path):
    files = {
        "red": write(tmp_path / "a.tif", pixels(bands=1), colours=None, crs=None, transform=None),
        "green": write(tmp_path / "b.tif", pixels(bands=1, width=45), colours=None, crs=None, transform=None),
        "blue": str(tmp_path / "a.tif"),
    }
    with pytest.raises(RasterError, match="45 x 61 and 90 x 61 pixels cannot be laid over each other"):
        read(files)


def item(folder, values, scale, offset, version=1):
    """A STAC item with one asset per band, a thumbnail and a true-colour picture."""
    assets = {"thumbnail": {"href": "https://nowhere.invalid/thumbnail.png", "roles": ["thumbnail"]}}
    picture = [{"name": f"B0{number}", "common_name": name} for number, name in ((4, "red"), (3, "green"), (2, "blue"))]
    assets["visual"] = {"href": "https://nowhere.invalid/visual.tif", "eo:bands": picture}
    for band, plane in zip(picture, values, strict=True):
        href = write(folder / f"{band['name']}.tif", plane[None], colours=None)
        if version == 1:
            about = {"eo:bands": [band], "raster:bands": [{"scale": scale, "offset": offset, "nodata": 0}]}
        else:
            about = {"bands": [{"name": band["name"], "eo:common_name": band["common_name"]}], "nodata": 0}
            about |= {"raster:scale": scale, "raster:offset": offset}
        assets[band["common_name"]] = {"href": href, "roles": ["data"], **about}
    return {"type": "Feature", "id": "S2A_31UFU", "assets": assets}


@pytest.mark.parametrize("version", [1, 1.1])
def test_stac_item(version, tmp_path):
    values = pixels("uint16")
    found = read(item(tmp_path, values, 1e-4, 0.0, version), stretch="physical")
    stored = read(write(tmp_path / "x.tif", values), stretch="0,3000")
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(stored.image)).max() <= 1
    assert found.record.names == ("red", "green", "blue") and found.record.stretch.unit == "reflectance"


def test_two_processing_baselines_look_the_same(tmp_path):
    """From baseline 04.00 on, Sentinel-2 stores 1000 more."""
    old, new = tmp_path / "S2A_MSIL2A_20210831T1_N0301_R022.tif", tmp_path / "S2A_MSIL2A_20220831T1_N0400_R022.tif"
    values = pixels("uint16", bands=12)
    views = [
        read(unnamed(path, values + np.uint16(more)), stretch="physical", composite=composite)
        for composite in ("true_color", "false_color")
        for path, more in ((old, 0), (new, 1000))
    ]
    assert np.abs(np.asarray(views[0].image).astype(int) - np.asarray(views[1].image).astype(int)).max() <= 1
    indices = [read(str(path), composite="ndvi") for path in (old, new)]
    assert np.abs(np.asarray(indices[0].image).astype(int) - np.asarray(indices[1].image).astype(int)).max() <= 1


def test_reflectance_that_nothing_states_is_rejected(tmp_path):
    path = unnamed(tmp_path / "scene.tif", pixels("uint16", bands=12))
    with pytest.raises(RasterError, match=r"nothing says how .* --stretch 0,3000; .* needs 1000,4000"):
        read(path, sensor="sentinel-2", stretch="physical")
    with pytest.warns(RasterWarning, match="ndvi is made of them as stored"):
        read(path, sensor="sentinel-2", composite="ndvi")


def test_stretch_of_one_raster_for_another(tmp_path):
    first, second = (pixels("uint16", seed=seed) for seed in (1, 2))
    before = read(write(tmp_path / "before.tif", first))
    after = read(write(tmp_path / "after.tif", second), stretch=before.record.stretch)
    assert after.record.stretch == before.record.stretch
    with pytest.raises(RasterError, match="the stretch is for 3 channels in stored, the picture has 1 in index"):
        read(str(tmp_path / "after.tif"), bands="1,2", composite="ndvi", stretch=before.record.stretch)


def test_normalised_difference(tmp_path):
    values = pixels("uint16", bands=4)
    view = read(unnamed(tmp_path / "scene.tif", values), sensor="naip", composite="ndwi")
    green, infrared = values[1].astype(float), values[3].astype(float)
    expected = np.rint(255 * ((green - infrared) / (green + infrared) + 1) / 2)
    assert np.abs(np.asarray(view.image).astype(int) - expected[..., None]).max() <= 1
    assert view.record.stretch.unit == "index" and (view.record.stretch.low, view.record.stretch.high) == ((-1,), (1,))


def test_backscatter_in_decibels(tmp_path):
    power = np.random.default_rng(0).gamma(4, 0.02, (1, 61, 90)).astype(np.float32)
    power[0, 0, :5] = 0
    view = read(write(tmp_path / "sar.tif", power, colours=None), composite="sar", stretch="-25,0")
    with np.errstate(divide="ignore"):
        expected = 255 * np.clip((10 * np.log10(power[0].astype(float)) + 25) / 25, 0, 1)
    assert np.abs(np.asarray(view.image)[..., 0] - expected).max() <= 0.51
    amplitude = read(write(tmp_path / "amplitude.tif", np.sqrt(power), colours=None), composite="sar")
    same = read(str(tmp_path / "sar.tif"), composite="sar")
    assert np.abs(np.asarray(amplitude.image).astype(int) - np.asarray(same.image)).max() <= 1


def test_three_unnamed_bands_are_reported(tmp_path):
    path = unnamed(tmp_path / "scene.tif", pixels())
    with pytest.warns(RasterWarning, match="does not say what its 3 bands are"):
        view = read(path)
    assert "taken as red, green and blue" in view.record.notes[0]


def test_large_raster_without_overviews_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("mfrsvlm.geospatial.raster.MANY_PIXELS", 1000)
    path = write(tmp_path / "scene.tif", pixels(height=200, width=200))
    with pytest.warns(RasterWarning, match="gdaladdo"):
        read(path, max_side=50)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RasterWarning)
        read(path, max_side=50)


def test_statistics_of_a_large_raster_come_from_patches(tmp_path, monkeypatch):
    monkeypatch.setattr("mfrsvlm.geospatial.raster.SAMPLE_SIDE", 100)
    values = pixels("uint16", height=1500, width=1100)
    low = read(write(tmp_path / "scene.tif", values, tiled=True), max_side=64).record.stretch.low
    assert low == pytest.approx(np.percentile(values, 2, axis=(1, 2)), rel=0.1)


def test_gdal_options_of_the_user_stay(monkeypatch):
    with rasterio.Env(GDAL_CACHEMAX=99), gdal():
        assert get_gdal_config("GDAL_CACHEMAX") == 99 and get_gdal_config("GDAL_HTTP_TIMEOUT") == 60
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "3")
    with gdal():
        assert str(get_gdal_config("GDAL_HTTP_TIMEOUT")) == "3"


def test_no_valid_pixel(tmp_path):
    for dtype in ("uint8", "uint16", "float32"):
        values = np.zeros((3, 20, 20), dtype)
        with pytest.raises(NoValidPixelError, match="has no valid pixel"):
            read(write(tmp_path / f"{dtype}.tif", values, nodata=0))
    values[:, :10] = pixels("uint8", height=10, width=20)
    with Raster.open(write(tmp_path / "half.tif", values, nodata=0)) as raster:
        assert raster.read().record.nodata_share == 0.5
        with pytest.raises(NoValidPixelError, match=r"in window \(0, 10, 20, 10\)"):
            raster.read((0, 10, 20, 10))


def test_ground_control_points(tmp_path):
    points = [GroundControlPoint(row, column, 5e5 + column, 4e6 - row) for row in (0, 61) for column in (0, 90)]
    path = write(tmp_path / "placed.tif", pixels(), transform=None, gcps=points, crs="EPSG:32631")
    record = read(path).record
    assert (record.georeferencing, record.crs, record.transform) == ("gcps", "EPSG:32631", None)
    assert is_georeferenced(path)
    plain = write(tmp_path / "plain.tif", pixels(), transform=None, crs=None)
    assert read(plain).record.georeferencing == "none" and not is_georeferenced(plain)


def test_data_array_without_names_or_with_nan():
    values = pixels("uint16").astype("float32")
    values[:, :10] = np.nan
    with pytest.warns(RasterWarning, match="3 bands"):
        view = read(data_array(values))
    assert view.record.nodata_share == pytest.approx(10 / 61)
    with pytest.raises(RasterError, match="is no raster"):
        read(SimpleNamespace(values=np.zeros(5), dims=("x",)))


@pytest.mark.parametrize("source", [None, 7, object()])
def test_no_raster_at_all(source):
    with pytest.raises(TypeError, match="expected a path"):
        Raster.open(source)


def test_record_is_json(tmp_path):
    record = read(write(tmp_path / "scene.tif", pixels("uint16"))).record
    found = json.loads(json.dumps(record.as_dict()))
    assert found["stretch"]["kind"] == "percentile:2,98" and found["size"] == [90, 61] and found["bands"] == [1, 2, 3]


@pytest.mark.integration
@pytest.mark.parametrize("overviews", [True, False])
def test_memory_of_a_large_read(overviews, tmp_path):
    """12,000 x 12,000 x 3 of 16 bits are 864 MB."""
    path, side = tmp_path / "large.tif", 12_000
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint16", "photometric": "RGB"}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd", "SPARSE_OK": True}
    with rasterio.open(path, "w", **profile) as dataset:  # most tiles are left out, so it is written fast
        for corner in range(0, side - 512, 1024):
            dataset.write(pixels("uint16", height=512, width=512), window=((corner, corner + 512), (corner, corner + 512)))
        if overviews:
            dataset.build_overviews([4, 8])
    code = (
        "import sys\nfrom mfrsvlm.geospatial import Raster\nRaster.open(sys.argv[1]).read()\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[1]) < 300 * 1024
    assert ("gdaladdo" in result.stderr) is not overviews


@pytest.mark.parametrize("cut", [5, 12, 13, 20, 7000])
def test_a_truncated_png_is_rejected(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDAL reads it without an error, with random pixels."""
    monkeypatch.chdir(tmp_path)  # a long name would be shortened in the message
    path = Path(write(Path("photo.png"), pixels(), driver="PNG"))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RasterError, match=r"photo\.png.*(truncated|damaged)"):
        Raster.open(str(path))


def test_a_damaged_png_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a long name would be shortened in the message
    path = Path(write(Path("photo.png"), pixels(), driver="PNG"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RasterError, match=r"photo\.png.*the part b'IDAT' of the PNG is damaged"):
        Raster.open(str(path))
