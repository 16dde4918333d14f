"""Real rasters of several sensors."""

import numpy as np
import pytest
import rasterio
from external_data import external_data

from mfrsvlm.geospatial import Raster, RasterError, RasterWarning


def read(name, **options):
    with Raster.open(external_data(name), **options) as raster:
        return raster.read()


def test_landsat_mosaic_leaves_its_collar_out():
    with pytest.warns(RasterWarning, match="3 bands"):
        view = read("images/rt_mosaic_cog1.tif")
    with rasterio.open(external_data("images/rt_mosaic_cog1.tif")) as dataset:
        values, valid = dataset.read(), dataset.dataset_mask() > 0
    assert view.record.nodata_share == pytest.approx(1 - valid.mean()) and 0.3 < view.record.nodata_share < 0.35
    assert view.record.stretch.low == tuple(np.percentile(plane[plane > 0], 2) for plane in values)


@pytest.mark.parametrize("name", ["images/og_naip_2020.tif", "images/og_landsat_2020.tif"])
def test_naip_and_landsat_cannot_be_told_apart(name):
    with pytest.raises(RasterError, match=r"4 bands \(unnamed\)"):
        read(name)


def test_the_right_names_give_the_right_bands():
    with rasterio.open(external_data("images/og_naip_2020.tif")) as dataset:
        values = dataset.read()
    assert np.array_equal(np.asarray(read("images/og_naip_2020.tif", sensor="naip").image), values[:3].transpose(1, 2, 0))
    view = read("images/og_naip_2020.tif", sensor="naip", composite="false_color")
    assert np.array_equal(np.asarray(view.image), values[[3, 0, 1]].transpose(1, 2, 0))
    landsat = read("images/og_landsat_2020.tif", bands="3,4,2")
    with rasterio.open(external_data("images/og_landsat_2020.tif")) as dataset:
        assert np.array_equal(np.asarray(landsat.image), dataset.read([3, 4, 2]).transpose(1, 2, 0))


def test_eight_bit_colours_are_shown_as_they_are():
    view = read("images/rt_colorado.tif")
    with rasterio.open(external_data("images/rt_colorado.tif")) as dataset:
        assert np.array_equal(np.asarray(view.image), dataset.read().transpose(1, 2, 0))
    assert view.record.resolution == pytest.approx((0.15, 0.15), rel=0.01)


@pytest.mark.parametrize("polarisation", ["hh", "hv", "vh", "vv"])
def test_radar(polarisation):
    name = f"real/sensors/spacenet6_sar_{polarisation}.tif"
    with pytest.raises(RasterError, match="complex samples"):
        read(name)
    with Raster.open(f"DERIVED_SUBDATASET:INTENSITY:{external_data(name)}", composite="sar") as raster:
        view = raster.read()
    assert view.record.stretch.unit == "dB" and 60 < np.asarray(view.image).mean() < 200


def test_panchromatic_and_multispectral():
    assert read("real/sensors/spacenet6_pan1.tif").record.bands_from == "the only band"
    view = read("real/sensors/spacenet6_ms1.tif", sensor="planetscope", composite="ndvi")
    assert 0 < np.asarray(view.image).std() and view.record.names == ("nir", "red")
