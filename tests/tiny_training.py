"""A folder to fine-tune from, and conversations about random images."""

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_models import tiny_config, tiny_model
from transformers import LlamaTokenizer

from mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor
from mfrsvlm.convert_checkpoint import IMAGE_TOKEN
from mfrsvlm.processing_mfrsvlm import make_chat_template


QUESTION, ANSWER = "Is there a river?", "Yes, a wide river and a bridge."


@functools.cache
def tiny_processor(image_placement: str = "inline", legacy: bool = False) -> MFRSVLMProcessor:
    """16 tokens an image, and the tokenizer of the reference."""
    tokenizer = LlamaTokenizer.from_pretrained(Path(__file__).parent / "reference" / "checkpoint", legacy=legacy)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.unk_token
    image_processor = MFRSVLMImageProcessor.for_model(tiny_config())
    template = make_chat_template(tokenizer)
    return MFRSVLMProcessor(image_processor, tokenizer, chat_template=template, image_placement=image_placement)


def tiny_folder(folder: Path, image_placement: str = "inline", **overrides) -> Path:
    """Saves a tiny model and its processor."""
    tokenizer, config = tiny_processor(image_placement).tokenizer, tiny_config(**overrides)
    image_processor = MFRSVLMImageProcessor.for_model(config)
    template = make_chat_template(tokenizer)
    processor = MFRSVLMProcessor(image_processor, tokenizer, chat_template=template, image_placement=image_placement)
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = processor.image_token_id
    tiny_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_row(index: int, image: bool = True) -> dict:
    marker = "<image>\n" if image else ""
    turns = [{"from": "human", "value": marker + QUESTION}, {"from": "gpt", "value": ANSWER}]
    row = {"id": f"{index}", "conversations": turns, "source_dataset": "tiny"}
    return {**row, "image": f"{index}.png"} if image else row


def write_images(folder: Path, count: int) -> Path:
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def write_data(folder: Path, count: int = 12) -> Path:
    """Images, and `train.json` whose every third conversation has none and whose answers differ in length."""
    write_images(folder, count)
    rows = [llava_row(index, image=bool(index % 3)) for index in range(count)]
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] += f" {index} ships." * (index % 4)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder
