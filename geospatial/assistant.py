"""Asks a vision-language model about rasters, and puts its answers on the map."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import geopandas
import huggingface_hub
import numpy as np
import shapely

from ..evaluation.answering import Answerer, fingerprint, load
from ..evaluation.numbers import read_number
from ..processing_mfrsvlm import check_box_format
from ..scenes.questions import NOTHING
from .answers import Outcome
from .areas import read_layer
from .bands import COLOURS
from .composites import NEW_BANDS, composite_key, find_composite
from .errors import RasterError, RasterWarning
from .raster import FILL, Fill, Raster
from .runs import MISSING, Run, find_scale, plan_features, plan_tiles, reply_columns
from .tiles import at_least_a_pixel, default_overlap, merge_boxes, unite


TILE = 512  # pixels of the image
CAPTION = "Describe this image."
COUNT = "How many {object} are there?"
CHANGE = "What changed between the first and the second image?"
BOXES = (
    "Give the bounding box of every {object} as [x_min, y_min, x_max, y_max], each number scaled to 0-{scale}, "
    f'or answer "{NOTHING}".'
)
SYNTHETIC = "synthetic"  # `training_images` in the card of a model that has seen drawings alone


class GeoAssistant:
    """A model that answers about rasters. Made by `GeoAssistant.from_pretrained`.

    Every verb takes a `Raster`, or what `Raster.open` takes, or a list of `Raster` that show one place (`open_views`) and
    become several images of every question. It returns a GeoDataFrame in the CRS of the raster. Without a
    CRS, places are in pixels, from the upper left corner. `frame.attrs["record"]` says how the answers were made.

    Arguments that the verbs share:
        area: limits what is looked at: (left, bottom, right, top) in the raster's CRS, a shapely geometry in that CRS, a
            file of polygons or a GeoDataFrame.
        tile: longest side, in pixels, of the images into which the raster is divided; `None` shows it as one image.
        resolution: metres a pixel of the images; `None`: as stored, reduced only where an image would be too large.
        checkpoint: file that keeps the answers of finished images. A run with the same settings continues there.

    Columns that the results share: `question`, `answer`, `count` (the number in the answer), `score` (the geometric mean of
    the probabilities of its tokens; no probability of being right), `truncated`, `tile` (column, row, width and height in
    pixels of the raster) and `error` (why there is no answer). Images without a valid pixel are not asked about; the record
    counts them.

    Args:
        answerer: an `evaluation.answering.Answerer`.
        model: what the record says about the model.
        box_format: how the model writes boxes, see `MFRSVLMProcessor`; `None`: not known, so it cannot detect.
        ground_resolution: finest and coarsest pixel of its training images, in metres; `None`: not known.
        batch_size: answers that are generated together.
        progress: show a bar with the time left, if there is a terminal.
        fill: colour, or values by band, of what is not shown: pixels without data, and all outside of an area or a polygon.
            With the colour that images are padded with, the demo model counts right; in black, it sees objects.
        image_bands: bands of the model, if they are more than red, green and blue: rasters are read with all of these bands,
            unless they were opened as something else.
        missing_bands: "fill" or "refuse" rasters that lack one of them, see `Raster.open`.
    """

    def __init__(
        self,
        answerer: Any,
        model: dict[str, Any] | None = None,
        box_format: dict[str, Any] | None = None,
        ground_resolution: Any = None,
        batch_size: int = 8,
        progress: bool = False,
        fill: Fill = FILL,
        image_bands: Sequence[str] | None = None,
        missing_bands: str = "fill",
    ) -> None:
        self.answerer, self.model = answerer, dict(model or {})
        self.box_format = None if box_format is None else check_box_format(box_format)
        self.ground_resolution, self.batch_size, self.progress, self.fill = ground_resolution, batch_size, progress, fill
        self.opening: dict[str, Any] = {}  # how rasters are opened
        if image_bands is not None:
            self.opening = {"image_bands": list(image_bands), "missing_bands": missing_bands}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        max_new_tokens: int = 256,
        box_format: dict[str, Any] | None = None,
        allow_incomplete: bool = False,
        **options: Any,
    ) -> "GeoAssistant":
        """Loads any image-text-to-text model of transformers.

        Args:
            name: folder or Hub id.
            revision: branch, tag or commit of a Hub id.
            dtype: type of the weights; `"auto"`: as saved, or float32 on a CPU that is slow in it.
            device: of the model; `None`: an accelerator, if there is one.
            trust_remote_code: run the code in the model folder.
            max_new_tokens: maximum length of an answer.
            box_format: how the model writes boxes; `None`: as its processor says.
            allow_incomplete: see `files.model_folder.load_model`.
            **options: further arguments of `GeoAssistant`.

        Raises:
            ValueError: no model can be loaded from there, or the device does not exist here.
        """
        model, processor = load(name, revision, dtype, device, trust_remote_code, allow_incomplete)
        if training_images(name, revision) == SYNTHETIC:
            warnings.warn(
                f"{name} was trained on synthetic images alone, as its card says. It does not know real ones: its answers "
                "about them mean nothing.",
                RasterWarning,
                stacklevel=2,
            )
        return cls.of_model(model, processor, name, revision, max_new_tokens, box_format, **options)

    @classmethod
    def of_model(
        cls,
        model: Any,
        processor: Any,
        name: str,
        revision: str | None = None,
        max_new_tokens: int = 256,
        box_format: dict[str, Any] | None = None,
        **options: Any,
    ) -> "GeoAssistant":
        """An assistant of a loaded model on its device. Other arguments are those of `from_pretrained`."""
        about = {"name": name, "revision": getattr(model.config, "_commit_hash", None) or revision}
        about |= {"weights": fingerprint(model), "max_new_tokens": max_new_tokens}
        return cls(
            Answerer(model, processor, max_new_tokens),
            about,
            getattr(processor, "box_format", None) if box_format is None else box_format,
            getattr(processor, "ground_resolution", None),
            **{"fill": padding_colour(processor), "image_bands": bands_of_processor(processor), **options},
        )

    def query(
        self,
        raster: Any,
        questions: str | Sequence[str],
        area: Any = None,
        features: Any = None,
        tile: int | None = None,
        resolution: float | None = None,
        checkpoint: str | Path | None = None,
    ) -> geopandas.GeoDataFrame:
        """Answers to questions.

        Args:
            raster, area, tile, resolution, checkpoint: see the class.
            questions: one or more. Every image is encoded once for all of them.
            features: layer of polygons, a file or a GeoDataFrame. The questions are asked about each polygon, with
                nothing around it.

        Returns:
            A row for every image and question, with the outline of the image. With `features`: a copy of the layer in its
            own CRS with the answers as columns; those of several questions are numbered.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        if features is not None:
            if area is not None or tile is not None:
                raise RasterError("features are asked about one by one: give no area and no tile with them.")
            return self._ask_features(raster, questions, features, resolution, checkpoint)
        run = self._run("query", [raster], questions, area, tile, None, resolution, checkpoint)
        return run.frame(run.rows())

    def caption(self, raster: Any, prompt: str = CAPTION, **options: Any) -> geopandas.GeoDataFrame:
        """Descriptions; arguments as for `query`."""
        return self.query(raster, prompt, **options)

    def count(
        self,
        raster: Any,
        objects: str | Sequence[str],
        area: Any = None,
        tile: int | None = TILE,
        resolution: float | None = None,
        checkpoint: str | Path | None = None,
        prompt: str = COUNT,
        spread: bool = True,
    ) -> geopandas.GeoDataFrame:
        """Numbers of objects, asked tile by tile on a partition, so that nothing is counted twice.

        An object on a seam may be counted in both tiles or in none. A second partition, shifted by half a tile, shows how
        much that matters. `frame.attrs["totals"]` has, for every object, the `total` of the first partition and, for more
        than one tile, the `shifted_total` of the second, each with the number of tiles that gave no number (`unanswered`,
        `shifted_unanswered`).

        Args:
            raster, area, tile, resolution, checkpoint: see the class.
            objects: what to count, in the plural: "cars".
            prompt: the question, with `{object}`.
            spread: whether to count on the second partition too, which takes as long as the first.

        Returns:
            A row for every tile of the first partition and object, with the column `object`.
        """
        objects = [objects] if isinstance(objects, str) else list(objects)
        questions = [prompt.replace("{object}", name) for name in objects]
        runs: list[Run] = []
        for shifted in (False, True):
            if shifted and (not spread or len(runs[0].pieces) == 1):
                break
            path = checkpoint if not shifted or checkpoint is None else f"{checkpoint}.shifted"
            runs.append(self._run("count", [raster], questions, area, tile, None, resolution, path, shifted))
        totals = {}
        for index, name in enumerate(objects):
            counts = [[read_number(reply[index].text) for reply in run.replies()] for run in runs]
            sums = [sum(number for number in row if number is not None) for row in counts]
            missing = [row.count(None) + len(run.failed) for row, run in zip(counts, runs, strict=True)]
            totals[name] = {"total": sums[0], "unanswered": missing[0]}
            if len(runs) > 1:
                totals[name] |= {"shifted_total": sums[1], "shifted_unanswered": missing[1]}
        rows = [row | {"object": objects[row.pop("index")]} for row in runs[0].rows(with_index=True)]
        frame = runs[0].frame(rows, label="count", totals=totals)
        frame.attrs["totals"] = totals
        return frame

    def detect(
        self,
        raster: Any,
        objects: str | Sequence[str],
        area: Any = None,
        tile: int | None = TILE,
        overlap: int | None = None,
        resolution: float | None = None,
        checkpoint: str | Path | None = None,
        prompt: str | None = None,
    ) -> geopandas.GeoDataFrame:
        """Boxes of objects, asked tile by tile on overlapping tiles. Boxes of one object in several tiles are merged.

        Args:
            raster, area, tile, resolution, checkpoint: see the class. Boxes whose centre lies outside the area are left out.
            objects: what to look for, in the singular: "ship".
            overlap: pixels that neighbouring images share; `None`: an eighth of `tile`.
            prompt: the request, with `{object}`; `None`: that of the box format, else a general one.

        Returns:
            A row for every box: its four corners as a polygon, the column `object`, and the question, answer and tile in
            which most of it was seen. `score` is that of the tokens that write the box.
        """
        if self.box_format is None:
            raise RasterError(
                f"the processor of {self.model.get('name', 'the model')} does not say how the model writes boxes. Pass "
                'box_format, for instance {"scale": 1000, "order": "xyxy", "padded": False}.'
            )
        objects = [objects] if isinstance(objects, str) else list(objects)
        form = prompt or self.box_format.get("prompt") or BOXES
        form = form.replace("{scale}", f"{self.box_format['scale']:g}")
        questions = [form.replace("{object}", name) for name in objects]
        overlap = default_overlap(tile) if overlap is None else overlap
        run = self._run("detect", [raster], questions, area, tile, overlap, resolution, checkpoint)
        rows = []
        for index, name in enumerate(objects):
            found = [
                (box, number, outcome.replies[index])
                for number, outcome in enumerate(run.outcomes)
                if outcome.state == "answered"
                for box in outcome.replies[index].boxes
            ]
            boxes = np.array([box[:4] for box, _, _ in found], dtype=float).reshape(-1, 4)
            owners = [number for _, number, _ in found]
            for group in merge_boxes(boxes, owners, [piece.window for piece in run.pieces]):
                sides = boxes[group][:, 2:] - boxes[group][:, :2]
                best = group[int(np.argmax(sides.prod(1)))]
                scores = [found[member][0][4] for member in group if found[member][0][4] is not None]
                box = at_least_a_pixel(unite(boxes[group]))
                centre = shapely.Point((box[:2] + box[2:]) / 2)
                if run.shape is not None and not run.shape.covers(centre):
                    continue
                _, number, reply = found[best]
                rows.append(
                    run.row(questions[index], reply, run.pieces[number], max(scores, default=None))
                    | {"count": 1, "object": name, "geometry": shapely.box(*box)}
                )
        return run.frame(rows, label="object")

    def point(self, raster: Any, objects: str | Sequence[str], **options: Any) -> geopandas.GeoDataFrame:
        """The centres of what `detect` finds, as points; arguments as for `detect`."""
        frame = self.detect(raster, objects, **options)
        frame.geometry = geopandas.GeoSeries(shapely.centroid(frame.geometry.array), index=frame.index, crs=frame.crs)
        frame.attrs["record"]["task"] = "point"
        return frame

    def compare(
        self,
        before: Any,
        after: Any,
        questions: str | Sequence[str] = CHANGE,
        area: Any = None,
        tile: int | None = None,
        resolution: float | None = None,
        checkpoint: str | Path | None = None,
    ) -> geopandas.GeoDataFrame:
        """Answers about two dates of one place, shown as two images of one question.

        The second raster is laid over the pixels of the first and shown with the same stretch.

        Args:
            before: as in the class.
            after: what `Raster.open` takes, or a raster that was opened with `like=before`.
            questions: one or more.
            area, tile, resolution, checkpoint: see the class.

        Returns:
            As for `query`.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        with opened(before, **self.opening) as (first, *_), opened(after, like=first, **self.opening) as (second, *_):
            run = self._run("compare", [first, second], questions, area, tile, None, resolution, checkpoint)
        return run.frame(run.rows())

    def _ask_features(
        self, raster: Any, questions: list[str], features: Any, resolution: float | None, checkpoint: Any
    ) -> geopandas.GeoDataFrame:
        layer = read_layer(features, "features").copy()
        with opened(raster, **self.opening) as views:
            source = views[0]
            scale = find_scale(source, resolution)
            places, pieces = plan_features(source, layer, scale)
            grid = {"kind": "features", "resolution": resolution, "features": len(layer)}
            run = Run.start(self, "query", views, questions, pieces, grid, None, checkpoint)
        several = len(questions) > 1
        columns: dict[str, list[Any]] = {}
        for index, question in enumerate(questions):
            ending = f"_{index + 1}" if several else ""
            for place in places:
                outcome = Outcome("outside") if place is None else run.outcomes[place]
                reply = outcome.replies[index] if outcome.state == "answered" else None
                row = {
                    "question": question,
                    **reply_columns(reply),
                    "error": MISSING.get(outcome.state, outcome.reason or None),
                }
                for name, value in row.items():
                    columns.setdefault(f"{name}{ending}", []).append(value)
        label = None
        for name, values in columns.items():
            while name in layer.columns:
                name = f"{name}_new"
            layer[name] = values
            label = label or (name if name.startswith("answer") else None)
        layer.attrs = {"record": run.record(), "label": label}
        return layer

    def _run(
        self,
        task: str,
        rasters: list[Any],
        questions: list[str],
        area: Any,
        tile: int | None,
        overlap: int | None,
        resolution: float | None,
        checkpoint: str | Path | None,
        shifted: bool = False,
    ) -> "Run":
        """Asks the questions on a partition or, with an overlap, on overlapping tiles."""
        with opened(rasters[0], **self.opening) as views:
            source, rasters = views[0], [*views, *rasters[1:]]
            scale = find_scale(source, resolution)
            shape, pieces = plan_tiles(source, area, scale, tile, overlap, shifted)
            grid: dict[str, Any] = {"kind": "whole" if tile is None else "partition" if overlap is None else "overlapping"}
            grid |= {"tile": tile, "overlap": overlap, "shifted": shifted, "resolution": resolution}
            grid |= {"area": None if shape is None else shapely.to_wkt(shape, rounding_precision=3)}
            return Run.start(self, task, rasters, questions, pieces, grid, shape, checkpoint)


def padding_colour(processor: Any) -> Fill:
    """What becomes zero when images are normalised, with which many models pad them: a colour, or values by band."""
    mean = getattr(getattr(processor, "image_processor", None), "image_mean", None)
    bands = bands_of_processor(processor)
    if not isinstance(mean, (list, tuple)) or len(mean) != len(bands or COLOURS):
        return FILL
    values = [min(255, max(0, int(255 * value))) for value in mean]
    if bands is not None:
        return dict(zip(bands, values, strict=True))
    red, green, blue = values
    return red, green, blue


def bands_of_processor(processor: Any) -> list[str] | None:
    """Names of the bands of a model, if they are more than red, green and blue."""
    names = getattr(getattr(processor, "image_processor", None), "image_bands", None)
    return None if names is None or set(names) <= set(COLOURS) else list(names)


def training_images(name: str, revision: str | None = None) -> str | None:
    """What the field `training_images` in the metadata of a model's card says."""
    try:
        folder = Path(name)
        path = (
            folder / "README.md"
            if folder.is_dir()
            else huggingface_hub.hf_hub_download(name, "README.md", revision=revision)
        )
        card = huggingface_hub.metadata_load(path) or {}
    except Exception:  # no card, no connection or damaged YAML: nothing is known
        return None
    return card.get("training_images")


@contextmanager
def opened(source: Any, **options: Any) -> Iterator[list[Raster]]:
    """A `Raster`, or several of one place, as they are; what `Raster.open` takes is opened, and closed at the end."""
    if isinstance(source, Raster):
        yield [source]
    elif isinstance(options.get("composite"), list):
        names = options.pop("composite")
        with open_views(source, names, **options) as views:
            yield views
    elif isinstance(source, (list, tuple)):
        if not source or not all(isinstance(view, Raster) for view in source):
            raise RasterError("several views of one place must be opened rasters: open_views(path, composites).")
        sizes = {(view.width, view.height) for view in source}
        if len(sizes) > 1:
            raise RasterError(f"views of one place have {len(sizes)} sizes: open each with like= the first.")
        yield list(source)
    else:
        with Raster.open(source, **options) as raster:
            yield [raster]


@contextmanager
def open_views(
    source: Any,
    composites: Sequence[str],
    image_bands: Sequence[str] | None = None,
    missing_bands: str = "fill",
    **options: Any,
) -> Iterator[list[Raster]]:
    """Opens one raster several times, as one image for each composite, closed at the end.

    Args:
        source: see `Raster.open`.
        composites: keys in `composites.COMPOSITES`, such as `["true_color", "ndvi"]`; or `"new_bands"`, those of
            `image_bands` beside red, green and blue as one image.
        image_bands, missing_bands: of a model with more than three bands, see `Raster.open`.
        **options: further arguments of `Raster.open`.

    Raises:
        RasterError: see `Raster.open`; a composite comes twice; or there are no new bands.
    """
    names = [NEW_BANDS if composite_key(name) == NEW_BANDS else find_composite(name) for name in composites]
    if not names or len(set(names)) < len(names):
        raise RasterError(f"composites {', '.join(names) or '(none)'}: give different ones.")
    new = [name for name in image_bands or () if name not in COLOURS]
    if NEW_BANDS in names and not new:
        raise RasterError(
            f"{NEW_BANDS} are bands of a model with more than red, green and blue, and this one has no others."
        )

    def shown_as(name: str) -> dict[str, Any]:
        return {"image_bands": new, "missing_bands": missing_bands} if name == NEW_BANDS else {"composite": name}

    with ExitStack() as stack:
        first = stack.enter_context(Raster.open(source, **shown_as(names[0]), **options))
        others = {"stretch": "auto", **options, "like": first}
        yield [first, *(stack.enter_context(Raster.open(source, **shown_as(name), **others)) for name in names[1:])]
