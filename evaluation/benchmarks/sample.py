"""What every loader gives: samples, and the benchmark that holds them and opens their images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


# Modes of 8-bit images whose conversion to RGB loses nothing that is seen.
EIGHT_BIT = ("L", "LA", "P", "RGB", "RGBA")

_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL = 258, 277  # tags of TIFF


class BenchmarkError(ValueError):
    """Files of a benchmark that are missing, broken or not what was published. Names the file and, if any, the row."""


@dataclass(frozen=True)
class Sample:
    """One thing to ask a model.

    Attributes:
        id: unique in the split.
        images: names that `Benchmark.read_image` understands.
        task: "classification", "vqa", "captioning", "grounding" or "counting".
        question: the question, the referring expression, or "" where the benchmark asks nothing in words.
        references: the class; the answers; the captions; the number in digits; () for grounding.
        group: the type of the question, or the class; figures are split by it.
        template: the question without its nouns, where questions were made from templates: chance is taken for each.
        boxes: grounding only: [x1, y1, x2, y2], or the four corners of an oriented box in order, in pixels of the image as
            stored. As published: a few boxes of published benchmarks have no area.
        choices: options of a multiple-choice question, in order, without their letters.
        image_size: (width, height) in pixels; grounding only.
    """

    id: str
    images: tuple[str, ...]
    task: str
    question: str
    references: tuple[str, ...]
    group: str = ""
    template: str = ""
    boxes: tuple[tuple[float, ...], ...] = ()
    choices: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None


@dataclass
class Benchmark:
    """The samples of one split.

    Attributes:
        root: folder that names of images start from; `None` if there are no files.
        complete_prompts: whether the questions say all that a model needs to know about the form of the answer.
        class_names: all classes that may be the answer, readable; empty where there are none.
        open_image: gives an image by its name where images are no files.
    """

    name: str
    split: str
    root: Path | None
    samples: list[Sample]
    class_names: list[str] = field(default_factory=list)
    open_image: Callable[[str], Image.Image] | None = None
    complete_prompts: bool = False

    def read_image(self, name: str) -> Image.Image:
        """An image of a sample as RGB, upright as stored.

        Raises:
            BenchmarkError: there is no such image, it is broken, or it is not 8-bit grey or RGB: how to stretch other
                images is not for a loader to guess. Names the file and a sample that shows it.
        """
        if self.root is None:
            return self.open_image(name)
        try:
            with Image.open(self.root / name) as image:
                found = _not_eight_bit(image)
                if not found:
                    return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BenchmarkError(
                f"{self._where(name)} cannot be read: {error}. It is missing, broken, or no 8-bit grey or RGB image."
            ) from error
        raise BenchmarkError(f"{self._where(name)} is {found}; convert it to 8-bit RGB first, and say in the report how.")

    def _where(self, name: str) -> str:
        sample = next((sample.id for sample in self.samples if name in sample.images), None)
        return f"Image {self.root / name} of sample {sample!r} of {self.name}"


def _not_eight_bit(image: Image.Image) -> str:
    """What an image is if it is not 8-bit grey or RGB, else ""."""
    if image.mode not in EIGHT_BIT:
        return f"of mode {image.mode}"
    if image.format == "TIFF":  # Pillow would take the high byte of 16 bits, and the first three of many bands
        bits, bands = image.tag_v2.get(_BITS_PER_SAMPLE, (8,)), image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
        if max(bits) > 8 or bands > 4:
            return f"a TIFF of {bands} bands of {max(bits)} bits"
    return ""
