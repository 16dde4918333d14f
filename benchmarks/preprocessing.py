"""Measures the time of the image processor on one image, and the size of its output.

    python benchmarks/preprocessing.py [--sides 512 4000] [--rounds 15] [--before FOLDER]

The arms take turns, so that the ratios hold when the speed of the machine drifts. The peer is LLaVA-NeXT's processor for
numpy and Pillow on the same image, with its published size (five crops of 336). `--before` names the folder above another
copy of the package (`FOLDER/mfrsvlm`), which is also measured.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil

import mfrsvlm


ARMS: dict[str, dict[str, Any]] = {
    "overlap 0.5": {},
    "overlap 0": {"window_overlap": 0.0},
    "overlap 0, windows of 168 alone": {"window_overlap": 0.0, "window_sizes": [168]},
    "overlap 0.5, bfloat16": {"pixel_dtype": "bfloat16"},
}


def package_in(folder: str) -> ModuleType:
    """Imports another copy of this package, in addition to this one."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mfrsvlm"}
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("mfrsvlm")
    finally:
        sys.path.remove(folder)
        sys.modules.update(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 4000], help="of the square image, pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--before", help="folder above another copy of the package")
    args = parser.parse_args()

    peer = "LLaVA-NeXT"
    arms: dict[str, Callable[..., Any]] = {peer: LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)}
    if args.before:
        before = package_in(args.before).MFRSVLMImageProcessor
        arms |= {f"{name}, before": before(**settings) for name, settings in ARMS.items() if "pixel_dtype" not in settings}
    arms |= {name: mfrsvlm.MFRSVLMImageProcessor(**settings) for name, settings in ARMS.items()}

    print(f"{torch.get_num_threads()} threads, median of {args.rounds} rounds")
    print("| arm | side | ms | times LLaVA-NeXT | MB an image |\n|---|---|---|---|---|")
    for side in args.sides:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        sizes = {}
        for round_number in range(args.rounds + 1):
            for name, processor in arms.items():
                start = time.perf_counter()
                outputs = processor(image, return_tensors="pt")
                taken = time.perf_counter() - start
                if round_number:  # the first round warms up
                    seconds[name].append(taken)
                sizes[name] = sum(tensor.nbytes for key, tensor in outputs.items() if key.startswith("pixel_values"))
        for name, taken_by in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(taken_by, seconds[peer], strict=True))
            print(f"| {name} | {side} | {1000 * statistics.median(taken_by):.0f} | {ratio:.2f} | {sizes[name] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
