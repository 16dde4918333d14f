"""Named protocols: prompt, length, how an answer is read, and metric, held together so that a number has a name.

`strict` is the default. The others follow published evaluations, so that numbers can be compared with theirs. Where a
published script is at fault, the protocol is corrected and says what was wrong.

A protocol never looks at the name of a benchmark. What it has to know stands in the benchmark: its metrics, its tag, the
types of questions whose answers are numbers, and its second test split.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Value
from PIL import Image

from ..processing_mfrsvlm import parse_boxes
from .benchmarks import Benchmark, BenchmarkInfo, Metric, Sample
from .metrics import load_metric
from .metrics._java import java_command


logger = logging.getLogger(__name__)

Box = tuple[float, ...]  # x1, y1, x2, y2, or four corners, in pixels of the upright image
NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
# {<x1><y1><x2><y2>} and, for oriented boxes, {<x1><y1><x2><y2>|<degrees>}
ANGLED_BOX = re.compile(rf"\{{{4 * f'<{NUMBER}>'}(?:\|\s*<{NUMBER}>\s*)?\}}")


class Protocol:
    """What all protocols share: how a question is asked, how an answer is read, and how a task is scored.

    A protocol is a subclass that changes what it does otherwise.

    Attributes:
        max_new_tokens: length from which an answer is truncated.
        short_answer: what stands below a question with a short answer.
        class_parsing, vqa_parsing: how answers are compared, see `classification_accuracy` and `vqa_accuracy`.
        captions: variant of the metric `captioning`.
        thresholds: intersections over union from which on a box counts as found.
    """

    name: str
    max_new_tokens = 128
    short_answer = "Answer with a single word or phrase."
    class_parsing = "exact"
    vqa_parsing = "exact"
    captions = "coco"
    thresholds: tuple[float, ...] = (0.5, 0.7)
    box_scale = 1000  # numbers of boxes in answers run from 0 to this over each side of the image

    def default_split(self, info: BenchmarkInfo | None) -> str | None:
        """The split that is asked if the user names none; `None` if there is none, or no such benchmark."""
        return info.default_split if info else None

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises OSError if these samples could not be scored, before hours are spent on asking them."""
        if self.captions == "coco" and any(sample.task == "captioning" for sample in samples):
            java_command()

    def keeps(self, sample: Sample, benchmark: Benchmark) -> bool:
        """Whether the protocol asks this question at all."""
        return True

    def prepare_image(self, image: Image.Image) -> Image.Image:
        return image

    def prompt(self, sample: Sample, benchmark: Benchmark) -> str:
        """What the model is asked, without image markers and chat template."""
        if benchmark.complete_prompts:
            return sample.question
        if sample.choices:
            options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", sample.choices, strict=False))
            return f"{sample.question}\n{options}\nAnswer with the letter of the right option."
        return getattr(self, f"{sample.task}_prompt")(sample.question, benchmark.class_names)

    def classification_prompt(self, question: str, class_names: Sequence[str]) -> str:
        asked = question or "What is the class of this scene?"
        return f"{asked} Choose one of: {', '.join(class_names)}.\nAnswer with the name of the class only."

    def vqa_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"{question}\n{self.short_answer}"

    def counting_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"{question}\nAnswer with a number."

    def captioning_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return question or "Describe this image in one sentence."

    def grounding_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"Give the bounding box of {question} as [x_min, y_min, x_max, y_max], each number scaled to 0-1000."

    def read_boxes(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Boxes in a text, in pixels of an image of this (width, height)."""
        width, height = size
        scale = (width / 1000, height / 1000) * 2
        return [tuple(v * s for v, s in zip(box, scale, strict=True)) for box in parse_boxes(text, 1000)]

    def write_box(self, box: Box, size: tuple[int, int]) -> str:
        """A box in pixels as the prompt asks for it; four corners are written as the box around them."""
        # What lies beyond the image cannot be written, as the corner of an oriented box may. The 0 takes the sign off 0.
        scaled = [
            min(max(1000 * value / side, 0.0), 1000.0) + 0.0 for value, side in zip(bounds(box), size * 2, strict=True)
        ]
        return f"[{', '.join(f'{value:.1f}' for value in scaled)}]"

    def ideal_answer(self, sample: Sample) -> str:
        """What a model would have to say to be right; of captions, the first."""
        if sample.task == "grounding":
            return " ".join(self.write_box(box, sample.image_size) for box in sample.boxes)
        return sample.references[0]

    def score(
        self, benchmark: Benchmark, task: str, samples: Sequence[Sample], answers: Sequence[str]
    ) -> tuple[dict[str, Any], list[Any], list[float]]:
        """Figures of one task, and what was read from each answer and its score.

        A task has one metric or more. The first is set by the protocol and the benchmark, and gives the scores; the others
        are set by the benchmark alone, and add their figures.
        """
        predictions = self.predictions(task, samples, answers)
        first, *others = self.metrics(benchmark, task)
        figures = self._compute(first, task, samples, predictions, self.settings(task, benchmark, samples))
        parsed, scores = figures.pop("parsed"), figures.pop("scores")
        for metric in others:
            further = self._compute(metric, task, samples, predictions, {})
            figures |= {name: figure for name, figure in further.items() if name not in ("parsed", "scores")}
        return figures, parsed, scores

    def _compute(
        self, metric: Metric, task: str, samples: Sequence[Sample], predictions: list[Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        module = load_metric(metric.name)
        references: list[Any] = [list(sample.references) for sample in samples]
        if task == "grounding":
            references = [[list(box) for box in sample.boxes] for sample in samples]
        elif isinstance(module.features["references"], Value):  # it takes one reference
            number = module.features["references"].dtype.startswith("int")
            references = [int(one) if number else one for one, *_ in references]
        return module.compute(predictions=predictions, references=references, **settings | dict(metric.settings))

    def metrics(self, benchmark: Benchmark, task: str) -> tuple[Metric, ...]:
        return benchmark.metrics_of(task)

    def settings(self, task: str, benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
        """Settings of the first metric of a task, but for those that the benchmark fixes."""
        if task == "classification":
            return {"class_names": benchmark.class_names, "parsing": self.class_parsing}
        if task == "vqa":
            # "B", "(B)" or "B. forest", but not "A forest".
            lettered = all(re.match(r"\(?[A-E](?:[.):]|$)", sample.references[0]) for sample in samples)
            types = [sample.group or "all" for sample in samples]
            return {"question_types": types, "parsing": "letter" if lettered else self.vqa_parsing}
        if task == "captioning":
            return {"variant": self.captions}
        return {"thresholds": list(self.thresholds)} if task == "grounding" else {}

    def predictions(self, task: str, samples: Sequence[Sample], answers: Sequence[str]) -> list[Any]:
        """Answers as metrics take them: texts, or for grounding, boxes in pixels."""
        if task != "grounding":
            return list(answers)
        read = [self.read_boxes(answer, sample.image_size) for sample, answer in zip(samples, answers, strict=True)]
        # The numbers as they were written: in pixels one cannot see the scale.
        written = [self.read_boxes(answer, (self.box_scale, self.box_scale)) for answer in answers]
        largest = max((value for boxes in written for box in boxes for value in box), default=None)
        if largest is not None and largest <= 1:
            logger.warning(
                f"No number of the {sum(map(len, written))} boxes in the answers is above 1. Protocol {self.name} asks for "
                f"boxes from 0 to {self.box_scale} over the sides of the image: the model seems to answer with shares."
            )
        return [[list(box) for box in boxes] for boxes in read]


class Strict(Protocol):
    """Short prompts, exact answers (but for case, surrounding space and a full stop), COCO's caption metrics.

    Nothing but the answer is read to interpret the answer; an empty one is wrong. Boxes are asked for as
    `[x_min, y_min, x_max, y_max]`, 0 to 1000 over the image's own sides. Counts and areas of RSVQA are compared in the
    published classes (up to 10, 100, 1000, more), as that benchmark defines them.
    """

    name = "strict"


class StrictWithoutJava(Strict):
    """`strict`, but that captions are split into words by a plain rule and METEOR is left out: neither needs Java."""

    name = "strict-without-java"
    captions = "coco_without_java"


class Upstream(Protocol):
    """The scripts published with MF-RSVLM: their prompts, 64 tokens, sacrebleu and NLTK for captions, IoU 0.5 and 0.75.

    Instruction tuning used the literal tags `{IT}`, `{VQA}` and `{VG}`; of these, only boxes are asked for with theirs.

    Corrected: the published scripts look at the reference answers before they score, which is left out here, and swap width
    and height where they scale boxes, which matters on images that are not square.
    """

    name = "upstream"
    max_new_tokens = 64
    captions = "upstream"
    thresholds = (0.5, 0.75)

    def classification_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return self.vqa_prompt(question or f"What is the class of this scene: {', '.join(class_names)}?", class_names)

    def vqa_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"Answer the question based on the remote sensing image.\nQuestion: {question}\nAnswer:"

    counting_prompt = vqa_prompt

    def captioning_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return "Please provide a detailed caption for the remote sensing image."

    def grounding_prompt(self, question: str, class_names: Sequence[str]) -> str:
        form = "[x_min, y_min, x_max, y_max] scaled to 0-1000 (inclusive)"
        return f"{{VG}} {question} Answer with bounding box coordinates {form}."


class RSEvalKit(Protocol):
    """RSEvalKit, of the authors of VHM: a tag before every question, images padded to a square, 512 tokens.

    An answer is right if, in lower case and without spaces, it is contained in the reference; multiple choice goes by the
    first letter; boxes are 0 to 1000 over the image's own sides, not those of the square. The tag follows the list:
    `{IDK}` where the thing asked for may not be there, `{IT}` where there is no tag of its own.

    Corrected: an empty answer, contained in everything, was right and is wrong here; width and height were swapped where
    boxes are scaled; the tag of boxes was `{IT}`, since the script looked for another name of that task; the letter of a
    multiple choice was the first of A to E anywhere, so that "Answer: B" was A. A fault that stays, because it is the
    definition: "a" is contained in "baseball field".

    Otherwise than published: the lists on presence and color are scored by the rule above, where the kit looks for yes and
    no, or for the reference, within the answer; counts by that rule too, where it has their mean absolute error.
    """

    name = "rsevalkit"
    max_new_tokens = 512
    class_parsing = "contained"
    vqa_parsing = "contained"
    tags = {"classification": "{CLS}", "vqa": "{VQA}", "counting": "{IT}", "grounding": "{VG}", "captioning": "{IT}"}

    def prompt(self, sample: Sample, benchmark: Benchmark) -> str:
        text = super().prompt(sample, benchmark)
        tag = benchmark.tag or self.tags[sample.task]
        return text if re.match(r"\{[A-Z]+\} ", text) else f"{tag} {text}"

    def prepare_image(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in (0.48145466, 0.4578275, 0.40821073)))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    # Counts are compared as the words of any other short answer.

    def metrics(self, benchmark: Benchmark, task: str) -> tuple[Metric, ...]:
        return super().metrics(benchmark, task) if task != "counting" else (Metric("vqa_accuracy"),)

    def settings(self, task: str, benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
        return super().settings("vqa" if task == "counting" else task, benchmark, samples)


class GeoChat(Protocol):
    """GeoChat's: one word or phrase, exact match without spaces and full stops.

    It leaves out RSVQA's counts and areas, and takes the second test set of RSVQA-HR, as published. Boxes are
    `{<x1><y1><x2><y2>|<degrees>}`, 0 to 100 over the image's sides. They are turned about their center where the reference
    is oriented, clockwise, as y points down.
    """

    name = "geochat"
    class_parsing = "without_spaces"
    vqa_parsing = "without_spaces"
    box_scale = 100

    def default_split(self, info: BenchmarkInfo | None) -> str | None:
        return (info.second_test_split if info else None) or super().default_split(info)

    def keeps(self, sample: Sample, benchmark: Benchmark) -> bool:
        return sample.group not in benchmark.numeric_types

    def classification_prompt(self, question: str, class_names: Sequence[str]) -> str:
        instruction = "Classify the image from the following classes. Answer in one word or a short phrase."
        return f"{question}\n{', '.join(class_names)}\n{instruction}".strip()

    def vqa_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"{question}\nAnswer the question using a single word or phrase."

    counting_prompt = vqa_prompt

    def grounding_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"[refer] Give me the location of <p> {question} </p>"

    def read_boxes(self, text: str, size: tuple[int, int]) -> list[Box]:
        return read_angled_boxes(text, size)

    def write_box(self, box: Box, size: tuple[int, int]) -> str:
        return write_angled_box(box, size)


class VRSBench(Protocol):
    """VRSBench's: boxes `{<x1><y1><x2><y2>}` from 0 to 100, IoU 0.5 and 0.7, COCO's caption metrics.

    Its questions are published with a score that a commercial language model gives; here they are scored by exact match,
    so figures of the task `vqa` are lower than published ones and not comparable with them.
    """

    name = "vrsbench"
    box_scale = 100

    def captioning_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return question or "Describe the image in detail."

    def grounding_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"[refer] Give me the location of <p> {question} </p>"

    def read_boxes(self, text: str, size: tuple[int, int]) -> list[Box]:
        return [bounds(box) for box in read_angled_boxes(text, size)]

    def write_box(self, box: Box, size: tuple[int, int]) -> str:
        return write_angled_box(box, size)


def bounds(box: Sequence[float]) -> Box:
    """The upright box around four corners; an upright box as it is."""
    return (min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2]))


def read_angled_boxes(text: str, size: tuple[int, int]) -> list[Box]:
    """`{<x1><y1><x2><y2>}`, 0 to 100, in pixels: upright, or with an angle, which gives the four corners turned by it."""
    width, height = size
    boxes: list[Box] = []
    for match in ANGLED_BOX.finditer(text):
        x1, y1, x2, y2, angle = (None if number is None else float(number) for number in match.groups())
        if not all(0 <= value <= 100 for value in (x1, y1, x2, y2)):
            continue  # no box of this image
        x1, x2 = sorted((x1 * width / 100, x2 * width / 100))
        y1, y2 = sorted((y1 * height / 100, y2 * height / 100))
        boxes.append(turned((x1, y1, x2, y2), angle) if angle else (x1, y1, x2, y2))
    return boxes


def turned(box: Box, degrees: float) -> Box:
    """The four corners of an upright box turned about its center, clockwise on an image, whose y points down."""
    x1, y1, x2, y2 = box
    x, y, sine, cosine = (x1 + x2) / 2, (y1 + y2) / 2, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    corners = ((x1 - x, y1 - y), (x2 - x, y1 - y), (x2 - x, y2 - y), (x1 - x, y2 - y))
    return tuple(value for dx, dy in corners for value in (x + cosine * dx - sine * dy, y + sine * dx + cosine * dy))


def write_angled_box(box: Box, size: tuple[int, int]) -> str:
    """A box in pixels, or four corners of a rectangle, as `{<x1><y1><x2><y2>}` or `{<x1><y1><x2><y2>|<degrees>}`."""
    width, height = size
    angle = 0.0
    if len(box) == 8:
        corners = [(box[i], box[i + 1]) for i in range(0, 8, 2)]
        (ax, ay), (bx, by), (cx, cy), _ = corners
        angle = math.degrees(math.atan2(by - ay, bx - ax))
        x, y = sum(corner[0] for corner in corners) / 4, sum(corner[1] for corner in corners) / 4
        half_width, half_height = math.hypot(bx - ax, by - ay) / 2, math.hypot(cx - bx, cy - by) / 2
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
    x1, y1, x2, y2 = (100 * value / side for value, side in zip(box, (width, height) * 2, strict=True))
    tail = f"|<{angle:.1f}>" if angle else ""
    return f"{{<{x1:.1f}><{y1:.1f}><{x2:.1f}><{y2:.1f}>{tail}}}"


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    protocol.name: protocol for protocol in (Strict, StrictWithoutJava, Upstream, RSEvalKit, GeoChat, VRSBench)
}
