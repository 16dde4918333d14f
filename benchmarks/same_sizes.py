"""Models with random weights that share the sizes of their parts: this model in its modes, and families of transformers.

Every family sees the same square canvas, as its processor would cut it, and the same number of text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from count_operations import MODES, change
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration


IMAGE, OTHER = 3, range(4, 9)  # ids of the placeholder, and of the marks that some families put around it
TEXT_IDS = 10  # the first id of the text


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts: `vision` and `text` as the configs of CLIP and Llama name them."""

    vision: dict[str, int]
    text: dict[str, int]
    depths: tuple[int, ...]  # encoder outputs that are read
    injection_layers: tuple[int, ...]
    text_tokens: int = 61

    @property
    def config(self) -> MFRSVLMConfig:
        """The config of a new model."""
        side = self.vision["image_size"]
        return MFRSVLMConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text),
            image_token_id=IMAGE,
            window_sizes=[side, side // 2],
            detail_feature_layers=list(self.depths),
            injection_layers=list(self.injection_layers),
        )


def make_sizes(vision: tuple[int, ...], text: tuple[int, ...], image_size: int, **rest: tuple[int, ...]) -> Sizes:
    """Sizes from (width, inner width, layers, heads) of the encoder and of the decoder, which has a vocabulary too."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return Sizes(
        {**dict(zip(names, vision, strict=True)), "image_size": image_size, "patch_size": 14},
        {
            **dict(zip((*names, "vocab_size"), text, strict=True)),
            "num_key_value_heads": text[3],
            "max_position_embeddings": 32768,
        },
        **rest,
    )


SIZES = {
    "tiny": make_sizes((64, 128, 3, 2), (64, 128, 2, 2, 1000), 112, depths=(1, 2, 3), injection_layers=(0, 1)),
    "small": make_sizes((256, 1024, 8, 4), (512, 1376, 12, 8, 32000), 336, depths=(3, 5, 8), injection_layers=(1, 3, 5, 7)),
    "published": make_sizes(
        (1024, 4096, 24, 16), (4096, 11008, 32, 32, 32001), 336, depths=(8, 16, 24), injection_layers=(1, 3, 5, 7)
    ),
}


def prompt(visual: list[int], text_tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *visual, *range(TEXT_IDS, TEXT_IDS + text_tokens - 1)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(sizes: Sizes, mode: str, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """This model in one of `MODES`, and inputs about one image."""
    config = change(sizes.config, {"canvas_scale": canvas_scale, **MODES[mode]})
    inputs = prompt([IMAGE] * config.image_seq_length, sizes.text_tokens)
    return MFRSVLMForConditionalGeneration(config), {**inputs, "pixel_values": torch.randn(1, sum(config.packed_lengths))}


def llava(sizes: Sizes, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    side, tokens = sizes.vision["image_size"], (sizes.vision["image_size"] // sizes.vision["patch_size"]) ** 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=LlamaConfig(**sizes.text),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=tokens,
    )
    inputs = prompt([IMAGE] * tokens, sizes.text_tokens)
    return LlavaForConditionalGeneration(config), {**inputs, "pixel_values": torch.randn(1, 3, side, side)}


def llava_next(sizes: Sizes, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    side, canvas = sizes.vision["image_size"], canvas_scale * sizes.vision["image_size"]
    rows = side // sizes.vision["patch_size"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=LlamaConfig(**sizes.text),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[canvas, canvas]],
        image_seq_length=rows**2,
    )
    # The view of the whole, the tiles, and a token at the end of every row of the canvas.
    tokens = rows**2 + (rows * canvas_scale) ** 2 + rows * canvas_scale
    inputs = prompt([IMAGE] * tokens, sizes.text_tokens)
    pixels = torch.randn(1, 1 + canvas_scale**2, 3, side, side)
    return LlavaNextForConditionalGeneration(config), {
        **inputs,
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[canvas, canvas]]),
    }


def qwen3_vl(sizes: Sizes, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    vision, text = sizes.vision, sizes.text
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    quarter = head_dim // 8
    rows = canvas_scale * vision["image_size"] // vision["patch_size"]
    start, end, video, *_ = OTHER
    config = Qwen3VLConfig(
        vision_config={
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "patch_size": vision["patch_size"],
            "out_hidden_size": text["hidden_size"],
            "deepstack_visual_indexes": [depth - 1 for depth in sizes.depths][: text["num_hidden_layers"]],
        },
        text_config={
            **text,
            "head_dim": head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
            },
        },
        image_token_id=IMAGE,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    inputs = prompt([start, *[IMAGE] * (rows**2 // 4), end], sizes.text_tokens)
    patch = 3 * 2 * vision["patch_size"] ** 2  # an image is two equal frames
    return Qwen3VLForConditionalGeneration(config), {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        "pixel_values": torch.randn(rows**2, patch),
        "image_grid_thw": torch.tensor([[1, rows, rows]]),
    }


def internvl(sizes: Sizes, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    side = sizes.vision["image_size"]
    tiles, tokens = 1 + canvas_scale**2, (side // sizes.vision["patch_size"] // 2) ** 2
    config = InternVLConfig(
        vision_config={"model_type": "internvl_vision", **sizes.vision},
        text_config=LlamaConfig(**sizes.text),
        image_token_id=IMAGE,
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    inputs = prompt([IMAGE] * (tiles * tokens), sizes.text_tokens)
    return InternVLForConditionalGeneration(config), {**inputs, "pixel_values": torch.randn(tiles, 3, side, side)}


def idefics3(sizes: Sizes, canvas_scale: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    side = sizes.vision["image_size"]
    tiles, tokens = 1 + canvas_scale**2, (side // sizes.vision["patch_size"] // 2) ** 2
    config = Idefics3Config(
        vision_config={"model_type": "idefics3_vision", **sizes.vision},
        text_config=LlamaConfig(**sizes.text, pad_token_id=0),
        image_token_id=IMAGE,
    )
    inputs = prompt([IMAGE] * (tiles * tokens), sizes.text_tokens)
    return Idefics3ForConditionalGeneration(config), {**inputs, "pixel_values": torch.randn(1, tiles, 3, side, side)}


PEERS: dict[str, Callable[..., tuple[Any, dict[str, torch.Tensor]]]] = {
    "LLaVA-1.5": llava,
    "LLaVA-NeXT": llava_next,
    "Qwen3-VL": qwen3_vl,
    "InternVL": internvl,
    "Idefics3": idefics3,
}
