"""Measures time and memory against the number of bands: processor, pixels on their way, first layer, whole encoder.

    python benchmarks/bands.py [--bands 3 4 6 13 30] [--rounds 5]

The image has 512 pixels a side and the default geometry: a view and windows for an encoder of 336 pixels. Encoders are a
ViT-L/14 (its first layer alone, for one view) and `experiments/scene_model`, widened in memory, with its own geometry.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMImageProcessor
from mfrsvlm.experiments import SCENE_MODEL
from mfrsvlm.modeling_mfrsvlm import MFRSVLMBandConv2d


RGB = ["red", "green", "blue"]
TYPES = ("float32", "bfloat16", "uint8")


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Median, after one round that warms up."""
    call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


@torch.inference_mode()
def measure(count: int, rounds: int) -> list[str]:
    names = [*RGB, *(f"b{number}" for number in range(3, count))]
    settings = {"num_channels": count, "image_bands": names, "image_mean": [0.5] * count, "image_std": [0.25] * count}
    image = np.random.default_rng(0).integers(0, 256, (count, 512, 512), dtype=np.uint8)
    cells = [str(count)]
    inputs = {}
    for dtype in TYPES:
        processor = MFRSVLMImageProcessor(**settings, pixel_dtype=dtype)
        inputs[dtype] = processor(image, return_tensors="pt", input_data_format="channels_first")
        taken = milliseconds(
            lambda processor=processor: processor(image, return_tensors="pt", input_data_format="channels_first"), rounds
        )
        cells += [f"{taken:.0f}", f"{inputs[dtype]['pixel_values'].nbytes / 1e6:.1f}"]
    cells.append(f"{milliseconds(lambda: processor.to_device(inputs['uint8'], 'cpu'), rounds):.0f}")
    stem: nn.Module = nn.Conv2d(count, 1024, 14, 14, bias=False)  # of CLIP ViT-L/14
    stem = MFRSVLMBandConv2d(stem, range(3)) if count > 3 else stem
    view = torch.randn(1, count, 336, 336)
    cells.append(f"{milliseconds(lambda: stem(view), rounds):.1f}")
    config = MFRSVLMForConditionalGeneration.config_class.from_pretrained(SCENE_MODEL)
    config.vision_config.num_channels, config.stem_channels = count, None if count == 3 else [0, 1, 2]
    model = MFRSVLMForConditionalGeneration(config).eval()
    row = torch.randn(1, sum(config.packed_lengths))
    cells.append(f"{milliseconds(lambda: model.get_image_features(row), rounds):.0f}")
    cells.append(f"{sum(p.numel() for n, p in model.named_parameters() if 'extra_bands' in n)}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bands", type=int, nargs="+", default=[3, 4, 6, 13, 30])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, median of {args.rounds} rounds")
    columns = [f"{dtype}: {what}" for dtype in TYPES for what in ("processor ms", "MB an image")]
    head = ["bands", *columns, "uint8: to_device ms", "first layer of ViT-L ms", "small encoder ms", "new weights"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for count in args.bands:
        print("| " + " | ".join(measure(count, args.rounds)) + " |", flush=True)


if __name__ == "__main__":
    main()
