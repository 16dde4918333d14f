"""Asks about a STAC item, whose bands are files of their own.

    python examples/ask_stac_item.py [ITEM QUESTION [MODEL]]

ITEM is the JSON file of the item. Bands are found by their common names, and become reflectance by the scale and offset that
the item states. Without arguments, it makes an item of the demo's scene in a temporary folder, stored as Sentinel-2 is.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import geopandas
import rasterio.shutil

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.geospatial import GeoAssistant, Raster


def make_demo(folder: Path) -> str:
    """An item with one COG of 16 bits a band. Black is stored as 1000, reflectance 0, and white as 4000, reflectance 0.3."""
    assets = {}
    for number, name in enumerate(("red", "green", "blue"), start=1):
        place = "a_srs=EPSG:32631&a_ullr=500000,4000256,500256,4000000"
        stored = f"vrt://{SCENE}?bands={number}&ot=UInt16&scale=0,255,1000,4000&{place}"
        rasterio.shutil.copy(stored, folder / f"{name}.tif", driver="COG")
        assets[name] = {
            "href": f"{name}.tif",
            "roles": ["data"],
            "eo:bands": [{"common_name": name}],
            "raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}],
        }
    item = {"type": "Feature", "stac_version": "1.0.0", "id": "demo", "assets": assets}
    (folder / "item.json").write_text(json.dumps(item))
    return str(folder / "item.json")


def read_item(path: str) -> dict[str, Any]:
    """The item, whose files are looked for beside it. pystac does the same with `make_asset_hrefs_absolute`."""
    item = json.loads(Path(path).read_text())
    for asset in item["assets"].values():
        if "://" not in asset["href"]:
            asset["href"] = str(Path(path).parent / asset["href"])
    return item


def main(path: str, question: str, model: str = MODEL) -> geopandas.GeoDataFrame:
    with Raster.open(read_item(path), stretch="physical") as raster:
        print(", ".join(raster.selection.names), raster.stretch)
        answers = GeoAssistant.from_pretrained(model).query(raster, question)
    print(answers["answer"].iloc[0])
    return answers


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        main(make_demo(Path(tempfile.mkdtemp())), "How many aircraft are there?")
