"""Asks a model about one image, through the ordinary processor and `generate`."""

from dataclasses import dataclass
from typing import Any

import torch

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
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [text.strip() for text in texts]
    boxes: list[Any] = [[] for _ in texts]
    if hasattr(processor, "post_process_boxes"):  # other models write boxes on scales of their own
        found = processor.post_process_boxes(texts, [image_size(image)] * len(texts))
        boxes = [rows.tolist() for rows in found]
    return [Answer(*row) for row in zip(questions, texts, boxes, strict=True)]
