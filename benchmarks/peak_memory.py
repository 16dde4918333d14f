"""Peak memory of a training step and of a beam search, beyond the weights.

    python benchmarks/peak_memory.py [--before FOLDER]

Every measurement runs in a process of its own: a decoder of 8 layers x 512 channels with random weights, one image of 24
detail stacks x 576 tokens, injected at four layers, float32. `--before` names the folder above another copy of the package
(`FOLDER/mfrsvlm`), which is also measured.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path


CHOICES = {
    "stack": {"routing": "stack"},
    "token": {"routing": "token"},
    "cross attention": {"injection_type": "cross_attention"},
}


def measure(choice: str, task: str) -> float:
    """MiB that the peak of the process lies above what it holds before the task."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1001,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    config = MFRSVLMConfig(
        vision_config=vision,
        text_config=text,
        detail_feature_layers=[1, 2, 3],
        injection_layers=[1, 3, 5, 7],
        window_overlap=0.0,
        window_chunk_size=1,
        **CHOICES[choice],
    )
    model = MFRSVLMForConditionalGeneration(config)
    image = [config.image_token_id] * config.image_seq_length
    ids = torch.tensor([[1, *image, *range(5, 25)]])
    if hasattr(config, "packed_lengths"):
        pixels = {"pixel_values": torch.randn(1, sum(config.packed_lengths))}
    else:  # an image was two tensors once
        length = sum(window.num_values for window in config.windows)
        pixels = {"pixel_values": torch.randn(1, 3, 336, 336), "pixel_values_local": torch.randn(1, length)}
    before = resident()
    if task == "training step":
        model.train()
        model(input_ids=ids, labels=ids.masked_fill(ids == config.image_token_id, -100), **pixels).loss.backward()
    else:
        model.eval().generate(input_ids=ids, **pixels, num_beams=4, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def resident() -> float:
    """MiB that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="folder above another copy of the package")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter for --before, if it needs another transformers"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(*args.measure))
        return
    arms = {"now": (sys.executable, os.environ)}
    if args.before:
        arms = {"before": (args.python, {**os.environ, "PYTHONPATH": str(args.before)}), **arms}
    print(f"| task | injection | {' | '.join(f'{arm}, MiB' for arm in arms)} |")
    print("|---|---|" + "--:|" * len(arms))
    for task in ("training step", "4 beams"):
        for choice in CHOICES:
            cells = []
            for python, environment in arms.values():
                command = [python, __file__, "--measure", choice, task]
                run = subprocess.run(command, env=environment, capture_output=True, text=True)
                if run.returncode:
                    sys.exit(run.stderr)
                cells.append(f"{float(run.stdout.splitlines()[-1]):.0f}")
            print(f"| {task} | {choice} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
