"""Asks about rasters on the command line, and writes the answers as a layer.

mfrsvlm detect scene.tif --object ship --model MODEL --output ships.gpkg
mfrsvlm count *.tif --object cars --model MODEL --output cars.csv
mfrsvlm describe scene.tif --tile 512 --model MODEL
mfrsvlm compare before.tif after.tif --model MODEL
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arguments import ArgumentParser, add_dtype_argument, add_loading_arguments
from ..files.reading import list_images
from ..files.writing import check_file, write_image
from .composites import NEW_BANDS
from .errors import NoOverlapError, RasterError, RasterWarning
from .options import add_map_options, add_raster_options, raster_options


SUMMARIES = {
    "ask": "Asks questions about rasters.",
    "describe": "Describes rasters.",
    "detect": "Finds objects in rasters and puts their boxes on the map.",
    "count": "Counts objects in rasters, tile by tile.",
    "compare": "Asks about two dates of one place.",
}


def make_parser(task: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"mfrsvlm {task}", description=SUMMARIES[task])
    if task == "compare":
        parser.add_argument("files", nargs=2, metavar="FILE", help="the earlier raster, and the later one")
    else:
        about = "rasters, folders of them, or one file per band of one raster, each as NAME=FILE"
        parser.add_argument("files", nargs="+", metavar="FILE", help=about)
    if task in ("detect", "count"):
        number = "in the plural: cars" if task == "count" else "in the singular: ship"
        parser.add_argument("--object", action="append", required=True, metavar="NAME", help=f"{number}; may be repeated")
    parser.add_argument("--model", help="model folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=int, default=8, help="answers at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum length of an answer (default: %(default)s)")
    add_dtype_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_loading_arguments(parser)
    add_map_options(parser, task)
    add_raster_options(parser, for_model=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The first argument is a task."""
    task, *rest = sys.argv[1:] if arguments is None else arguments
    args = make_parser(task).parse_args(rest)
    return run(task, args)


def run(task: str, args: argparse.Namespace) -> int:
    """Runs a task. Returns 0; 1 if some images failed, and the others were answered; 2 after bad input."""
    try:
        with printed_notes():
            return _run(task, args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


@contextmanager
def printed_notes() -> Iterator[None]:
    """Prints each `RasterWarning` once, as a line."""
    seen = set()

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RasterWarning)
        warnings.showwarning = show
        yield


def _run(task: str, args: argparse.Namespace) -> int:
    sources = find_sources(task, args.files)
    output = check_output_options(args)
    if args.preview is not None and len(sources) > 1:
        raise RasterError("--preview takes one raster.")
    if args.preview is not None:
        check_file(args.preview, is_image=True)
    if args.model is None and not args.dry_run:
        raise RasterError("--model is missing: name a model folder or a Hub id.")
    if task == "compare" and len(args.composite or ()) > 1:
        raise RasterError("compare takes one --composite.")
    if task == "compare" and args.composite == [NEW_BANDS]:
        raise RasterError(f"compare cannot show {NEW_BANDS} alone: give another --composite, or none for all bands.")
    # Here, since `--help` and wrong options need none of it.
    from .assistant import opened

    opening = raster_options(args)
    if args.model is not None and args.bands is None and (args.composite is None or NEW_BANDS in args.composite):
        opening |= all_bands(args)
    usable, plans, preview = [], [], None
    for source in sources:
        with opened(source, **opening) as views:
            raster = views[0]
            try:
                pieces = plan(task, args, raster)
                _ = [view.stretch for view in views]  # rejects rasters without a valid pixel
            except NoOverlapError as error:
                if len(sources) == 1:
                    raise
                print(f"note: {error}", file=sys.stderr)
                continue
            usable.append(source)
            plans.append(describe_plan(raster, pieces))
            preview = None if args.preview is None else draw_preview(raster, pieces)
    if not usable:
        raise RasterError("the area or the features overlap none of the rasters.")
    if args.dry_run:
        if preview is not None:
            write_image(args.preview, preview)
        print(json.dumps({"rasters": plans}) if args.json else "\n".join(map(plan_line, plans)))
        return 0
    return answer(task, args, usable, opening, output, preview)


def all_bands(args: argparse.Namespace) -> dict[str, Any]:
    """How to open rasters for a model with more than three bands."""
    from ..files.model_folder import read_image_bands

    names = read_image_bands(args.model)
    return {} if names is None else {"image_bands": names, "missing_bands": args.missing_bands}


def answer(
    task: str,
    args: argparse.Namespace,
    sources: list[Any],
    opening: dict[str, Any],
    output: Path | None,
    preview: Any,
) -> int:
    from transformers.utils import logging

    from .assistant import GeoAssistant, opened
    from .raster import Raster
    from .vectors import combine_layers, write_layer

    logging.disable_progress_bar()
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "progress": True}
    assistant = GeoAssistant.from_pretrained(
        args.model,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        allow_incomplete=args.allow_incomplete,
        **options,
    )
    if preview is not None:
        write_image(args.preview, preview)
    frames = []
    pairs = [sources] if task == "compare" else [[source] for source in sources]
    for number, pair in enumerate(pairs):
        checkpoint = None if output is None else f"{output}.unfinished.{number}"
        with opened(pair[0], **opening) as views:
            later = None
            if task == "compare":
                stretch = {name: value for name, value in opening.items() if name != "stretch"}
                later = Raster.open(pair[1], like=views[0], **stretch)
            try:
                frame = ask(task, args, assistant, views, later, checkpoint)
            finally:
                if later is not None:
                    later.close()
        if getattr(args, "features", None) is None or len(pairs) > 1:
            frame.insert(0, "source_new" if "source" in frame else "source", " ".join(map(source_name, pair)))
        frames.append(frame)
    frame = combine_layers(frames)
    failed = sum(len(record["images"]["failed"]) for record in records_of(frame))
    if output is not None:
        write_layer(frame, output)
        for log in [] if failed else output.parent.glob(f"{output.name}.unfinished.*"):
            log.unlink()
    print(as_json(frame) if args.json else as_text(task, frame, output))
    if failed and output is not None:
        print(
            f"{failed} images failed. Delete {output} and repeat the command with --resume to ask about them again.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def ask(task: str, args: argparse.Namespace, assistant: Any, raster: Any, later: Any, checkpoint: str | None) -> Any:
    from .assistant import CAPTION, CHANGE, TILE

    tile = TILE if args.tile is None else args.tile
    shared = {"area": args.area, "resolution": args.resolution, "checkpoint": checkpoint}
    if task == "detect":
        return assistant.detect(raster, args.object, tile=tile, overlap=args.overlap, **shared)
    if task == "count":
        return assistant.count(raster, args.object, tile=tile, spread=not args.no_spread, **shared)
    if task == "compare":
        return assistant.compare(raster[0], later, args.question or CHANGE, tile=args.tile, **shared)
    questions = args.question or CAPTION
    return assistant.query(raster, questions, features=args.features, tile=args.tile, **shared)


def find_sources(task: str, files: list[str]) -> list[Any]:
    """What `Raster.open` takes, for every raster.

    Raises:
        RasterError: a folder holds no images; or some arguments are NAME=FILE and some are not.
    """
    pairs = [file.partition("=") for file in files]
    if task != "compare" and all(
        sign and name.isidentifier() and not Path(name + sign + path).exists() for name, sign, path in pairs
    ):
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise RasterError("two files have the same band's name.")
        return [{name: path for name, _, path in pairs}]
    sources: list[Any] = []
    for file in files:
        inside = list_images(file) if Path(file).is_dir() else []
        sources += map(str, inside) if inside else [file]  # without images, it may be a format that is a folder
    return sources


def source_name(source: Any) -> str:
    return " ".join(source.values()) if isinstance(source, dict) else str(source)


def check_output_options(args: argparse.Namespace) -> Path | None:
    """The file to write.

    Raises:
        RasterError: it cannot be written; there is a stopped run, and nothing says to continue it; or options contradict.
    """
    if getattr(args, "features", None) is not None and (args.area is not None or args.tile is not None):
        raise RasterError("--features takes no --area and no --tile.")
    if args.output is None:
        if args.resume:
            raise RasterError("--resume needs the --output of the run that was stopped.")
        return None
    from .vectors import check_output

    output = check_output(args.output)
    logs = sorted(output.parent.glob(f"{output.name}.unfinished.*"))
    if logs and not args.resume and not args.dry_run:
        raise RasterError(f"a run that would write {output} was stopped: continue it with --resume, or delete {logs[0]}.")
    return output


def plan(task: str, args: argparse.Namespace, raster: Any) -> list[Any]:
    """The images that a task would look at."""
    from .areas import read_layer
    from .assistant import TILE
    from .runs import find_scale, plan_features, plan_tiles
    from .tiles import default_overlap

    scale = find_scale(raster, args.resolution)
    if getattr(args, "features", None) is not None:
        return plan_features(raster, read_layer(args.features, "features"), scale)[1]
    tile = TILE if args.tile is None and task in ("detect", "count") else args.tile
    overlap = None
    if task == "detect":
        overlap = default_overlap(tile) if args.overlap is None else args.overlap
    pieces = plan_tiles(raster, args.area, scale, tile, overlap)[1]
    if task == "count" and len(pieces) > 1 and not args.no_spread:
        pieces = pieces + plan_tiles(raster, args.area, scale, tile, None, shifted=True)[1]
    return pieces


def describe_plan(raster: Any, pieces: list[Any]) -> dict[str, Any]:
    from .runs import shown_pixel

    largest = max((piece.size for piece in pieces), key=lambda size: size[0] * size[1])
    return {"raster": raster.name, "images": len(pieces), "largest": list(largest), "metres": shown_pixel(raster, pieces)}


def plan_line(plan: dict[str, Any]) -> str:
    size = "{} x {}".format(*plan["largest"])
    pixel = ", {:.3g} x {:.3g} m a pixel".format(*plan["metres"]) if plan["metres"] else ""
    return f"{plan['raster']}: {plan['images']} images, the largest of {size} pixels{pixel}"


def draw_preview(raster: Any, pieces: list[Any]) -> Any:
    """The image of the only piece, or the whole raster with the edges of all."""
    from PIL import ImageDraw

    from .answers import show
    from .raster import FILL

    if len(pieces) == 1:
        (image,) = show([raster], pieces[0], FILL)
    else:
        image = raster.read().image
        pen = ImageDraw.Draw(image)
        across, down = image.width / raster.width, image.height / raster.height
        for piece in pieces:
            column, row, width, height = piece.window
            box = (column * across, row * down, (column + width) * across - 1, (row + height) * down - 1)
            pen.rectangle(box, outline="yellow")
    return image


def records_of(frame: Any) -> list[dict[str, Any]]:
    record = frame.attrs["record"]
    return record.get("runs", [record])


def as_json(frame: Any) -> str:
    import pandas

    rows = frame.assign(geometry=frame.geometry.to_wkt()).astype(object)
    rows = pandas.DataFrame(rows).where(lambda values: values.notna(), None).to_dict("records")
    return json.dumps(
        {"crs": frame.crs and frame.crs.to_string(), "record": frame.attrs["record"], "rows": rows}, default=str
    )


def as_text(task: str, frame: Any, output: Path | None) -> str:
    lines = []
    for record in records_of(frame):
        names = " and ".join(raster["source"] for raster in record["rasters"])
        images = record["images"]
        if task == "count":
            for name, total in record["totals"].items():
                missing = f", {total['unanswered']} tiles without a number" if total["unanswered"] else ""
                shifted = f" ({total['shifted_total']:g} on shifted tiles)" if "shifted_total" in total else ""
                lines.append(f"{names}: {total['total']:g} {name}{shifted}{missing}")
        if images.get("answers_without_box"):
            lines.append(f"{names}: {images['answers_without_box']} answers without a box")
        if images["answered"] > 1 or images["without_data"] or images["failed"]:
            lines.append(
                f"{names}: {images['answered']} images answered, {images['without_data']} without data, "
                f"{len(images['failed'])} failed"
            )
    if output is not None:
        return "\n".join([*lines, f"{len(frame)} features in {output}"])
    if task in ("ask", "describe", "compare") and len(frame) == 1 and "answer" in frame:
        return "\n".join([*lines, str(frame["answer"].iloc[0])])
    if task == "detect":
        shown = frame[["object", "score"]].join(frame.geometry.bounds)
    else:
        names = ("source", "tile", "object", "question", "answer", "count", "score", "error")
        answers = [name for name in frame if name.partition("_")[0] in ("question", "answer", "count", "score")]
        shown = frame[[name for name in dict.fromkeys((*names, *answers)) if name in frame and not frame[name].isna().all()]]
    if task == "count":
        return "\n".join(lines)
    text = shown.to_string(index=False, max_colwidth=80) if len(shown) else "nothing found"
    return "\n".join([*lines, text])


if __name__ == "__main__":
    sys.exit(main())
