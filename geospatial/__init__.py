"""Rasters in: whatever GDAL opens becomes an image for the model, with a record of how it was made.

from mfrsvlm.geospatial import Raster

with Raster.open("scene.tif", sensor="sentinel-2") as raster:
    view = raster.read()
view.image   # RGB, for the processor
view.record  # bands, stretch, share of pixels without data, CRS, transform
"""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .errors import RasterError, RasterWarning
    from .raster import Raster
    from .view import ReadRecord, View

__all__ = ["Raster", "RasterError", "RasterWarning", "ReadRecord", "View"]

# Imported when first used: the package installs without rasterio.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {"Raster": "raster", "RasterError": "errors", "RasterWarning": "errors", "ReadRecord": "view", "View": "view"},
)
