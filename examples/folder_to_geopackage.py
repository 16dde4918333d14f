"""Finds objects in every raster of a folder and writes their boxes as one layer of a GeoPackage.

    python examples/folder_to_geopackage.py [FOLDER OBJECT OUTPUT [MODEL]]

The command line does the same: mfrsvlm detect FOLDER --object OBJECT --model MODEL --output OUTPUT
Without arguments, it makes two COGs of the demo's scene in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import geopandas
import rasterio.shutil

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.geospatial import GeoAssistant, combine_layers, write_layer


def make_demo(folder: Path) -> str:
    """The scene of the demo as two COGs of half a metre a pixel, side by side."""
    for name, left in (("west", 500_000), ("east", 500_256)):
        place = f"a_srs=EPSG:32631&a_ullr={left},4000256,{left + 256},4000000"
        rasterio.shutil.copy(f"vrt://{SCENE}?{place}", folder / f"{name}.tif", driver="COG")
    return str(folder)


def main(folder: str, name: str, output: str, model: str = MODEL) -> geopandas.GeoDataFrame:
    assistant = GeoAssistant.from_pretrained(model)
    layers = []
    for path in sorted(Path(folder).glob("*.tif")):
        boxes = assistant.detect(str(path), name)
        boxes.insert(0, "source", path.name)
        layers.append(boxes)
    layer = combine_layers(layers)
    write_layer(layer, output)
    print(layer[["source", "object", "score"]].join(layer.geometry.bounds).to_string(index=False))
    return layer


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        folder = Path(tempfile.mkdtemp())
        main(make_demo(folder), "building", str(folder / "buildings.gpkg"))
        print(f"written to {folder / 'buildings.gpkg'}")
