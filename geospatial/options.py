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


def raster_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Raster.open` that were given."""
    given = {name: getattr(args, name) for name in ("bands", "sensor", "composite", "stretch", "nodata")}
    return {name: value for name, value in given.items() if value is not None}


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
