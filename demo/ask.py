"""Asks a model about images: `mfrsvlm ask IMAGE QUESTION ... --model FOLDER_OR_HUB_ID`, or with `--question` about several.

Georeferenced rasters are read by `geospatial`, if rasterio is installed, and all other images as the processor reads them.
With options for maps, `geospatial` also asks and writes.
"""

import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from ..arguments import ArgumentParser, add_dtype_argument, add_loading_arguments
from ..files.writing import WriteError, check_file, write_image
from ..geospatial.errors import RasterError, without_warnings
from ..geospatial.options import add_map_options, add_raster_options, map_options_given, print_notes, raster_options


RASTER_ENDINGS = (".tif", ".tiff", ".jp2", ".vrt")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mfrsvlm ask", description="Asks a model about images and prints answers and boxes.")
    parser.add_argument("image", help="image file, raster or URL")
    about = "one or more questions, each in quotes; with --question, further rasters"
    parser.add_argument("questions", nargs="*", metavar="question", help=about)
    parser.add_argument("--model", help="model folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object; boxes are x1, y1, x2, y2 in pixels")
    parser.add_argument("--picture", metavar="PATH", help="write an image with the boxes and the answers to this file")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum length of an answer (default: %(default)s)")
    add_dtype_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    parser.add_argument("--batch-size", type=int, default=8, help="answers at a time, for maps (default: %(default)s)")
    add_loading_arguments(parser)
    add_map_options(parser, "ask")
    add_raster_options(parser, for_model=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not args.questions and not args.question:
        parser.error("a question is missing")
    if args.model is None and not args.dry_run:
        parser.error("the following arguments are required: --model")
    try:
        if map_options_given(args) or shows_all_bands(args):
            return ask_on_map(args)
    except ValueError as error:  # of the model folder
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Imported here: `--help` and wrong options need none of it.
    from transformers.utils import logging

    from ..evaluation.answering import load
    from ..image_sources_mfrsvlm import image_size
    from .answering import answer
    from .picture import draw_answers

    logging.disable_progress_bar()
    try:
        if args.picture is not None:
            check_file(args.picture, is_image=True)
        image, record = open_image_or_raster(args.image, raster_options(args))
        if args.picture is not None and isinstance(image, dict):
            raise ValueError(f"--picture needs an image in color, and {args.image} holds bands by name.")
        model, processor = load(args.model, None, args.dtype, args.device, args.trust_remote_code, args.allow_incomplete)
        answers = answer(model, processor, image, args.questions, args.max_new_tokens)
        if args.picture is not None:
            lines = [(reply.question, reply.text) for reply in answers]
            boxes = [("yellow", box) for reply in answers for box in reply.boxes]
            write_image(args.picture, draw_answers(image.convert("RGB"), lines, boxes))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (RasterError, WriteError)) else 1
    if args.json:
        height, width = image_size(image)
        sizes = {"width": width, "height": height}
        rows = [asdict(reply) for reply in answers]
        raster = {"raster": record.as_dict()} if record else {}
        print(json.dumps({"model": args.model, "image": args.image, **sizes, **raster, "answers": rows}))
        return 0
    for reply in answers:
        print(f"Q: {reply.question}\nA: {reply.text}")
        for box in reply.boxes:
            print("   box in pixels: " + ", ".join(f"{value:.0f}" for value in box))
    return 0


def shows_all_bands(args: Any) -> bool:
    """Whether it is a raster, and the model takes more bands of it than three."""
    if args.bands is not None or args.composite is not None or find_spec("rasterio") is None:
        return False
    from ..files.model_folder import read_image_bands

    is_raster = args.image.startswith("/vsi") or urlsplit(args.image).path.lower().endswith(RASTER_ENDINGS)
    return is_raster and read_image_bands(args.model) is not None


def ask_on_map(args: Any) -> int:
    from ..geospatial.commands import run

    if args.picture is not None:
        print("error: --picture shows one image, without options for maps.", file=sys.stderr)
        return 2
    args.files = [args.image, *args.questions] if args.question else [args.image]
    args.question = args.question or args.questions
    return run("ask", args)


def open_image_or_raster(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The image, and the record of how it was read if it is a raster, else `None`.

    Args:
        name: file, address, or any name that GDAL opens.
        options: keyword arguments of `Raster.open`. With any, the file is read as a raster, georeferenced or not.
    """
    from ..image_sources_mfrsvlm import open_image

    if options or (find_spec("rasterio") is not None and may_be_raster(name)):
        from ..geospatial.raster import Raster, is_georeferenced

        if options or is_georeferenced(name):
            with without_warnings(), Raster.open(name, **options) as raster:
                view = raster.read()
            print_notes(raster.notes)
            return view.image, view.record
    return open_image(name), None


def may_be_raster(name: str) -> bool:
    """A file, or a name that only GDAL knows. An address is one if it ends as rasters do: others are fetched just once."""
    return os.path.isfile(name) or name.startswith("/vsi") or urlsplit(name).path.lower().endswith(RASTER_ENDINGS)


if __name__ == "__main__":
    sys.exit(main())
