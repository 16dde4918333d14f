"""The page: choose bands and stretch of a raster, ask about one image of it, or about all of it in tiles."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pandas
from PIL import Image

from ..demo.answering import answer
from ..demo.ask import open_image_or_raster
from ..geospatial.areas import to_pixels
from ..geospatial.assistant import GeoAssistant
from ..geospatial.composites import COMPOSITES
from ..geospatial.errors import RasterError, without_warnings
from ..geospatial.raster import Raster, is_georeferenced
from ..geospatial.sensors import SENSORS
from ..geospatial.vectors import write_layer
from ..inspection.routers import draw_preference, has_routers, preferences, recorded_routers


AUTO = "auto"
STRETCHES = (AUTO, "none", "percentile", "percentile:1,99", "physical")
POINTERS = frozenset({"VRT", "WMS", "WMTS", "WCS", "GTI", "STACIT", "STACTA", "DERIVED", "XYZ"})
COLORS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "value": "#7f7f7f"}
FIND, COUNT, ASK = "find", "count", "ask"
PROGRESS = gradio.Progress(track_tqdm=True)  # as a default value, it makes gradio show the bar of the tiles
SHOWN_SIDE = 1024  # pixels, of the images on the page


@contextmanager
def open_raster(path: str, options: dict[str, str]) -> Iterator[Raster]:
    """An uploaded raster.

    Args:
        path: the uploaded file.
        options: arguments of `Raster.open`.

    Raises:
        RasterError: see `Raster.open`; or it is only a pointer to other files, which would be those of the server.
    """
    with without_warnings(), Raster.open(path, **options) as raster:
        if raster.driver in POINTERS:
            raise RasterError(f"{Path(path).name} points to other files ({raster.driver}). Upload those.")
        yield raster


def raster_choices(bands: str, sensor: str, composite: str, stretch: str) -> dict[str, str]:
    """The choices on the page as arguments of `Raster.open`."""
    given = {"bands": bands.strip(), "sensor": sensor, "composite": composite, "stretch": stretch}
    return {name: value for name, value in given.items() if value not in ("", AUTO)}


@contextmanager
def shown_errors(path: str) -> Iterator[None]:
    """Shows errors of readers on the page, without folders of the server."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error).replace(path, Path(path).name)) from error


def read_upload(
    path: str, bands: str, sensor: str, composite: str, stretch: str
) -> tuple[Image.Image, Any, pandas.DataFrame]:
    """The image in an uploaded file, the record of a raster (else `None`), and the histogram of its channels.

    Raises:
        gradio.Error: it cannot be shown. The message is that of the reader.
    """
    options = raster_choices(bands, sensor, composite, stretch)
    with shown_errors(path):
        if not options and not is_georeferenced(path):
            image = open_image_or_raster(path, {})[0].convert("RGB")
            return image, None, histogram(np.asarray(image).transpose(2, 0, 1), None)
        with open_raster(path, options) as raster:
            view = raster.read()
            values, valid = raster.sample()
            return view.image, view.record, histogram(values, valid)


def histogram(values: np.ndarray, valid: np.ndarray | None, bins: int = 64) -> pandas.DataFrame:
    """Counts of the values of each channel, for a line plot.

    Args:
        values: (channels, ...), in the numbers of the file.
        valid: where they are data, of the same shape. `None`: everywhere.
        bins: number of bins between the smallest and the largest value.
    """
    names = ("red", "green", "blue") if len(values) == 3 else ("value",)
    kept = [plane[good] for plane, good in zip(values, values == values if valid is None else valid, strict=True)]
    edges = np.histogram_bin_edges(np.concatenate(kept), bins)
    middles = (edges[:-1] + edges[1:]) / 2
    columns = [
        pandas.DataFrame({"value": middles, "pixels": np.histogram(plane, edges)[0], "channel": name})
        for plane, name in zip(kept, names, strict=True)
    ]
    return pandas.concat(columns)


def describe(image: Image.Image, record: Any) -> str:
    """What was read, as Markdown."""
    if record is None:
        return f"{image.width} x {image.height} pixels, no raster."
    limits = ", ".join(f"{low:g} to {high:g}" for low, high in zip(record.stretch.low, record.stretch.high, strict=True))
    lines = [
        f"Bands {', '.join(map(str, record.bands))} as `{record.composite}`, from {record.bands_from}.",
        f"Stretch `{record.stretch.kind}`: {limits}. No data: {100 * record.nodata_share:.1f} %.",
        f"Place: {record.crs or 'no CRS'}, {record.georeferencing}.",
        *record.notes,
    ]
    return "\n".join(f"- {line}" for line in lines)


def make_page(model: Any, processor: Any, name: str, scene: str | None = None) -> gradio.Blocks:
    """The page for one model.

    Args:
        model: image-text-to-text model on its device.
        processor: its processor.
        name: what the page calls the model.
        scene: an image to begin with.
    """
    turn = threading.Lock()  # hooks on the injectors see one question at a time

    assistant = GeoAssistant.of_model(model, processor, name, progress=True)

    def survey(
        path: str | None,
        bands: str,
        sensor: str,
        composite: str,
        stretch: str,
        task: str,
        text: str,
        tile: float,
        progress: Any = PROGRESS,
    ) -> tuple[Any, ...]:
        """Answers about all tiles of a raster: a summary, a table, boxes on a small image, and the layer as a file."""
        if path is None or not text.strip():
            raise gradio.Error("Upload a raster, and type what to look for.")
        with turn, shown_errors(path), open_raster(path, raster_choices(bands, sensor, composite, stretch)) as raster:
            if task == FIND:
                layer = assistant.detect(raster, text, tile=int(tile))
            elif task == COUNT:
                layer = assistant.count(raster, text, tile=int(tile))
            else:
                layer = assistant.query(raster, text, tile=int(tile))
            small = raster.read(max_side=SHOWN_SIDE).image
            shapes = to_pixels(layer.geometry, raster.grid) if layer.crs is not None else list(layer.geometry)
            scale = np.tile([small.width / raster.width, small.height / raster.height], 2)
        boxes = [tuple(np.round(np.array(shape.bounds) * scale).astype(int).tolist()) for shape in shapes]
        names = layer["object"] if task == FIND else [str(value) for value in layer["answer"]]
        file = Path(tempfile.mkdtemp(prefix="mfrsvlm-")) / "answers.gpkg"
        write_layer(layer, file)
        totals = layer.attrs.get("totals", {text: {"found": len(layer)}} if task == FIND else {})
        lines = [f"- {key}: {', '.join(f'{what} {value:g}' for what, value in row.items())}" for key, row in totals.items()]
        table = pandas.DataFrame(layer.drop(columns=layer.geometry.name))
        return "\n".join(lines), table, (small, list(zip(boxes, names, strict=True))), str(file)

    def read(path: str | None, *options: str) -> tuple[Any, ...]:
        if path is None:
            return None, None, "Upload a raster or a photograph.", None
        image, record, counts = read_upload(path, *options)
        shown = image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return image, shown, describe(image, record), counts

    def ask(image: Image.Image | None, question: str) -> tuple[str, Any, list[Any]]:
        if image is None or not question.strip():
            raise gradio.Error("Upload a raster or a photograph, and type a question.")
        with turn:
            if has_routers(model.config):
                with recorded_routers(model) as records:
                    reply = answer(model, processor, image, [question])[0]
                found = preferences(model.config, records)
                largest = max(float(preference.by_place.max()) for preference in found)
                windows = [
                    (
                        draw_preference(image, preference, largest),
                        f"{preference.window_size} px, depth {preference.depth}: {100 * preference.share:.0f} %",
                    )
                    for preference in found
                ]
            else:
                reply, windows = answer(model, processor, image, [question])[0], []
        boxes = [(tuple(round(value) for value in box), f"box {number}") for number, box in enumerate(reply.boxes, 1)]
        return reply.text, (image, boxes), windows

    with gradio.Blocks(title="MF-RSVLM") as page:
        gradio.Markdown(f"# Ask about an overhead image\n\nModel: `{name}`. Answers may be wrong, above all counts.")
        image = gradio.State()
        with gradio.Row():
            with gradio.Column():
                file = gradio.File(scene, label="Raster or photograph", type="filepath")
                with gradio.Row():
                    composite = gradio.Dropdown([AUTO, *COMPOSITES], value=AUTO, label="Composite")
                    sensor = gradio.Dropdown([AUTO, *SENSORS], value=AUTO, label="Sensor")
                with gradio.Row():
                    bands = gradio.Textbox(label="Bands", placeholder="4,3,2")
                    stretch = gradio.Dropdown(STRETCHES, value=AUTO, label="Stretch", allow_custom_value=True)
                about = gradio.Markdown()
                counts = gradio.LinePlot(
                    x="value", y="pixels", color="channel", label="Histogram", height=180, color_map=COLORS
                )
            with gradio.Column():
                shown = gradio.Image(label="What the model sees", type="pil", interactive=False)
        question = gradio.Textbox("How many aircraft are there?", label="Question")
        button = gradio.Button("Ask", variant="primary")
        text = gradio.Textbox(label="Answer", interactive=False)
        with gradio.Row():
            boxes = gradio.AnnotatedImage(label="Boxes in the answer", height=480)
            windows = gradio.Gallery(label="Windows that the injectors preferred", columns=2, height=400)
        with gradio.Accordion("The whole raster, in tiles", open=False):
            with gradio.Row():
                task = gradio.Dropdown([FIND, COUNT, ASK], value=FIND, label="Task")
                target = gradio.Textbox("building", label="Object or question")
                tile = gradio.Number(512, minimum=64, precision=0, label="Longest side of a tile, pixels")
            survey_button = gradio.Button("Run")
            summary = gradio.Markdown()
            places = gradio.AnnotatedImage(label="Results on the raster", height=480)
            table = gradio.Dataframe(label="Answers", interactive=False)
            layer_file = gradio.File(label="GeoPackage", interactive=False)
        choices = [file, bands, sensor, composite, stretch]
        views = [image, shown, about, counts]
        for choice in choices:
            choice.change(read, choices, views, api_name=False)
        page.load(read, choices, views, api_name=False)
        button.click(ask, [image, question], [text, boxes, windows], api_name="ask")
        question.submit(ask, [image, question], [text, boxes, windows], api_name=False)
        survey_button.click(survey, [*choices, task, target, tile], [summary, table, places, layer_file], api_name="survey")
    return page
