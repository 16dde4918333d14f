"""The options of every command that reads a raster. Nothing here needs rasterio."""

import argparse
import sys
from typing import Any

from .composites import COMPOSITES
from .sensors import SENSORS


def add_raster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rasters")
    group.add_argument("--bands", metavar="R,G,B", help="numbers, from one, or names of three bands, or of one for grey")
    group.add_argument("--sensor", metavar="NAME", help=f"whose bands they are: {', '.join(SENSORS)}")
    group.add_argument("--composite", metavar="NAME", help=f"what to show (default: true_color): {', '.join(COMPOSITES)}")
    group.add_argument(
        "--stretch",
        metavar="KIND",
        help="auto, none, percentile[:LOW,HIGH], physical[:LOW,HIGH] or LOW,HIGH (default: auto, leaves 8 bits as they "
        "are and shows others from their 2nd to their 98th percentile)",
    )
    group.add_argument("--nodata", type=float, metavar="VALUE", help="value that stands for no data, against the file")


def add_map_options(parser: argparse.ArgumentParser, task: str) -> None:
    """What to look at, and what to write."""
    group = parser.add_argument_group("maps")
    if task not in ("detect", "count"):
        group.add_argument("--question", action="append", metavar="TEXT", help="may be repeated; each image is encoded once")
    if task in ("ask", "describe"):
        group.add_argument("--features", metavar="FILE", help="ask about each polygon of this layer, and write a copy of it")
    group.add_argument("--area", metavar="AREA", help="file of polygons, or LEFT,BOTTOM,RIGHT,TOP in the CRS of the raster")
    tile = "512" if task in ("detect", "count") else "the raster is one image"
    group.add_argument("--tile", type=int, metavar="PIXELS", help=f"size of the images (default: {tile})")
    if task == "detect":
        group.add_argument("--overlap", type=int, metavar="PIXELS", help="shared by images (default: an eighth of --tile)")
    if task == "count":
        group.add_argument("--no-spread", action="store_true", help="do not count again on shifted images, in half the time")
    group.add_argument(
        "--resolution", type=float, metavar="METRES", help="size of a pixel of the images (default: as stored)"
    )
    group.add_argument("--output", metavar="FILE", help="layer to write: .gpkg, .geojson, .csv or .parquet")
    group.add_argument("--preview", metavar="PATH", help="write a picture of what is looked at, with the edges of images")
    group.add_argument("--dry-run", action="store_true", help="say what would be looked at, and load no model")
    group.add_argument("--resume", action="store_true", help="continue a run of the same command that was stopped")


def map_options_given(args: argparse.Namespace) -> bool:
    names = ("question", "features", "area", "tile", "resolution", "output", "preview", "dry_run", "resume")
    return any(getattr(args, name, None) for name in names)


def raster_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Raster.open` that were given."""
    given = {name: getattr(args, name) for name in ("bands", "sensor", "composite", "stretch", "nodata")}
    return {name: value for name, value in given.items() if value is not None}


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
