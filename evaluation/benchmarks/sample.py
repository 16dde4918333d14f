"""The data classes of benchmarks: `Sample`, `Metric`, and `Benchmark`, which opens images and defines the metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ...image_sources_mfrsvlm import EIGHT_BIT_MODES, locate, open_image


LONGEST_MESSAGE = 900  # characters


class BenchmarkError(ValueError):
    """Files of a benchmark that are missing, broken or not as published. The message names the file and, if any, the row.

    The message is one line of limited length, whatever the files contain.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in message[: LONGEST_MESSAGE + 1])
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}…")


@dataclass(frozen=True)
class Metric:
    """The name of a metric in `evaluation.metrics`, and the settings that the benchmark prescribes."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


# Default metrics of each task. The first one computes the score of each sample.
METRICS: Mapping[str, tuple[Metric, ...]] = {
    "classification": (Metric("classification_accuracy"),),
    "vqa": (Metric("vqa_accuracy"),),
    "captioning": (Metric("captioning"),),
    "grounding": (Metric("visual_grounding"),),
    "counting": (Metric("counting"),),
    "detection": (Metric("object_detection"),),
    "pointing": (Metric("pointing"),),
}
# Tasks whose truth is boxes. The answer to a task of `LIST_TASKS` is a list, which may be empty.
LIST_TASKS = ("detection", "pointing")
BOX_TASKS = ("grounding", *LIST_TASKS)


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: unique in the split.
        images: names of images, for `Benchmark.read_image`.
        task: "classification", "vqa", "captioning", "grounding" (the box of one object, or of a given number of them),
            "counting", "detection" (the boxes of all objects of a kind) or "pointing" (a point on each of them).
        question: the question, the referring expression, or for detection and pointing the kind of object; "" if the
            benchmark has none.
        references: the class, the answers, the captions, or the count in digits; () for tasks with boxes.
        group: the type of the question, or the class. Figures are also reported by group.
        template: the question without its nouns, if questions were made from templates. The majority baseline predicts
            the most frequent answer to each template.
        boxes: for grounding, detection and pointing: [x1, y1, x2, y2], or the four corners of an oriented box in order, in
            pixels of the image after EXIF orientation. Empty only for detection and pointing, if there is no such object. A
            few boxes of published benchmarks have no area.
        choices: options of a multiple-choice question, in order, without their letters.
        image_size: (width, height) in pixels; for tasks with boxes only.
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
    """The samples of one split, and the properties that protocols read.

    Attributes:
        name: a key of `BENCHMARKS`.
        split: name of the split.
        root: folder of the images; `None` if they are not files.
        samples: the samples.
        class_names: readable names of all classes that may be the answer; empty if there are none.
        open_image: opens an image by its name if images are not files.
        complete_prompts: whether the questions already state the form of the answer.
        allow_outside_images: whether images may be URLs, or files outside of `root` (also through symbolic links).
        metrics: metrics by task, if they differ from `METRICS`.
        tag: tag of RSEvalKit for the questions of this split; "" for the tag of the task.
        numeric_types: groups of questions with numeric answers, which some publications leave out.
        left_out: what the user left out on purpose, with counts: `{"rows with a missing word": 294}`.
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
        """The metrics of a task. The first one computes the score of each sample."""
        return self.metrics.get(task) or METRICS[task]

    def read_image(self, name: str) -> Image.Image:
        """An image of a sample as RGB, with its EXIF orientation applied.

        Raises:
            BenchmarkError: the image does not exist, is outside of `root`, is broken, or is not 8-bit gray or RGB. The
                message names the file and a sample that uses it.
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
            f"{self._where(name)} has mode {image.mode}; convert it to 8-bit RGB first, and report how you did it."
        )

    def check_image(self, name: str, sample: str) -> None:
        """Raises `BenchmarkError` if the image of a sample is not a file that may be opened. It is not decoded."""
        try:
            if not isinstance(name, str):
                raise TypeError(f"its name is a {type(name).__name__}, not text")
            if urlsplit(name).scheme not in ("http", "https"):
                locate(name, self.root, self.allow_outside_images)
            elif not self.allow_outside_images:
                raise ValueError("it is an address, and only files may be opened here")
        except (OSError, ValueError, TypeError) as error:
            raise BenchmarkError(f"{self._where(name, sample)} cannot be read: {error}") from error

    def _where(self, name: str, sample: str | None = None) -> str:
        sample = sample or next((sample.id for sample in self.samples if name in sample.images), None)
        return f"Image {self.root / str(name)} of sample {sample!r} of {self.name}"
