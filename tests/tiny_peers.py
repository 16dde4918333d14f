"""Folders of tiny random models of other families, as their users would save them."""

from pathlib import Path

import torch
from qwen2_vl_images_processor import Qwen2VLImagesProcessor
from tiny_training import tiny_processor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_tokenizer(*special_tokens: str):
    tokenizer = tiny_processor().tokenizer.__class__.from_pretrained(Path(__file__).parent / "reference" / "checkpoint")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def template(image: str) -> str:
    return (
        "{{ bos_token }}{% for message in messages %}USER: {% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )


def louder(model):
    """Random weights that are large enough for answers to depend on the image."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def tiny_llava(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT, eos_token_id=tokenizer.eos_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    louder(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)
    return folder


def tiny_qwen2_vl(folder: Path) -> Path:
    """Its processor is code of its own, so it loads with `trust_remote_code`."""
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tiny_tokenizer(*marks)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 7},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    louder(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(patch_size=7, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 56})
    Qwen2VLImagesProcessor.register_for_auto_class()
    Qwen2VLImagesProcessor(
        images, tokenizer, chat_template=template("<|vision_start|><|image_pad|><|vision_end|>")
    ).save_pretrained(folder)
    return folder
