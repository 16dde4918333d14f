"""Areas of interest and layers of polygons, laid over the pixels of a raster."""

import os
from collections.abc import Sequence
from typing import Any

import geopandas
import numpy as np
import pyogrio
import rasterio.features
import shapely
from affine import Affine

from ..files.reading import shorten
from .errors import NoOverlapError, RasterError
from .grid import Grid
from .sources import reason
from .tiles import Window


POLYGONS = ("Polygon", "MultiPolygon")


def read_layer(layer: Any, what: str) -> geopandas.GeoDataFrame:
    """A layer of polygons with a CRS.

    Args:
        layer: file that GDAL opens, or GeoDataFrame.
        what: its name in messages.

    Raises:
        RasterError: it cannot be read, is empty, names no CRS or holds other shapes. The message is one line.
    """
    if isinstance(layer, (str, os.PathLike)):
        shown = f"{what} {shorten(os.fspath(layer))}"
        try:
            layer = geopandas.read_file(layer, engine="pyogrio")
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, ValueError) as error:
            raise RasterError(f"{shown} cannot be read: {reason(error)}.") from error
    else:
        shown = what
    if not isinstance(layer, (geopandas.GeoDataFrame, geopandas.GeoSeries)):
        raise RasterError(f"{shown} is a {type(layer).__name__} without geometries: pass a layer of polygons.")
    if isinstance(layer, geopandas.GeoSeries):
        layer = layer.to_frame("geometry")
    if not len(layer):
        raise RasterError(f"{shown} holds no features.")
    if layer.crs is None:
        raise RasterError(f"{shown} names no CRS, so its place is unknown. Add it: ogr2ogr -a_srs EPSG:... OUT.gpkg FILE.")
    others = sorted({str(kind) for kind in layer.geom_type.dropna() if kind not in POLYGONS})
    if others:
        raise RasterError(f"{shown} holds {', '.join(others)}: pass polygons, such as buffers of them.")
    return layer


def to_pixels(shapes: geopandas.GeoSeries, grid: Grid) -> list[Any]:
    """Polygons in pixels of the raster; an empty one where there is no shape, or none that the CRS can hold."""
    placed = shapes if grid.map_crs is None else shapes.to_crs(grid.map_crs.to_wkt())
    moved = [shape if shape is None else shapely.transform(shape, grid.to_pixels) for shape in placed]
    whole = [shape is not None and bool(np.isfinite(shapely.get_coordinates(shape)).all()) for shape in moved]
    return [
        shapely.make_valid(shape) if is_whole else shapely.Polygon() for shape, is_whole in zip(moved, whole, strict=True)
    ]


def read_area(area: Any, grid: Grid, name: str) -> Any:
    """An area of interest as one shape in pixels of the raster.

    Args:
        area: (left, bottom, right, top) in the CRS of the raster, as numbers or with commas; a shapely geometry in that CRS;
            a file of polygons or a GeoDataFrame.
        grid: of the raster.
        name: of the raster, for messages.

    Raises:
        RasterError: it cannot be read, or shares no pixel with the raster.
    """
    if grid.map_crs is None:
        raise RasterError(f"{name} has no CRS, so an area cannot be laid over it.")
    numbers = _numbers(area)
    if numbers is not None:
        left, bottom, right, top = numbers
        if not (left < right and bottom < top):
            raise RasterError(f"area {shorten(area)} must be left, bottom, right, top in the CRS of the raster.")
        area = shapely.box(left, bottom, right, top)
    if isinstance(area, shapely.Geometry):
        shapes = geopandas.GeoSeries([area], crs=grid.map_crs.to_wkt())
    else:
        shapes = read_layer(area, "area").geometry
    shape = shapely.unary_union(to_pixels(shapes, grid))
    shape = shapely.intersection(shape, shapely.box(0, 0, grid.width, grid.height))
    if not shapely.area(shape):
        raise NoOverlapError(f"the area and {name} do not overlap.")
    return shape


def _numbers(area: Any) -> tuple[float, ...] | None:
    parts: Sequence[Any] = area.split(",") if isinstance(area, str) else area if isinstance(area, (tuple, list)) else ()
    if len(parts) != 4:
        return None
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        return None


def window_of(shape: Any, grid: Grid) -> Window | None:
    """The smallest window around a shape in pixels, within the raster; `None` if they share no pixel."""
    shape = shapely.intersection(shape, shapely.box(0, 0, grid.width, grid.height))
    if shape.is_empty:
        return None
    left, top, right, bottom = shape.bounds
    # A corner that is a pixel's but for rounding takes no further pixel.
    left, top = int(np.floor(left + 1e-6)), int(np.floor(top + 1e-6))
    right, bottom = int(np.ceil(right - 1e-6)), int(np.ceil(bottom - 1e-6))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def inside(shape: Any, window: Window, size: tuple[int, int]) -> np.ndarray:
    """(height, width), bool: the pixels of an image of a window that lie in a shape, or touch it."""
    scale = Affine(window[2] / size[0], 0, window[0], 0, window[3] / size[1], window[1])
    return rasterio.features.geometry_mask([shape], out_shape=size[::-1], transform=scale, all_touched=True, invert=True)
