"""Shows what the model will see of a raster, and how the image was made.

mfrsvlm info scene.tif --preview scene.png
mfrsvlm info red=B04.jp2 green=B03.jp2 blue=B02.jp2
"""

import json
import sys
from pathlib import Path
from typing import Any

from ..arguments import ArgumentParser
from ..files.writing import WriteError, check_file, write_image
from .errors import without_warnings
from .options import add_raster_options, print_notes, raster_options


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mfrsvlm info", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="+", metavar="FILE", help="what GDAL opens; or one file per band, each as NAME=FILE")
    add_raster_options(parser)
    parser.add_argument("--preview", type=Path, metavar="PATH", help="write the image that the model sees, as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.preview is not None and args.preview.suffix.lower() != ".png":
        parser.error(f"--preview {args.preview} must end in .png")
    try:
        if args.preview is not None:
            check_file(args.preview)
    except WriteError as error:
        parser.error(f"--preview: {error}")
    source = source_of(args.file, parser)
    # Imported here: it needs rasterio, and `--help` does not.
    from .raster import Raster

    try:
        with without_warnings(), Raster.open(source, **raster_options(args)) as raster:
            view = raster.read()
        if args.preview is not None:
            write_image(args.preview, view.image)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_notes(raster.notes)
    about = {"driver": raster.driver, "width": raster.width, "height": raster.height, "overviews": raster.overviews}
    about |= {"band_names": raster.naming.names, "dtypes": raster.dtypes, "sensor": raster.sensor}
    if args.json:
        print(json.dumps({**about, **view.record.as_dict()}))
        return 0
    for name, value in lines(about, view.record):
        print(f"{name + ':':<12}{value}")
    return 0


def source_of(files: list[str], parser: ArgumentParser) -> Any:
    """One raster, or a file per band."""
    pairs = [file.partition("=") for file in files]
    if len(files) == 1 and (not pairs[0][1] or Path(files[0]).exists() or not pairs[0][0].isidentifier()):
        return files[0]
    if not all(name and sign and path for name, sign, path in pairs):
        parser.error("give one raster, or one file per band, each as NAME=FILE: red=B04.jp2 green=B03.jp2 blue=B02.jp2")
    if len({name for name, _, _ in pairs}) < len(pairs):
        parser.error("two files have the same band's name")
    return {name: path for name, _, path in pairs}


def lines(about: dict[str, Any], record: Any) -> list[tuple[str, str]]:
    """What `info` prints, name by name."""
    known = [f"{number} {name or 'unnamed'}" for number, name in enumerate(about["band_names"], start=1)]
    shown = [f"{number} {name}" if name else str(number) for number, name in zip(record.bands, record.names, strict=True)]
    limits = [f"{low:g} to {high:g}" for low, high in zip(record.stretch.low, record.stretch.high, strict=True)]
    limits = limits[:1] if len(set(limits)) == 1 else limits
    place = record.georeferencing if record.crs is None else f"{record.crs}, {record.georeferencing}"
    image = f"{record.size[0]} x {record.size[1]} pixels"
    if record.resolution is not None and record.unit is not None:
        image += ", each {:.6g} x {:.6g} {}".format(*record.resolution, record.unit)
    return [
        ("raster", f"{record.source}, {about['driver']}, {about['width']} x {about['height']} pixels"),
        ("place", place),
        ("bands", ", ".join(known)),
        ("shown", f"{', '.join(shown)} as {record.composite} (from: {record.bands_from}), {', '.join(about['dtypes'])}"),
        ("stretch", f"{record.stretch.kind}, {', '.join(limits)} ({record.stretch.unit})"),
        ("no data", f"{100 * record.nodata_share:.1f} % of the pixels"),
        ("overviews", ", ".join(map(str, about["overviews"])) or "none"),
        ("image", image),
    ]


if __name__ == "__main__":
    sys.exit(main())
