"""Asks a model about one image, which is encoded once for all questions."""

from dataclasses import dataclass
from typing import Any

from ..configuration_mfrsvlm import MFRSVLMConfig
from ..evaluation.answering import Answerer, Prompt
from ..image_sources_mfrsvlm import image_size


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        question: the question as it was asked.
        text: what the model generated.
        boxes: [x1, y1, x2, y2] of each box in the text, in pixels of the image.
    """

    question: str
    text: str
    boxes: list[list[float]]


def answer(model: Any, processor: Any, image: Any, questions: list[str], max_new_tokens: int = 64) -> list[Answer]:
    """Answers to all questions in one batch, by greedy decoding.

    Args:
        model: an image-text-to-text model.
        processor: its processor, with a chat template.
        image: the image that all questions are about, as `open_image` returns it.
        questions: the questions.
        max_new_tokens: maximum length of an answer.
    """
    several = len(questions) > 1
    # Other models are checked, which costs more than one question.
    is_mfrsvlm = model.config.model_type == MFRSVLMConfig.model_type
    answerer = Answerer(model, processor, max_new_tokens, share_images=several, check_sharing=not is_mfrsvlm)
    prompts = [Prompt(question, 0) for question in questions]
    texts = [found.text for found in answerer.answer(prompts, answerer.encode_images([[image]], prompts))]
    boxes: list[Any] = [[] for _ in texts]
    if hasattr(processor, "post_process_boxes"):  # other models write boxes on scales of their own
        found = processor.post_process_boxes(texts, [image_size(image)] * len(texts))
        boxes = [rows.tolist() for rows in found]
    return [Answer(*row) for row in zip(questions, texts, boxes, strict=True)]
