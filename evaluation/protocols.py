"""Protocols: prompts, maximum length, parsing of answers, and metrics.

`strict` is the default. The others follow published evaluations, for comparison with their results. Errors of published
scripts are corrected, and the docstring of the protocol lists them.

A protocol does not depend on the name of a benchmark. It reads properties of the benchmark: its metrics, its tag, the types
of questions with numeric answers, and its second test split.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Value
from PIL import Image

from ..processing_mfrsvlm import parse_boxes, parse_points
from .benchmarks import Benchmark, BenchmarkInfo, Metric, Sample
from .benchmarks.sample import BOX_TASKS, LIST_TASKS
from .metrics import load_metric
from .metrics._answers import tidy
from .metrics._checked import SCORED_CHARACTERS
from .metrics._java import java_command


logger = logging.getLogger(__name__)

NOTHING = "none"  # the answer if there is no object to list
POINT_SCALE = 1000  # of written points, in all protocols
Box = tuple[float, ...]  # x1, y1, x2, y2, or four corners, in pixels of the image after EXIF orientation
NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
# {<x1><y1><x2><y2>} and, for oriented boxes, {<x1><y1><x2><y2>|<degrees>}
ANGLED_BOX = re.compile(rf"\{{{4 * f'<{NUMBER}>'}(?:\|\s*<{NUMBER}>\s*)?\}}")


class Protocol:
    """Base class of protocols: prompts, parsing of answers, and scoring of tasks. Subclasses override parts of it.

    Attributes:
        name: key in `PROTOCOLS`.
        max_new_tokens: maximum length of an answer.
        max_new_list_tokens: maximum length of a list of boxes or points, if it is longer than that of other answers.
        short_answer: instruction after a question with a short answer.
        no_object: instruction after a question for a list.
        class_parsing, vqa_parsing: how answers are compared, see `classification_accuracy` and `vqa_accuracy`.
        captions: variant of the metric `captioning`.
        thresholds: intersections over union at which a box counts as found.
        box_scale: value of the right and lower edge in written boxes.
    """

    name: str
    max_new_tokens = 128
    max_new_list_tokens = 256  # about ten boxes, with a token for each digit
    short_answer = "Answer with a single word or phrase."
    no_object = f"If there is none, answer {NOTHING}."
    class_parsing = "exact"
    vqa_parsing = "exact"
    captions = "coco"
    thresholds: tuple[float, ...] = (0.5, 0.7)
    box_scale = 1000

    def default_split(self, info: BenchmarkInfo | None) -> str | None:
        """The default split of a benchmark; `None` if it has none or the benchmark is unknown."""
        return info.default_split if info else None

    def max_new_tokens_of(self, task: str) -> int:
        """Maximum length of an answer to a task."""
        return max(self.max_new_tokens, self.max_new_list_tokens) if task in LIST_TASKS else self.max_new_tokens

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises OSError, before the model runs, if these samples cannot be scored."""
        if self.captions == "coco" and any(sample.task == "captioning" for sample in samples):
            java_command()

    def keeps(self, sample: Sample, benchmark: Benchmark) -> bool:
        """Whether the protocol uses this question."""
        return True

    def prepare_image(self, image: Image.Image) -> Image.Image:
        return image

    def prompt(self, sample: Sample, benchmark: Benchmark) -> str:
        """The prompt, without image markers and chat template."""
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

    def detection_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"{self.grounding_prompt(f'every {question}', class_names)} {self.no_object}"

    def pointing_prompt(self, question: str, class_names: Sequence[str]) -> str:
        return f"Point to every {question} as [x, y], each number scaled to 0-{POINT_SCALE}. {self.no_object}"

    def read_points(self, text: str, size: tuple[int, int]) -> list[tuple[float, float]]:
        """Points in a text, in pixels of an image of this (width, height)."""
        width, height = size
        return [(x * width / POINT_SCALE, y * height / POINT_SCALE) for x, y in parse_points(text, POINT_SCALE)]

    def write_point(self, box: Box, size: tuple[int, int]) -> str:
        """The center of a box in pixels as text in the format of the prompt."""
        center = (sum(box[0::2]) / len(box[0::2]), sum(box[1::2]) / len(box[1::2]))
        return write_scaled(center, size, POINT_SCALE)

    def read_boxes(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Boxes in a text, in pixels of an image of this (width, height)."""
        width, height = size
        scale = (width / 1000, height / 1000) * 2
        return [tuple(v * s for v, s in zip(box, scale, strict=True)) for box in parse_boxes(text, 1000)]

    def write_box(self, box: Box, size: tuple[int, int]) -> str:
        """A box in pixels as text in the format of the prompt. Four corners are written as their bounding box."""
        return write_scaled(bounds(box), size * 2, 1000)

    def ideal_answer(self, sample: Sample) -> str:
        """A correct answer in the format of the protocol; for captions, the first reference."""
        if sample.task not in BOX_TASKS:
            return sample.references[0]
        write = self.write_point if sample.task == "pointing" else self.write_box
        return ", ".join(write(box, sample.image_size) for box in sample.boxes) or NOTHING

    def score(
        self, benchmark: Benchmark, task: str, samples: Sequence[Sample], answers: Sequence[str]
    ) -> tuple[dict[str, Any], list[Any], list[float]]:
        """Scores the answers of one task.

        The settings of the first metric depend on protocol and benchmark, and it computes the score of each sample. The
        settings of other metrics depend on the benchmark only, and their figures are added.

        Returns:
            Figures by name, the parsed answers, and the scores.
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
        if task in BOX_TASKS:
            references = [[list(box) for box in sample.boxes] for sample in samples]
        elif isinstance(module.features["references"], Value):  # the metric takes one reference
            number = module.features["references"].dtype.startswith("int")
            references = [int(one) if number else one for one, *_ in references]
        return module.compute(predictions=predictions, references=references, **settings | dict(metric.settings))

    def metrics(self, benchmark: Benchmark, task: str) -> tuple[Metric, ...]:
        return benchmark.metrics_of(task)

    def settings(self, task: str, benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
        """Settings of the first metric of a task. The benchmark may override them."""
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
        """Answers in the format of the metrics: texts, or boxes or points in pixels.

        For lists of boxes or points, an answer is `None` if it contains none of them and is not the word for no object.
        """
        if task not in BOX_TASKS:
            return list(answers)
        answers = [answer[:SCORED_CHARACTERS] for answer in answers]
        read, scale = (self.read_points, POINT_SCALE) if task == "pointing" else (self.read_boxes, self.box_scale)
        found = [
            [list(place) for place in read(answer, sample.image_size)]
            for sample, answer in zip(samples, answers, strict=True)
        ]
        # In pixels, a wrong scale cannot be detected, so the written numbers are checked.
        written = [read(answer, (scale, scale)) for answer in answers]
        largest = max((value for places in written for place in places for value in place), default=None)
        if largest is not None and largest <= 1:
            what = "points" if task == "pointing" else "boxes"
            logger.warning(
                f"No number of the {sum(map(len, written))} {what} in the answers is above 1. Protocol {self.name} asks for "
                f"{what} scaled to 0-{scale}. The model seems to answer with {what} scaled to 0-1."
            )
        if task not in LIST_TASKS:
            return found
        return [places or ([] if tidy(a) == NOTHING else None) for places, a in zip(found, answers, strict=True)]


class Strict(Protocol):
    """Short prompts, exact match (except for case, surrounding space and a full stop), COCO's caption metrics.

    Answers are parsed without the reference. An empty answer is wrong. Boxes have the format `[x_min, y_min, x_max, y_max]`,
    scaled to 0-1000. Counts and areas of RSVQA are compared in the published bins (up to 10, 100, 1000, more).
    """

    name = "strict"


class StrictWithoutJava(Strict):
    """As `strict`, without Java: captions are split into words by a simple rule, and METEOR is left out."""

    name = "strict-without-java"
    captions = "coco_without_java"


class Upstream(Protocol):
    """The protocol of the scripts published with MF-RSVLM: 64 tokens, sacrebleu and NLTK for captions, IoU 0.5 and 0.75.

    Instruction tuning used the literal tags `{IT}`, `{VQA}` and `{VG}`. The published prompts use only `{VG}`, for boxes.

    Corrected:
    - The published scripts use the reference answers when they parse predictions.
    - They swap width and height when they scale boxes, which gives wrong boxes on images that are not square.
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
    """The protocol of RSEvalKit, by the authors of VHM: a tag before every question, images padded to a square, 512 tokens.

    An answer is correct if the reference contains it, in lower case and without spaces. For multiple choice, the first
    letter is compared. Boxes are scaled to 0-1000 over the sides of the image, not of the padded square. Each list has a
    tag: `{IDK}` if the object asked for may be absent, `{IT}` if the task has no tag.

    Corrected:
    - An empty answer was scored as correct, because every reference contains it. It is wrong here.
    - Width and height were swapped when boxes were scaled.
    - Prompts for boxes had the tag `{IT}`, since the script compared with another name of the task.
    - The first letter A to E anywhere in an answer was taken as the choice, so that "Answer: B" was parsed as A.

    Not corrected, because it is the published definition: "a" is contained in "baseball field".

    Other differences from the published protocol: for the lists on presence and color, the kit searches the answer for yes
    and no, or for the reference. For counts, it computes the mean absolute error. Here, the rule above scores all of them.
    """

    name = "rsevalkit"
    max_new_tokens = 512
    class_parsing = "contained"
    vqa_parsing = "contained"
    tags = {"classification": "{CLS}", "vqa": "{VQA}", "counting": "{IT}", "captioning": "{IT}"}
    tags |= dict.fromkeys(BOX_TASKS, "{VG}")

    def prompt(self, sample: Sample, benchmark: Benchmark) -> str:
        text = super().prompt(sample, benchmark)
        tag = benchmark.tag or self.tags[sample.task]
        return text if re.match(r"\{[A-Z]+\} ", text) else f"{tag} {text}"

    def prepare_image(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in (0.48145466, 0.4578275, 0.40821073)))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    # Counts are compared like other short answers.

    def metrics(self, benchmark: Benchmark, task: str) -> tuple[Metric, ...]:
        return super().metrics(benchmark, task) if task != "counting" else (Metric("vqa_accuracy"),)

    def settings(self, task: str, benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
        return super().settings("vqa" if task == "counting" else task, benchmark, samples)


class GeoChat(Protocol):
    """The protocol of GeoChat: one word or phrase, exact match without spaces and full stops.

    It skips the counts and areas of RSVQA, and uses the second test set of RSVQA-HR, as published. Boxes are
    `{<x1><y1><x2><y2>|<degrees>}`, scaled to 0-100. Oriented boxes are rotated clockwise about their center.
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
    """The protocol of VRSBench: boxes `{<x1><y1><x2><y2>}`, scaled to 0-100, IoU 0.5 and 0.7, COCO's caption metrics.

    Its published scores of questions come from a commercial language model. Here, questions are scored by exact match.
    Figures of the task `vqa` are therefore lower than published ones and not comparable with them.
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


def write_scaled(values: Sequence[float], sides: Sequence[int], scale: int) -> str:
    """Numbers in pixels as text in brackets, from 0 to `scale` over the sides of the image."""
    # Clipped, since a corner of an oriented box may lie outside of the image. Adding 0 turns -0.0 into 0.0.
    scaled = [min(max(scale * value / side, 0.0), scale) + 0.0 for value, side in zip(values, sides, strict=True)]
    return f"[{', '.join(f'{value:.1f}' for value in scaled)}]"


def bounds(box: Sequence[float]) -> Box:
    """The axis-aligned bounding box of four corners. An axis-aligned box is returned unchanged."""
    return (min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2]))


def read_angled_boxes(text: str, size: tuple[int, int]) -> list[Box]:
    """Boxes `{<x1><y1><x2><y2>}`, scaled to 0-100, in pixels. With an angle, the four corners of the rotated box."""
    width, height = size
    boxes: list[Box] = []
    for match in ANGLED_BOX.finditer(text):
        x1, y1, x2, y2, angle = (None if number is None else float(number) for number in match.groups())
        if not all(0 <= value <= 100 for value in (x1, y1, x2, y2)):
            continue  # no box of this image
        x1, x2 = sorted((x1 * width / 100, x2 * width / 100))
        y1, y2 = sorted((y1 * height / 100, y2 * height / 100))
        boxes.append(rotated((x1, y1, x2, y2), angle) if angle else (x1, y1, x2, y2))
    return boxes


def rotated(box: Box, degrees: float) -> Box:
    """The four corners of an axis-aligned box, rotated clockwise about its center (y points down)."""
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
