"""What every loader gives: samples, and the benchmark that holds them, opens their images and says how they are scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...image_sources_mfrsvlm import EIGHT_BIT_MODES, open_image


class BenchmarkError(ValueError):
    """Files of a benchmark that are missing, broken or not what was published. Names the file and, if any, the row."""


@dataclass(frozen=True)
class Metric:
    """A metric of `evaluation.metrics` by its name, and the settings that the benchmark fixes."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


# The metrics of a task, unless a benchmark has its own. The first one gives the score of each sample.
METRICS: Mapping[str, tuple[Metric, ...]] = {
    "classification": (Metric("classification_accuracy"),),
    "vqa": (Metric("vqa_accuracy"),),
    "captioning": (Metric("captioning"),),
    "grounding": (Metric("visual_grounding"),),
    "counting": (Metric("counting"),),
}


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
        template: the question without its nouns, where questions were made from templates. The majority baseline takes the
            most frequent answer of each.
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
    """The samples of one split, and what a protocol has to know about them.

    Attributes:
        root: folder that names of images start from; `None` if there are no files.
        class_names: all classes that may be the answer, readable; empty where there are none.
        open_image: gives an image by its name where images are no files.
        complete_prompts: whether the questions say all that a model needs to know about the form of the answer.
        allow_outside_images: whether images may be addresses, or lie outside of `root` (also by a link).
        metrics: metrics by task where they are not those of `METRICS`.
        tag: tag that RSEvalKit puts before the questions of this split; "" for that of the task.
        numeric_types: groups of questions whose answers are numbers, and that some publications leave out.
        left_out: what the user left out on purpose, and how many: `{"rows with a missing word": 294}`.
    """

    name: str
    split: str
    root: Path | None
    samples: list[Sample]
    class_names: list[str] = field(default_factory=list)
    open_image: Callable[[str], Image.Image] | None = None
    complete_prompts: bool = False
    allow_outside_images: bool = False
    metrics: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)
    tag: str = ""
    numeric_types: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def metrics_of(self, task: str) -> tuple[Metric, ...]:
        """The metrics of a task. The first one gives the score of each sample."""
        return self.metrics.get(task) or METRICS[task]

    def read_image(self, name: str) -> Image.Image:
        """An image of a sample as RGB, upright as its EXIF data say.

        Raises:
            BenchmarkError: there is no such image, it lies outside of `root`, it is broken, or it is not 8-bit gray or RGB:
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
