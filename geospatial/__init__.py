"""Rasters in: whatever GDAL opens becomes an image for the model, with a record of how it was made.

from mfrsvlm.geospatial import Raster

with Raster.open("scene.tif", sensor="sentinel-2") as raster:
    view = raster.read()
view.image   # RGB, for the processor
view.record  # bands, stretch, share of pixels without data, CRS, transform

Answers out, on the map:

from mfrsvlm.geospatial import GeoAssistant, write_layer

ships = GeoAssistant.from_pretrained(model).detect("scene.tif", "ship")
write_layer(ships, "ships.gpkg")
"""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .assistant import GeoAssistant, open_views
    from .composites import compose
    from .errors import RasterError, RasterWarning
    from .raster import Raster
    from .vectors import combine_layers, read_record, write_layer
    from .view import ReadRecord, View

__all__ = [
    "GeoAssistant",
    "Raster",
    "RasterError",
    "RasterWarning",
    "ReadRecord",
    "View",
    "combine_layers",
    "compose",
    "open_views",
    "read_record",
    "write_layer",
]

# Imported when first used: the package installs without rasterio.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "GeoAssistant": "assistant",
        "Raster": "raster",
        "RasterError": "errors",
        "RasterWarning": "errors",
        "ReadRecord": "view",
        "View": "view",
        "combine_layers": "vectors",
        "compose": "composites",
        "open_views": "assistant",
        "read_record": "vectors",
        "write_layer": "vectors",
    },
)
