"""Counts operations and bytes of one answer for any config, and the least time that a device needs for them.

    python benchmarks/count_operations.py [CONFIG] [--text-tokens 61] [--answer-tokens 32] [--tflops 400 --bandwidth 2000]

`CONFIG` is a model folder or a `config.json`; without it, the sizes of the published model are taken: CLIP ViT-L/14 at 336
pixels and a Llama of 7 billion parameters. The rows are modes of this model and other families with the same parts on the
same canvas. Nothing is computed: the model is built without memory (on the device "meta"), and its products are counted.

Least time is the sum over encoding, prefill and decoding of the larger of operations / (--tflops) and bytes / (--bandwidth),
for one image at batch size 1. Real time is longer. Bytes are those of the weights and, in decoding, of the cache.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration
from mfrsvlm.configuration_mfrsvlm import CACHE


# Modes of this model, as changes of a config with the given parts. The first is that of converted checkpoints.
MODES: dict[str, dict[str, Any]] = {
    "as published": {
        "window_encoding": "resize",
        "window_weighting": "hann",
        "routing": "stack",
        "routing_scope": "sample",
    },
    "defaults": {},
    "no overlap": {"window_overlap": 0.0},
    "smallest windows, no overlap": {"window_overlap": 0.0, "window_sizes": "smallest"},
    "global view only": {"window_sizes": [], "injection_layers": []},
}


@dataclass
class Cost:
    """Operations (a multiplication and an addition are two) and bytes of the parts of one answer."""

    visual_tokens: int
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    encode_bytes: float = 0.0
    prefill_bytes: float = 0.0
    decode_bytes: float = 0.0

    def least_seconds(self, flops: float, bandwidth: float) -> float:
        parts = [(self.encode, self.encode_bytes), (self.prefill, self.prefill_bytes), (self.decode, self.decode_bytes)]
        return sum(max(operations / flops, size / bandwidth) for operations, size in parts)


def published_sizes() -> MFRSVLMConfig:
    """The sizes of the published model."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    return MFRSVLMConfig(vision_config=vision, text_config=text, detail_feature_layers=[8, 16, 24])


def read_config(path: Path) -> MFRSVLMConfig:
    """The config of a model folder or of a `config.json`."""
    return MFRSVLMConfig.from_json_file(path / "config.json" if path.is_dir() else path)


def change(config: MFRSVLMConfig, fields: dict[str, Any]) -> MFRSVLMConfig:
    """A copy of the config with other fields."""
    if fields.get("window_sizes") == "smallest":
        fields = fields | {"window_sizes": [min(config.window_sizes)]}
    return MFRSVLMConfig.from_dict(config.to_dict() | fields)


def count(run: Callable[[], Any]) -> tuple[float, Any]:
    """The operations of a call, and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


def size_of(module: torch.nn.Module, bytes_each: int) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * bytes_each


def count_model(config: MFRSVLMConfig, text_tokens: int, answer_tokens: int, bytes_each: int) -> Cost:
    """The cost of an answer about one image.

    Args:
        config: of the model.
        text_tokens: of the prompt, besides the visual tokens.
        answer_tokens: of the answer. The prefill computes the first.
        bytes_each: of a weight.
    """
    with torch.device("meta"):
        model = MFRSVLMForConditionalGeneration(config).eval().requires_grad_(False)
        pixels = torch.empty(1, sum(config.packed_lengths))
        length = config.image_seq_length + text_tokens
        ids = torch.zeros(1, length, dtype=torch.long)
    model.model._check_image_tokens = lambda *_: None  # there are no values to compare
    cost = Cost(config.image_seq_length)
    cost.encode, features = count(lambda: model.get_image_features(pixels, return_dict=True))
    cost.prefill, outputs = count(
        lambda: model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
    )
    cache, one = outputs[CACHE], ids[:, :1]
    # The operations of a token grow by the same number from one position to the next.
    (first, _), (second, _) = (count(lambda: model(input_ids=one, logits_to_keep=1, **{CACHE: cache})) for _ in range(2))
    cost.decode = sum(first + number * (second - first) for number in range(answer_tokens - 1))
    inner = model.model
    inner.language_model.set_input_embeddings(torch.nn.Identity())  # only a few rows of it are read
    decoder = size_of(inner.language_model, bytes_each) + size_of(model.lm_head, bytes_each)
    injectors = size_of(inner.injectors, bytes_each)
    cost.encode_bytes = size_of(model, bytes_each) - decoder - injectors
    cost.prefill_bytes = decoder + injectors
    cost.decode_bytes = decode_bytes(config.text_config, decoder, length, answer_tokens, bytes_each)
    return cost


def decode_bytes(text: Any, weights: int, length: int, answer_tokens: int, bytes_each: int) -> float:
    """What decoding reads: the weights for every token, and the keys and values before it."""
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * bytes_each
    return sum(weights + position * (length + number) for number in range(1, answer_tokens))


def head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@dataclass
class Encoder:
    """A vision transformer with the layers of `vision`, that sees `views` of `patches` patches each."""

    views: int
    patches: int

    def operations(self, vision: Any) -> float:
        width, layers, tokens = vision.hidden_size, vision.num_hidden_layers, self.patches
        weights = 4 * width**2 + 2 * width * vision.intermediate_size
        patch = vision.patch_size**2 * vision.num_channels * width
        return self.views * (layers * (2 * weights * tokens + 4 * tokens**2 * width) + 2 * patch * tokens)


def count_peer(
    config: MFRSVLMConfig, encoder: Encoder, visual_tokens: int, text_tokens: int, answer_tokens: int, bytes_each: int
) -> Cost:
    """The cost of a model without injection that has the same parts: its visual tokens are the input of the decoder.

    Matrix products are counted by their sizes, and attention over all pairs of positions, as `FlopCounterMode` counts it.
    """
    vision, text = config.vision_config, config.text_config
    length = visual_tokens + text_tokens
    with torch.device("meta"):
        model = MFRSVLMForConditionalGeneration(change(config, MODES["global view only"]))
    projector = model.model.multi_modal_projector
    decoder = size_of(model.model.language_model, 1) - text.vocab_size * text.hidden_size
    head = text.vocab_size * text.hidden_size
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * head_size(text)
    cost = Cost(visual_tokens)
    cost.encode = encoder.operations(vision) + 2 * size_of(projector, 1) * visual_tokens
    cost.prefill = 2 * decoder * length + attention * length**2 + 2 * head
    cost.decode = sum(2 * (decoder + head) + attention * (length + number) for number in range(1, answer_tokens))
    cost.encode_bytes = (size_of(model.model.vision_tower, 1) + size_of(projector, 1)) * bytes_each
    cost.prefill_bytes = (decoder + head) * bytes_each
    cost.decode_bytes = decode_bytes(text, (decoder + head) * bytes_each, length, answer_tokens, bytes_each)
    return cost


def peers(config: MFRSVLMConfig) -> dict[str, tuple[Encoder, int]]:
    """Encoder and visual tokens of other families on the same canvas."""
    tokens, scale = config.image_seq_length, config.canvas_scale
    canvas = tokens * scale**2
    rows = config.tokens_per_side * scale
    return {
        "LLaVA-1.5: one view": (Encoder(1, tokens), tokens),
        # The tiles of the canvas and the whole; a token ends each row of the canvas.
        "LLaVA-NeXT: tiles as tokens": (Encoder(1 + scale**2, tokens), tokens + canvas + rows),
        "Qwen3-VL: one pass, 2 x 2 merged": (Encoder(1, canvas), canvas // 4),
    }


def count_all(config: MFRSVLMConfig, text_tokens: int = 61, answer_tokens: int = 32, bytes_each: int = 2) -> dict[str, Cost]:
    """The cost of all modes and, for a vision transformer, of the other families."""
    rest = (text_tokens, answer_tokens, bytes_each)
    rows = {name: count_model(change(config, fields), *rest) for name, fields in MODES.items()}
    if not config.is_hierarchical:
        rows |= {name: count_peer(config, *of, *rest) for name, of in peers(config).items()}
    return rows


def as_table(rows: dict[str, Cost], flops: float, bandwidth: float) -> str:
    lines = [
        "| | visual tokens | encode, TFLOP | first token, TFLOP | whole answer, TFLOP | read, GB | least time, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, cost in rows.items():
        first = (cost.encode + cost.prefill) / 1e12
        read = (cost.encode_bytes + cost.prefill_bytes + cost.decode_bytes) / 1e9
        lines.append(
            f"| {name} | {cost.visual_tokens} | {cost.encode / 1e12:.2f} | {first:.2f} | {first + cost.decode / 1e12:.2f} "
            f"| {read:.1f} | {cost.least_seconds(flops, bandwidth):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="model folder or config.json; default: the published sizes")
    parser.add_argument("--text-tokens", type=int, default=61, help="of the prompt (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=32, help="of the answer (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=2, help="of a weight (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=400.0, help="of the device (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=2000.0, help="of its memory, in GB/s (default: %(default)s)")
    args = parser.parse_args()
    config = read_config(args.config) if args.config else published_sizes()
    rows = count_all(config, args.text_tokens, args.answer_tokens, args.bytes)
    print(as_table(rows, args.tflops * 1e12, args.bandwidth * 1e9))


if __name__ == "__main__":
    main()
