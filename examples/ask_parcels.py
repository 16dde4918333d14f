"""Asks about every parcel of a layer and writes the answers as columns of a copy of it.

    python examples/ask_parcels.py [RASTER PARCELS QUESTION OUTPUT [MODEL]]

Without arguments, it makes a GeoTIFF of the demo's scene and four parcels in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import shapely
from PIL import Image

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.geospatial import GeoAssistant, write_layer


def make_demo(folder: Path) -> tuple[str, str]:
    """The scene of the demo as a GeoTIFF of half a metre a pixel, and a layer of its four quarters."""
    scene = np.asarray(Image.open(SCENE).convert("RGB")).transpose(2, 0, 1)
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
    profile = {"driver": "GTiff", "count": 3, "height": 512, "width": 512, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(folder / "scene.tif", "w", crs="EPSG:32631", transform=transform, **profile) as dataset:
        dataset.write(scene)
    corners = [(500_000 + x, 4_000_000 - y) for y in (128, 256) for x in (0, 128)]
    parcels = geopandas.GeoDataFrame(
        {"parcel": list("ABCD")}, geometry=[shapely.box(x, y, x + 128, y + 128) for x, y in corners], crs="EPSG:32631"
    )
    parcels.to_file(folder / "parcels.gpkg")
    return str(folder / "scene.tif"), str(folder / "parcels.gpkg")


def main(raster: str, parcels: str, question: str, output: str, model: str = MODEL) -> geopandas.GeoDataFrame:
    layer = GeoAssistant.from_pretrained(model).query(raster, question, features=parcels)
    write_layer(layer, output)
    print(layer.drop(columns="geometry").to_string(index=False))
    return layer


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        folder = Path(tempfile.mkdtemp())
        main(*make_demo(folder), "How many aircraft are there?", str(folder / "answers.gpkg"))
        print(f"written to {folder / 'answers.gpkg'}")
