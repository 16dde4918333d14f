"""Rasters that cannot be shown: how each is made in a folder, and what the message says."""

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint
from tiny_rasters import NORTH_UP, pixels, unnamed, write


def truncated(folder):
    path = folder / "cut.tif"
    write(path, pixels(height=400, width=400))
    path.write_bytes(path.read_bytes()[:100_000])
    return str(path)


def truncated_cog(folder):
    """Its header is whole, its pixels are not."""
    source, path = write(folder / "source.tif", pixels(height=700, width=700)), folder / "cut_cog.tif"
    rasterio.shutil.copy(source, path, driver="COG")
    path.write_bytes(path.read_bytes()[:400_000])
    return str(path)


def empty(folder):
    (folder / "empty.tif").touch()
    return str(folder / "empty.tif")


def text(folder):
    (folder / "text.tif").write_text("no raster")
    return str(folder / "text.tif")


def gcps_without_crs(folder):
    points = [GroundControlPoint(row, column, column, -row) for row in (0, 61) for column in (0, 90)]
    return write(folder / "gcps.tif", pixels(), transform=None, crs=rasterio.crs.CRS(), gcps=points)


def subdatasets(folder):
    profile = {"driver": "GPKG", "width": 90, "height": 61, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    for table, append in (("first", "NO"), ("second", "YES")):
        options = {"RASTER_TABLE": table, "APPEND_SUBDATASET": append}
        with rasterio.open(folder / "two.gpkg", "w", **profile, **options, transform=NORTH_UP) as dataset:
            dataset.write(pixels())
    return str(folder / "two.gpkg")


BAD = {
    "truncated": (truncated, "cut.tif"),
    "truncated cog": (truncated_cog, "it may be damaged or cut short"),
    "empty": (empty, "the file is empty"),
    "text": (text, "not recognized as being in a supported file format"),
    "missing": (lambda folder: str(folder / "lost.tif"), "No such file"),
    "directory": (str, "is a folder that GDAL opens as no raster"),
    "unreachable address": (
        lambda folder: "http://127.0.0.1:9/scene.tif",
        "cannot open raster 'http://127.0.0.1:9/scene.tif'",
    ),
    "complex": (
        lambda folder: write(folder / "c.tif", pixels("uint16", bands=1).astype("complex64"), colours=None),
        "complex samples. Open their amplitude as DERIVED_SUBDATASET:AMPLITUDE:",
    ),
    "all nodata": (lambda folder: write(folder / "n.tif", np.zeros((3, 9, 9), "uint16"), nodata=0), "has no valid pixel"),
    "four unnamed bands": (lambda folder: unnamed(folder / "four.tif", pixels(bands=4)), "--bands"),
    "ground control points without crs": (gcps_without_crs, "4 ground control points that name no CRS"),
    "subdatasets": (subdatasets, "holds 2 subdatasets and no bands of its own. Open one of them: GPKG:"),
}
