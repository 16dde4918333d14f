"""Asks about every parcel of a layer and writes the answers as columns of a copy of it.

    python examples/ask_parcels.py [RASTER PARCELS QUESTION OUTPUT [MODEL]]

The command line does the same: mfrsvlm ask RASTER QUESTION --features PARCELS --model MODEL --output OUTPUT
Without arguments, it makes a GeoTIFF of the demo's scene and four parcels in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import geopandas
import rasterio.shutil
import shapely

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.geospatial import GeoAssistant, write_layer


def make_demo(folder: Path) -> tuple[str, str]:
    """The scene of the demo as a GeoTIFF of half a metre a pixel, and a layer of its four quarters."""
    place = "a_srs=EPSG:32631&a_ullr=500000,4000256,500256,4000000"
    rasterio.shutil.copy(f"vrt://{SCENE}?{place}", folder / "scene.tif", driver="GTiff")
    corners = [(500_000 + x, 4_000_000 + y) for y in (128, 0) for x in (0, 128)]
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
