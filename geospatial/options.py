"""The options of every command that reads a raster. Nothing here needs rasterio."""

import argparse
import sys
from typing import Any

from .composites import COMPOSITES, NEW_BANDS, composite_key
from .sensors import SENSORS


def add_raster_options(parser: argparse.ArgumentParser, for_model: bool = False) -> None:
    """The options of `Raster.open`. `for_model`: several composites are several images of a question."""
    group = parser.add_argument_group("rasters")
    group.add_argument("--bands", metavar="R,G,B", help="numbers, from one, or names of three bands, or of one for grey")
    group.add_argument("--sensor", metavar="NAME", help=f"whose bands they are: {', '.join(SENSORS)}")
    about = "what to show; repeated, each is an image of the question" if for_model else "what to show"
    group.add_argument(
        "--composite",
        metavar="NAME",
        action="append" if for_model else None,
        type=composite_key,
        help=f"{about} (default: true_color{', or all bands of a model with more' if for_model else ''}): "
        f"{', '.join([*COMPOSITES, *([NEW_BANDS] if for_model else [])])}",
    )
    if for_model:
        group.add_argument(
            "--missing-bands",
            choices=("fill", "refuse"),
            default="fill",
            help="a raster that lacks a band of the model: zero for the model, with a note, or an error (default: fill)",
        )
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
    return any(getattr(args, name, None) for name in names) or len(args.composite or ()) > 1


def raster_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Raster.open` that were given. `composite` is a list if there are several."""
    given = {name: getattr(args, name) for name in ("bands", "sensor", "composite", "stretch", "nodata")}
    if isinstance(args.composite, list) and len(args.composite) == 1 and args.composite != [NEW_BANDS]:
        (given["composite"],) = args.composite
    return {name: value for name, value in given.items() if value is not None}


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
