"""What every loader gives: samples, and the benchmark that holds them and opens their images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ...image_sources_mfrsvlm import EIGHT_BIT_MODES, open_image


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
        boxes: grounding only: [x1, y1, x2, y2], or the four corners of an oriented box in order, in pixels of the image,
            turned as its EXIF data say. As published: a few boxes of published benchmarks have no area.
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
        allow_outside_images: whether images may be addresses, or lie outside of `root` (also by a link).
    """

    name: str
    split: str
    root: Path | None
    samples: list[Sample]
    class_names: list[str] = field(default_factory=list)
    open_image: Callable[[str], Image.Image] | None = None
    complete_prompts: bool = False
    allow_outside_images: bool = False

    def read_image(self, name: str) -> Image.Image:
        """An image of a sample as RGB, upright as its EXIF data say.

        Raises:
            BenchmarkError: there is no such image, it lies outside of `root`, it is broken, or it is not 8-bit grey or RGB:
                how to stretch other images is not for a loader to guess. Names the file and a sample that shows it.
        """
        if self.root is None:
            return self.open_image(name)
        try:
            image = open_image(name, self.root, self.allow_outside_images)
            if image.mode in EIGHT_BIT_MODES:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BenchmarkError(f"{self._where(name)} cannot be read: {error}") from error
        raise BenchmarkError(
            f"{self._where(name)} has mode {image.mode}; convert it to 8-bit RGB first, and say in the report how."
        )

    def _where(self, name: str) -> str:
        sample = next((sample.id for sample in self.samples if name in sample.images), None)
        return f"Image {self.root / name} of sample {sample!r} of {self.name}"
