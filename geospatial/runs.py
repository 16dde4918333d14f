"""The run of one verb: the images of a raster, what was asked about them, and what came back."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import shapely

from .. import __version__
from ..evaluation.numbers import read_number
from ..files.reading import parse_json
from ..scenes.questions import NOTHING
from .answers import Outcome, Piece, Reply, RunLog, ask_pieces, show
from .areas import read_area, to_pixels, window_of
from .composites import ALL_BANDS, COMPOSITES
from .errors import NoOverlapError, RasterError, RasterWarning
from .raster import MAX_SIDE, Raster
from .tiles import Window, overlapping, partition


COLUMNS = ("question", "answer", "count", "score", "truncated", "tile", "error")
MISSING = {"empty": "no valid pixel", "outside": "outside of the raster"}


MAX_ENLARGEMENT = 32  # by `resolution`


class Run:
    """The pieces of one raster, what was asked about them, and what came back."""

    def __init__(
        self,
        raster: Raster,
        about: dict[str, Any],
        questions: list[str],
        pieces: list[Piece],
        outcomes: list[Outcome],
        shape: Any,
    ) -> None:
        self.grid, self.about, self.questions, self.pieces, self.outcomes = raster.grid, about, questions, pieces, outcomes
        self.shape = shape
        self.failed = [
            (piece, outcome.reason) for piece, outcome in zip(pieces, outcomes, strict=True) if outcome.state == "failed"
        ]

    @classmethod
    def start(
        cls,
        assistant: Any,
        task: str,
        rasters: list[Raster],
        questions: list[str],
        pieces: list[Piece],
        grid: dict[str, Any],
        shape: Any,
        checkpoint: str | Path | None,
    ) -> "Run":
        """Asks the questions about the pieces.

        Args:
            assistant: a `GeoAssistant`.
            task: the verb.
            rasters: what each image of a question shows.
            questions, pieces: what is asked, and about what.
            grid: how the pieces were made, for the record.
            shape: the area in pixels.
            checkpoint: see `GeoAssistant`.

        Raises:
            RasterError: no piece has a valid pixel, or all of them fail.
        """
        about = {"mfrsvlm": __version__, "task": task, "model": assistant.model, "questions": questions}
        boxes = assistant.box_format if task == "detect" else None
        titles = describe_views([raster.title for raster in rasters])
        if titles:
            about["prompt_begins"] = titles
        grid = grid | {"pixel_metres": shown_pixel(rasters[0], pieces), "fill": assistant.fill}
        about |= {"boxes": boxes, "rasters": [raster.describe() for raster in rasters], "grid": grid}
        settings = about | {"batch_size": assistant.batch_size, "images": len(pieces), "pieces": digest(pieces)}
        settings["files"] = [state_of(name) for raster in rasters for name in raster.files]
        log = None if checkpoint is None else RunLog(checkpoint, settings)
        outcomes = ask_pieces(
            assistant.answerer,
            lambda piece: show(rasters, piece, assistant.fill),
            pieces,
            [titles + question for question in questions],
            assistant.batch_size,
            boxes,
            log,
            assistant.progress,
        )
        about["notes"] = make_notes(rasters[0], pieces, assistant.ground_resolution)
        run = cls(rasters[0], about, questions, pieces, outcomes, shape)
        if all(outcome.state == "empty" for outcome in outcomes):
            names = " and ".join(raster.name for raster in rasters)
            raise RasterError(f"{names}: no valid pixel{' in common' if len(rasters) > 1 else ''} in what was asked about.")
        if run.failed:
            text = f"{len(run.failed)} of {len(pieces)} images of {rasters[0].name} failed. The first: {run.failed[0][1]}"
            warnings.warn(text, RasterWarning, stacklevel=5)
        return run

    def replies(self) -> list[tuple[Reply, ...]]:
        return [outcome.replies for outcome in self.outcomes if outcome.state == "answered"]

    def record(self, **more: Any) -> dict[str, Any]:
        states = [outcome.state for outcome in self.outcomes]
        images: dict[str, Any] = {"answered": states.count("answered"), "without_data": states.count("empty")}
        images["truncated"] = sum(any(reply.truncated for reply in replies) for replies in self.replies())
        if self.about["boxes"] is not None:  # many of them say that the model writes boxes in another form
            texts = [reply.text for replies in self.replies() for reply in replies if not reply.boxes]
            images["answers_without_box"] = sum(text.strip(" .").lower() != NOTHING for text in texts)
        images["failed"] = [{"tile": tile_name(piece.window), "reason": reason} for piece, reason in self.failed]
        made: dict[str, Any] = parse_json(json.dumps(self.about | {"images": images} | more))  # as it is read from a file
        return made

    def row(self, question: str, reply: Reply | None, piece: Piece, score: float | None) -> dict[str, Any]:
        return {
            "question": question,
            **reply_columns(reply),
            "score": score,
            "tile": tile_name(piece.window),
            "error": None,
        }

    def rows(self, with_index: bool = False) -> list[dict[str, Any]]:
        """One for every answered or failed piece and question, with the outline of the piece in pixels."""
        rows = []
        for piece, outcome in zip(self.pieces, self.outcomes, strict=True):
            if outcome.state == "empty":
                continue
            outline = shapely.box(*corners(piece.window))
            for index, question in enumerate(self.questions):
                reply = outcome.replies[index] if outcome.replies else None
                made = self.row(question, reply, piece, reply and reply.score)
                made |= {"error": outcome.reason or None, "geometry": outline}
                rows.append(made | ({"index": index} if with_index else {}))
        return rows

    def frame(self, rows: list[dict[str, Any]], label: str = "answer", **more: Any) -> geopandas.GeoDataFrame:
        """Rows with shapes in pixels as a frame with shapes on the map."""
        crs = None if self.grid.map_crs is None else self.grid.map_crs.to_wkt()
        shapes = [shapely.transform(row.pop("geometry"), self.grid.to_map) for row in rows]
        names = list(rows[0]) if rows else [*COLUMNS, "object"]
        columns = {name: [row[name] for row in rows] for name in names}
        frame = geopandas.GeoDataFrame(columns, geometry=geopandas.GeoSeries(shapes, crs=crs))
        frame = frame.astype({"count": float, "score": float, "truncated": "boolean"})
        frame.attrs = {"record": self.record(**more), "label": label}
        return frame


def describe_views(titles: Sequence[str]) -> str:
    """What a prompt says of its images before the question: nothing, if all of them show true colors or all bands."""
    if set(titles) <= {ALL_BANDS.title, COMPOSITES["true_color"].title}:
        return ""
    if len(titles) == 1:
        return f"The image shows {titles[0]}. "
    parts = [f"image {number} shows {title}" for number, title in enumerate(titles, start=1)]
    text = f"{', '.join(parts)}. "
    return text[0].upper() + text[1:]


def reply_columns(reply: Reply | None) -> dict[str, Any]:
    if reply is None:
        return {"answer": None, "count": None, "score": None, "truncated": None}
    return {
        "answer": reply.text,
        "count": read_number(reply.text),
        "score": reply.score,
        "truncated": reply.truncated,
    }


def find_scale(raster: Raster, resolution: float | None) -> tuple[float, float]:
    """Pixels of an image for a pixel of the raster, in both directions.

    Args:
        raster: the raster.
        resolution: metres a pixel of the images; `None`: as stored.

    Raises:
        RasterError: there is no such resolution.
    """
    if resolution is None:
        return 1.0, 1.0
    if not 0 < resolution < math.inf:
        raise RasterError(f"resolution={resolution:g} must be a positive length in metres.")
    stored = raster.grid.pixel_size()
    if stored is None:
        raise RasterError(f"{raster.name} has no place on the Earth, so a resolution of {resolution:g} m means nothing.")
    if max(stored) > MAX_ENLARGEMENT * resolution:
        raise RasterError(
            f"{raster.name} has pixels of {max(stored):.3g} m: a resolution of {resolution:g} m would enlarge them more "
            f"than {MAX_ENLARGEMENT} times."
        )
    return stored[0] / resolution, stored[1] / resolution


def shown_pixel(raster: Raster, pieces: Sequence[Piece]) -> tuple[float, float] | None:
    """Width and height of a pixel of the images in metres; of the most reduced image, if they differ."""
    stored = raster.grid.pixel_size()
    if stored is None:
        return None
    across, down = (max(piece.window[2 + axis] / piece.size[axis] for piece in pieces) for axis in (0, 1))
    return stored[0] * across, stored[1] * down


def make_notes(raster: Raster, pieces: Sequence[Piece], ground_resolution: Any) -> list[str]:
    """What the record should say of places and resolution. Images beside the training images are also warned of.

    Args:
        raster, pieces: what is shown.
        ground_resolution: finest and coarsest pixel that the model was trained with, in metres; `None`: not known.
    """
    notes = list(raster.notes)
    if raster.grid.georeferencing == "rpcs":
        notes.append(f"{raster.name} is placed by polynomials at their mean height: places on slopes are approximate.")
    shown = shown_pixel(raster, pieces)
    if shown is not None and ground_resolution is not None:
        finest, coarsest = ground_resolution
        # Objects of one kind vary by more than a tenth.
        if min(shown) < 0.9 * finest or max(shown) > 1.1 * coarsest:
            text = (
                f"{raster.name} is shown at {max(shown):.3g} m a pixel, and the model was trained at {finest:g} to "
                f"{coarsest:g} m: set a resolution (--resolution) in this range, and a tile (--tile)."
            )
            notes.append(text)
            warnings.warn(text, RasterWarning, stacklevel=5)
    return notes


def plan_features(
    raster: Raster, layer: geopandas.GeoDataFrame, scale: tuple[float, float]
) -> tuple[list[int | None], list[Piece]]:
    """An image for every polygon of a layer that overlaps the raster.

    Returns:
        The index of the image of each polygon, `None` outside of the raster, and the images.

    Raises:
        RasterError: the raster has no CRS, or no polygon overlaps it.
    """
    if raster.grid.map_crs is None:
        raise RasterError(f"{raster.name} has no CRS, so features cannot be laid over it.")
    pieces, places = [], []
    for shape in to_pixels(layer.geometry, raster.grid):
        window = window_of(shape, raster.grid)
        places.append(None if window is None else len(pieces))
        if window is not None:
            pieces.append(Piece(window, image_size(window, scale), shape=shape))
    if not pieces:
        raise NoOverlapError(f"no feature overlaps {raster.name}.")
    return places, pieces


def plan_tiles(
    raster: Raster,
    area: Any,
    scale: tuple[float, float],
    tile: int | None,
    overlap: int | None,
    shifted: bool = False,
) -> tuple[Any, list[Piece]]:
    """The images of a raster, or of an area in it.

    Returns:
        The area in pixels, `None` if there is none, and the images.

    Raises:
        RasterError: the area cannot be read or does not overlap the raster; tile or overlap make no sense.
    """
    shape = None if area is None else read_area(area, raster.grid, raster.name)
    extent: Window | None = (0, 0, raster.width, raster.height)
    if shape is not None:
        extent = window_of(shape, raster.grid)
    if extent is None:
        raise NoOverlapError(f"the area and {raster.name} share no pixel.")
    if tile is None:
        return shape, [Piece(extent, image_size(extent, scale), shape=shape)]
    if not 1 <= tile <= MAX_SIDE:
        raise RasterError(f"tile={tile} must be 1 to {MAX_SIDE} pixels.")
    # Whole pixels: a metre on the ground is not quite one on the map, and should not cost a tile.
    sides = max(1, round(tile / scale[0])), max(1, round(tile / scale[1]))
    if overlap is None:
        windows = partition(extent, sides, shifted)
        # Half tiles at the edges are as large in their images as whole ones, so that objects keep their size.
        largest = max(window[2] for window in windows), max(window[3] for window in windows)
        canvas = image_size((0, 0, *largest), scale) if shifted else None
    else:
        if not 0 <= overlap < tile:
            raise RasterError(f"overlap={overlap} must be 0 to less than the tile, {tile} pixels.")
        shared = min(round(overlap / scale[0]), sides[0] - 1), min(round(overlap / scale[1]), sides[1] - 1)
        if shape is not None:  # objects at the edge of the area are shown whole, and kept by their centre
            extent = grow(extent, shared, raster)
        windows = overlapping(extent, sides, shared)
        canvas = None
    if shape is not None:
        windows = [window for window in windows if shape.intersects(shapely.box(*corners(window)))]
    return shape, [
        Piece(window, image_size(window, scale), canvas, None if overlap is not None else shape) for window in windows
    ]


def grow(window: Window, margin: tuple[int, int], raster: Raster) -> Window:
    """A window with a margin on all sides, within the raster."""
    left, top, right, bottom = corners(window)
    left, top = max(0, left - margin[0]), max(0, top - margin[1])
    return left, top, min(raster.width, right + margin[0]) - left, min(raster.height, bottom + margin[1]) - top


def corners(window: Window) -> tuple[int, int, int, int]:
    column, row, width, height = window
    return column, row, column + width, row + height


def image_size(window: Window, scale: tuple[float, float]) -> tuple[int, int]:
    """Width and height of the image of a window; at most `MAX_SIDE`."""
    width, height = window[2] * scale[0], window[3] * scale[1]
    factor = min(1.0, MAX_SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def digest(pieces: Sequence[Piece]) -> str:
    text = "".join(f"{piece.window}{piece.size}{piece.canvas}{piece.shape and piece.shape.wkb_hex}" for piece in pieces)
    return hashlib.sha256(text.encode()).hexdigest()


def state_of(name: str) -> list[Any]:
    """A file's name, size and time of change, by which a changed one is noticed."""
    path = Path(name)
    return [name, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [name]


def tile_name(window: Window) -> str:
    return ",".join(map(str, window))
