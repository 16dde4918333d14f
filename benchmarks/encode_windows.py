"""Times the encoding of one image's windows and its peak memory, by window encoding and chunk size.

    python benchmarks/encode_windows.py [--hidden-size 1024] [--layers 24] [--rounds 5]

The arms take turns, so that the ratios hold when the speed of the machine drifts. Memory is the most that the process
grew while encoding, sampled, each arm in a process of its own. Weights are random, which costs the same. Needs psutil.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mfrsvlm import MFRSVLMConfig, MFRSVLMModel


ARMS = {
    "resize, chunks of 16": ("resize", 16),
    "native, chunks of 16": ("native", 16),
    "native, chunks of 4": ("native", 4),
    "native, all 58 at once": ("native", None),
}


def build(encoding: str, chunk: int | None, args: argparse.Namespace) -> MFRSVLMModel:
    """Default geometry (9 windows of 336 and 49 of 168 pixels) over a decoder too small to matter."""
    vision = CLIPVisionConfig(
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = MFRSVLMConfig(
        vision_config=vision,
        text_config=text,
        window_encoding=encoding,
        window_chunk_size=chunk,
        detail_feature_layers=[args.layers // 3, 2 * args.layers // 3, args.layers],
        injection_layers=[1],
    )
    return MFRSVLMModel(config).to(getattr(torch, args.dtype)).eval()


def encode(model: MFRSVLMModel, pixels: torch.Tensor) -> float:
    """Seconds for the windows of one image, from pixels to detail stacks."""
    start = time.perf_counter()
    with torch.inference_mode():
        model.get_detail_features(pixels)
    return time.perf_counter() - start


def growth_in_megabytes(model: MFRSVLMModel, pixels: torch.Tensor) -> float:
    """Largest growth of resident memory during one encoding, sampled every two milliseconds."""
    process, done, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    encode(model, pixels)
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the encoder (ViT-L: 1024)")
    parser.add_argument("--layers", type=int, default=24, help="of the encoder (ViT-L: 24)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    pixels = torch.randn(1, sum(MFRSVLMConfig().packed_lengths), dtype=getattr(torch, args.dtype))

    if args.memory_of:
        print(growth_in_megabytes(build(*ARMS[args.memory_of], args), pixels))
        return

    models = {name: build(encoding, chunk, args) for name, (encoding, chunk) in ARMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for round_number in range(args.rounds + 1):
        for name, model in models.items():
            taken = encode(model, pixels)
            if round_number:  # the first round warms up
                seconds[name].append(taken)
    baseline = seconds["native, chunks of 16"]
    print("| windows of one image | seconds, median | times native in chunks of 16 | peak memory, MB |\n|---|---|---|---|")
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, baseline, strict=True))
        child = [sys.executable, __file__, "--memory-of", name, "--dtype", args.dtype]
        child += ["--hidden-size", str(args.hidden_size), "--layers", str(args.layers)]
        memory = float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        print(f"| {name} | {statistics.median(taken):.2f} | {ratio:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
