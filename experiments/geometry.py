"""The small geometry that every experiment shares: the real architecture, sized for two CPU cores."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, ResNetConfig

from mfrsvlm.configuration_mfrsvlm import MFRSVLMConfig


IMAGE_SIZE, PATCH_SIZE = 128, 16  # 64 visual tokens
NUM_DECODER_LAYERS = 6


def make_config(vocab_size: int, encoder: str = "resnet", width: int = 192, **overrides: Any) -> MFRSVLMConfig:
    """The config of a small model.

    Args:
        vocab_size: of the tokenizer, whose last token is the image placeholder.
        encoder: `"resnet"` or `"vit"`; the two cost the same number of multiplications a window.
        width: of the decoder, a multiple of 32.
        **overrides: fields of `MFRSVLMConfig`.
    """
    vision_config: Any
    fields: dict[str, Any] = {}
    if encoder == "resnet":
        vision_config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 2], layer_type="basic", num_channels=3
        )
        depths = [2, 3]
        fields["visual_position_embeddings"] = True
    elif encoder == "vit":
        vision_config = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=128,
        )
        depths = [3, 5]
    else:
        raise ValueError(f'encoder={encoder!r} must be "resnet" or "vit".')
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=NUM_DECODER_LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        initializer_range=0.06,  # the usual 0.02 suits widths of thousands
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    fields |= {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_feature_size": 128,
        "canvas_scale": 2,
        "window_sizes": [128],
        "detail_feature_layers": depths,
        "injection_layers": [1, 2, 3, 4],
        "routing": "stack",
        "injection_init": 0.5,
        "window_chunk_size": 16,
    }
    fields.update(overrides)
    return MFRSVLMConfig(
        vision_config=vision_config, text_config=text_config, bos_token_id=0, eos_token_id=1, pad_token_id=2, **fields
    )
