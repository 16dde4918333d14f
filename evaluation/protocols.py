"""Named protocols: prompt, length, how an answer is read, and metric, held together so that a number has a name.

`strict` is the default. The others follow published evaluations, so that numbers can be set beside theirs; where a published
script is at fault, the protocol is corrected and says what was wrong.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from mfrsvlm.processing_mfrsvlm import parse_boxes

from .benchmarks import Benchmark, Sample
from .metrics import load_metric
from .metrics.coco_java import java_command


Box = tuple[float, ...]  # x1, y1, x2, y2, or four corners, in pixels of the upright image
NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
# {<x1><y1><x2><y2>} and, for oriented boxes, {<x1><y1><x2><y2>|<degrees>}
ANGLED_BOX = re.compile(rf"\{{{4 * f'<{NUMBER}>'}(?:\|\s*<{NUMBER}>\s*)?\}}")


class Protocol:
    """Strict: short prompts, exact answers (but for case, surrounding space and a full stop), COCO's caption metrics.

    Nothing but the answer is read to interpret the answer; an empty one is wrong. Boxes are asked for as
    `[x_min, y_min, x_max, y_max]`, 0 to 1000 over the image's own sides. Counts and areas of RSVQA are compared in the
    published classes (up to 10, 100, 1000, more), as that benchmark defines them.
    """

    name = "strict"
    max_new_tokens = 128
    short_answer = "Answer with a single word or phrase."
    class_parsing = "exact"
    vqa_parsing = "exact"
    captions = "coco"
    thresholds: tuple[float, ...] = (0.5, 0.7)
    # Splits other than a benchmark's default.
    splits: dict[str, str] = {}

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
        width, height = size
        x1, y1, x2, y2 = bounds(box)
        return f"[{1000 * x1 / width:.1f}, {1000 * y1 / height:.1f}, {1000 * x2 / width:.1f}, {1000 * y2 / height:.1f}]"

    def ideal_answer(self, sample: Sample) -> str:
        """What a model would have to say to be right; of captions, the first."""
        if sample.task == "grounding":
            return " ".join(self.write_box(box, sample.image_size) for box in sample.boxes)
        return sample.references[0]

    def score(
        self, benchmark: Benchmark, task: str, samples: Sequence[Sample], answers: Sequence[str]
    ) -> tuple[dict[str, Any], list[Any], list[float]]:
        """Figures of one task, and what was read from each answer and its score."""
        metric, predictions, references, settings = getattr(self, f"_{task}")(benchmark, samples, answers)
        figures = load_metric(metric).compute(predictions=predictions, references=references, **settings)
        parsed, scores = figures.pop("parsed"), figures.pop("scores")
        return figures, parsed, scores

    def _classification(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        settings = {"class_names": benchmark.class_names, "parsing": self.class_parsing}
        return "classification_accuracy", list(answers), [sample.references[0] for sample in samples], settings

    def _vqa(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        types = [sample.group or "all" for sample in samples]
        # "B", "(B)" or "B. forest", but not "A forest".
        lettered = all(re.match(r"\(?[A-E](?:[.):]|$)", sample.references[0]) for sample in samples)
        parsing = "letter" if lettered else self.vqa_parsing
        if benchmark.name.startswith("rsvqa"):
            settings = {"question_types": types, "parsing": parsing, "bins": benchmark.name.split("-")[1]}
            return "rsvqa_accuracy", list(answers), [sample.references[0] for sample in samples], settings
        settings = {"question_types": types, "parsing": parsing}
        return "vqa_accuracy", list(answers), [list(sample.references) for sample in samples], settings

    def _counting(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        return "counting", list(answers), [int(sample.references[0]) for sample in samples], {}

    def _captioning(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        return "captioning", list(answers), [list(sample.references) for sample in samples], {"variant": self.captions}

    def _grounding(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        predictions = [
            [list(box) for box in self.read_boxes(answer, sample.image_size)]
            for sample, answer in zip(samples, answers, strict=True)
        ]
        references = [[list(box) for box in sample.boxes] for sample in samples]
        return "visual_grounding", predictions, references, {"thresholds": list(self.thresholds)}


class StrictWithoutJava(Protocol):
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

    Otherwise than published: the lists on presence and colour are marked by the rule above, where the kit looks for yes and
    no, or for the reference, within the answer; counts by that rule too, where it has their mean absolute error.
    """

    name = "rsevalkit"
    max_new_tokens = 512
    class_parsing = "contained"
    vqa_parsing = "contained"
    tags = {"classification": "{CLS}", "vqa": "{VQA}", "counting": "{IT}", "grounding": "{VG}", "captioning": "{IT}"}

    def prompt(self, sample: Sample, benchmark: Benchmark) -> str:
        text = super().prompt(sample, benchmark)
        tag = self.tags[sample.task]
        if benchmark.name == "vhm-eval" and sample.task == "vqa" and "RSVQA" not in benchmark.split:
            tag = "{IDK}" if sample.group in ("presence", "color", "position", "relative position") else "{IT}"
        return text if re.match(r"\{[A-Z]+\} ", text) else f"{tag} {text}"

    def prepare_image(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in (0.48145466, 0.4578275, 0.40821073)))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _counting(self, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[str]) -> tuple[Any, ...]:
        return super()._vqa(benchmark, samples, answers)


class GeoChat(Protocol):
    """GeoChat's: one word or phrase, exact match without spaces and full stops; RSVQA without counts and areas.

    RSVQA-HR is its second test set, as published. Boxes are `{<x1><y1><x2><y2>|<degrees>}`, 0 to 100 over the image's
    sides, turned about their centre (clockwise, as y points down) where the reference is oriented.
    """

    name = "geochat"
    class_parsing = "without_spaces"
    vqa_parsing = "without_spaces"
    splits = {"rsvqa-hr": "test_phili"}

    def keeps(self, sample: Sample, benchmark: Benchmark) -> bool:
        return not (benchmark.name.startswith("rsvqa") and sample.group in ("count", "area"))

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

    Its questions are published with a score that a commercial language model gives; here they are marked by exact match,
    so figures of the task `vqa` are lower than published ones and not comparable with them.
    """

    name = "vrsbench"

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
    """The four corners of an upright box turned about its centre, clockwise on an image, whose y points down."""
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
    protocol.name: protocol for protocol in (Protocol, StrictWithoutJava, Upstream, RSEvalKit, GeoChat, VRSBench)
}
