"""Small models for every choice of the config, and inputs for them."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen3Config, ResNetConfig

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration


TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
TEXT_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VIT_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
STAGE_SIZES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}


def tiny_config(text: str = "llama", vision: str = "clip", **overrides) -> MFRSVLMConfig:
    """A config of two-digit sizes: 28 px images in 16 tokens, windows of 28 and 14 px on a canvas of 56."""
    text_config = TEXT_CONFIGS[text](**TEXT_SIZES)
    if vision == "clip":
        vision_config = CLIPVisionConfig(**VIT_SIZES)
        sizes = {"detail_feature_layers": [1, 3]}
    else:
        vision_config = ResNetConfig(embedding_size=8, **STAGE_SIZES)
        sizes = {"image_size": 28, "patch_size": 7, "vision_feature_size": 24, "detail_feature_layers": [2, 4]}
    sizes.update(window_sizes=[28, 14], injection_layers=[1, 3], routing="stack", routing_size=8)
    sizes.update(cross_attention_size=16, cross_attention_heads=2)
    return MFRSVLMConfig(**{"text_config": text_config, "vision_config": vision_config, **sizes, **overrides})


def tiny_model(config: MFRSVLMConfig | None = None, **overrides) -> MFRSVLMForConditionalGeneration:
    """A model with random weights, large enough for every part to matter, and open gates."""
    torch.manual_seed(0)
    model = MFRSVLMForConditionalGeneration(config or tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # not the convolutions, which would overflow
                parameter.mul_(5)
            if name.endswith((".gate", ".residual_scale")):
                parameter.fill_(1.0)
    return model


def tiny_inputs(config: MFRSVLMConfig, images: list[int], text: int | list[int] = 7, side: str = "left", seed: int = 0):
    """Random inputs for a batch whose sample i shows `images[i]` images inline, after two tokens of text.

    Samples are drawn one after the other, so that sample i is the same whatever stands beside it.
    """
    texts = [text] * len(images) if isinstance(text, int) else text
    rows, pixels = [], []
    for index, (count, words) in enumerate(zip(images, texts, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        ids = torch.randint(3, 90, (words,), generator=generator).tolist()
        visual = [config.image_token_id] * config.image_seq_length
        parts = [*ids[:2]]
        for image in range(count):
            parts += [*visual, ids[image % words]]
        rows.append(parts + ids[2:])
        pixels += [torch.randn(sum(config.packed_lengths), generator=generator) for _ in range(count)]
    width = max(map(len, rows))
    pad = config.text_config.pad_token_id
    fill = [[pad] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(f) for f in fill]
    left = side == "left"
    inputs = {
        "input_ids": torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)]),
        "attention_mask": torch.tensor([z + o if left else o + z for z, o in zip(zeros, ones, strict=True)]),
    }
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return inputs
