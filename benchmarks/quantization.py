"""Accuracy, size and speed of a model whose decoder has weights of 32, 16, 8 and 4 bits.

    pip install torchao bitsandbytes
    python benchmarks/quantization.py [--model experiments/scene_model] [--limit 600] [--rounds 5]

Eight bits are those of torchao, four bits the normal floats (NF4) of bitsandbytes. Tower, projector and injectors stay
whole, as by default. Accuracy is that on synthetic scenes. Seconds are user and system seconds of one answer of 16 tokens,
and the arms take turns. A small model shows the loss, and how many bytes are read; its products are too small to gain speed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.evaluation import EvaluationSettings, evaluate
from mfrsvlm.experiments import SCENE_MODEL


FIGURES = {"classification": "accuracy", "counting": "exact", "vqa": "accuracy", "grounding": "accuracy_0.5"}


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4() -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


ARMS: dict[str, tuple[torch.dtype, Callable[[], Any] | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, decoder in 8 bits": (torch.bfloat16, int8),
    "bfloat16, decoder in 4 bits": (torch.bfloat16, nf4),
}


def size_in_bytes(value: Any) -> int:
    """Of a tensor, or of the tensors that a quantized one consists of."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(size_in_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    scales = getattr(getattr(value, "quant_state", None), "absmax", None)
    return int(value.nbytes) + (0 if scales is None else int(scales.nbytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SCENE_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=600, help="questions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.disable_progress_bar()
    processor = MFRSVLMProcessor.from_pretrained(args.model)
    models, cells = {}, {}
    for name, (dtype, make) in ARMS.items():
        options = {} if make is None else {"quantization_config": make()}
        model = MFRSVLMForConditionalGeneration.from_pretrained(args.model, dtype=dtype, device_map=args.device, **options)
        models[name] = model.eval()
        decoder = model.model.language_model.layers
        settings = EvaluationSettings(limit=args.limit, progress=False)
        results = evaluate(model, processor, ["scenes"], "strict-without-java", settings)["scenes/test"]["results"]
        sizes = [sum(map(size_in_bytes, part.parameters())) / 2**20 for part in (model, decoder)]
        figures = [f"{100 * results[task][figure]['value']:.1f}" for task, figure in FIGURES.items()]
        cells[name] = [*(f"{size:.1f}" for size in sizes), *figures]
        print(name, *cells[name], file=sys.stderr, flush=True)
    config = next(iter(models.values())).config
    ids = torch.tensor([[config.image_token_id] * config.image_seq_length + list(range(5, 45))], device=args.device)
    pixels = torch.randn(1, sum(config.packed_lengths), device=args.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
            model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    print(f"| weights | MiB | of the decoder | {' | '.join(FIGURES)} | seconds of an answer |")
    print("|---|--:|--:|" + "--:|" * (len(FIGURES) + 1))
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} | {statistics.median(seconds[name]):.2f} |")


if __name__ == "__main__":
    main()
