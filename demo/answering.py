"""Loads a model and asks it about one image, through the ordinary processor and `generate`."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..evaluation.answering import find_device
from ..files.model_folder import load_model


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


def load(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_incomplete: bool = False,
) -> tuple[Any, Any]:
    """Loads the model, in eval mode, and the processor of a folder or Hub id, see `files.model_folder.load_model`.

    Args:
        name: folder or Hub id.
        dtype: type of the weights; `"auto"`: as saved.
        device: device of the model; `None`: an accelerator, if there is one.
        trust_remote_code: run the code in the model folder. Without it, an MF-RSVLM uses the code of this package.
        allow_incomplete: see `files.model_folder.load_model`.

    Raises:
        ValueError: the device does not exist here, or the model cannot be loaded.
    """
    device = find_device(device)
    model, processor = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, allow_incomplete=allow_incomplete)
    return model.to(device), processor


def answer(model: Any, processor: Any, image: Image.Image, questions: list[str], max_new_tokens: int = 64) -> list[Answer]:
    """Answers to all questions in one batch, by greedy decoding.

    Args:
        model: an image-text-to-text model.
        processor: its processor, with a chat template.
        image: the image that all questions are about.
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
        found = processor.post_process_boxes(texts, [(image.height, image.width)] * len(texts))
        boxes = [rows.tolist() for rows in found]
    return [Answer(*row) for row in zip(questions, texts, boxes, strict=True)]
