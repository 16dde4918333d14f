"""The page: choose bands and stretch of a raster, ask a question, see boxes and which windows the injectors preferred."""

import threading
import warnings
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pandas
from PIL import Image

from ..demo.answering import answer
from ..demo.ask import open_image_or_raster
from ..geospatial.composites import COMPOSITES
from ..geospatial.errors import RasterError, RasterWarning
from ..geospatial.raster import Raster, is_georeferenced
from ..geospatial.sensors import SENSORS
from ..inspection.routers import draw_preference, has_routers, preferences, recorded_routers


AUTO = "auto"
STRETCHES = (AUTO, "none", "percentile", "percentile:1,99", "physical")
POINTERS = frozenset({"VRT", "WMS", "WMTS", "WCS", "GTI", "STACIT", "STACTA", "DERIVED", "XYZ"})
COLORS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "value": "#7f7f7f"}
SHOWN_SIDE = 1024  # pixels, of the images on the page


class Reader:
    """Opens what a user of the page has uploaded, and nothing else."""

    def open(
        self, path: str, bands: str, sensor: str, composite: str, stretch: str
    ) -> tuple[Image.Image, Any, pandas.DataFrame]:
        """The image, the record of a raster (else `None`), and the histogram of its channels.

        Raises:
            gradio.Error: it cannot be shown. The message is that of the reader.
        """
        given = {"bands": bands.strip(), "sensor": sensor, "composite": composite, "stretch": stretch}
        options = {name: value for name, value in given.items() if value not in ("", AUTO)}
        try:
            if not options and not is_georeferenced(path):
                image, _ = open_image_or_raster(path, {})
                image = image.convert("RGB")
                return image, None, histogram(np.asarray(image).transpose(2, 0, 1), None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RasterWarning)  # shown on the page instead
                with Raster.open(path, **options) as raster:
                    if raster.driver in POINTERS:
                        raise RasterError(f"{Path(path).name} points to other files ({raster.driver}). Upload those.")
                    view = raster.read()
                    values, valid = raster.sample()
                    return view.image, view.record, histogram(values, valid)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error).replace(path, Path(path).name)) from error


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
    reader = Reader()
    turn = threading.Lock()  # hooks on the injectors see one question at a time

    def read(path: str | None, *options: str) -> tuple[Any, ...]:
        if path is None:
            return None, None, "Upload a raster or a photograph.", None
        image, record, counts = reader.open(path, *options)
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
            boxes = gradio.AnnotatedImage(label="Boxes in the answer")
            windows = gradio.Gallery(label="Windows that the injectors preferred", columns=2, height=400)
        choices = [file, bands, sensor, composite, stretch]
        views = [image, shown, about, counts]
        for choice in choices:
            choice.change(read, choices, views, api_name=False)
        page.load(read, choices, views, api_name=False)
        button.click(ask, [image, question], [text, boxes, windows], api_name="ask")
        question.submit(ask, [image, question], [text, boxes, windows], api_name=False)
    return page
