"""A model without mistakes, for rasters in which every object is a rectangle of a colour of its own on black."""

from typing import Any

import numpy as np
from PIL import Image

from mfrsvlm.evaluation.answering import Answer, EncodedImages, Prompt
from mfrsvlm.geospatial import GeoAssistant


FORM = {"scale": 1000, "order": "xyxy", "padded": False}


def rectangles(width: int, height: int, boxes: Any) -> np.ndarray:
    """(3, height, width), uint8, with a box (x_min, y_min, x_max, y_max) in whole pixels for each object."""
    image = np.zeros((3, height, width), np.uint8)
    for number, (left, top, right, bottom) in enumerate(np.asarray(boxes, int).tolist(), start=1):
        image[:, top:bottom, left:right] = np.array([number % 250 + 1, number // 250 + 1, 255])[:, None, None]
    return image


def visible_boxes(image: Image.Image, blurred: bool = False) -> list[tuple[int, int, int, int]]:
    pixels = np.asarray(image).astype(int)
    codes = np.where(pixels[..., 2] == 255, pixels[..., 0] + 256 * pixels[..., 1], 0)
    if blurred:
        codes = (pixels[..., 2] > 127).astype(int)
    found = []
    for code in np.unique(codes[codes > 0]).tolist():
        rows, columns = np.nonzero(codes == code)
        found.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return found


class PerfectAnswerer:
    """Answers as an `Answerer` does: boxes to "Give the bounding box ...", else the number of objects whose centre is seen.

    Args:
        fails: raises for the images for which this function is true.
        blurred: take all that is bright for one object, since resampling mixes colours.
    """

    def __init__(self, fails: Any = None, blurred: bool = False) -> None:
        self.images: list[list[Image.Image]] = []  # that were encoded
        self.prompts: list[str] = []
        self.fails, self.blurred = fails, blurred

    def encode_images(self, groups: Any, prompts: list[Prompt]) -> EncodedImages:
        if self.fails is not None and any(self.fails(image) for group in groups for image in group):
            raise RuntimeError("out of memory")
        self.images += groups
        return EncodedImages(groups)

    def answer(self, batch: list[Prompt], encoded: EncodedImages) -> list[Answer]:
        self.prompts += [prompt.text for prompt in batch]
        return [Answer(self.reply(prompt.text, encoded.groups[prompt.group])) for prompt in batch]

    def reply(self, question: str, images: list[Image.Image]) -> str:
        width, height = images[0].size
        boxes = visible_boxes(images[0], self.blurred)
        if not question.startswith("Give the bounding box"):
            return f"There are {len(boxes)}."
        scaled = [[1000 * value / side for value, side in zip(box, (width, height) * 2, strict=True)] for box in boxes]
        return " ".join("[" + ", ".join(f"{value:.4f}" for value in box) + "]" for box in scaled) or "none"


def perfect(**options: Any) -> GeoAssistant:
    return GeoAssistant(options.pop("answerer", None) or PerfectAnswerer(), {"name": "perfect"}, FORM, **options)
