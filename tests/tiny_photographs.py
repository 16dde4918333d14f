"""A made-up folder of photographs in the layout that `training/demo_model/photographs.py` describes, and a random tower."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfrsvlm.evaluation.benchmarks import BENCHMARKS


CLASSES = list(BENCHMARKS["uc-merced"].loader.__self__.classes)
LABELS = list(BENCHMARKS["ucm-multilabel"].loader.__self__.labels)


# Of each block: channels before and after, expansion, kernel, stride (table 1 of the paper, with three layers and so on).
STAGES = [
    (16, 1, 3, 1, 1),
    (24, 6, 3, 2, 2),
    (40, 6, 5, 2, 2),
    (80, 6, 3, 2, 3),
    (112, 6, 5, 1, 3),
    (192, 6, 5, 2, 4),
    (320, 6, 3, 1, 1),
]
BLOCKS = []
for outer, ratio, kernel, stride, repeats in STAGES:
    for index in range(repeats):
        BLOCKS.append((BLOCKS[-1][1] if BLOCKS else 32, outer, ratio, kernel, stride if index == 0 else 1))


def texture(seed: int, side: int = 256) -> np.ndarray:
    """(side, side, 3) uint8 without any structure in common with that of another seed."""
    rng = np.random.default_rng(seed)
    fine = Image.fromarray(rng.integers(0, 256, (side // 2, side // 2, 3), dtype=np.uint8))
    return np.asarray(fine.resize((side, side), Image.Resampling.BICUBIC))


def make_photographs(root: Path, each: int = 4, side: int = 64) -> Path:
    """`each` photographs of every class. The last one is of the test split; the first one of airplanes overlaps with it."""
    captions, questions, table = [], [], ["IMAGE\\LABEL\t" + "\t".join(LABELS)]
    for number, name in enumerate(CLASSES):
        folder = name.replace(" ", "")
        (root / "ucm" / "Images" / folder).mkdir(parents=True)
        mosaic = texture(number, 2 * side)
        for index in range(each):
            stem, split = f"{folder}{index:02d}", "test" if index == each - 1 else "train"
            pixels = texture(1000 + number * each + index, side)
            if name == "airplane" and index in (0, each - 1):
                left = 0 if index == 0 else side // 4
                pixels = mosaic[:side, left : left + side]
            image = f"Images/{folder}/{stem}.png"
            Image.fromarray(pixels).save(root / "ucm" / image)
            texts = [f"There is one {name} .", f"There is one {name} .", f"A picture of {name} number {index} ."]
            captions.append({"image": image, "split": split, "captions": texts})
            table.append("\t".join([stem, *(str((number + place + index) % 2) for place in range(len(LABELS)))]))
            for question, answer in (
                ("How many cars in the picture?", "two"),
                ("What is the location of the cars in this picture?", "upper left" if index % 2 else "center"),
                ("How many  in the picture?", "zero"),
            ):
                row = {"image": image, "question": question, "answer": answer, "split": split}
                questions.append(row | {"broken": "  " in question})
    (root / "aerial_cars" / "images").mkdir(parents=True)
    frames = []
    for name in ("DJI_0005-0001", "DJI_0013-0002", "DJI_0013-0003"):
        image = f"images/{name}.png"
        Image.fromarray(texture(len(frames), 96)).resize((192, 108)).save(root / "aerial_cars" / image)
        boxes = [
            ("car", [10, 10, 22, 18]),
            ("car", [100, 50, 112, 58]),
            ("car", [150, 90, 162, 98]),
            ("bus", [60, 60, 90, 70]),
        ]
        objects = [{"class": kind, "box": box} for kind, box in boxes]
        frames.append({"image": image, "width": 192, "height": 108, "objects": objects})
    (root / "aerial_cars" / "boxes.json").write_text(json.dumps(frames))
    (root / "ucm" / "captions.json").write_text(json.dumps(captions))
    (root / "ucm" / "rsivqa.json").write_text(json.dumps(questions))
    (root / "ucm" / "LandUse_Multilabeled.txt").write_text("\n".join(table) + "\n")
    return root


def lite0_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of EfficientNet-lite0 under the names of the package `efficientnet-lite-pytorch`."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def convolution(name, out, per_group, size):
        state[f"{name}.weight"] = (
            torch.randn(out, per_group, size, size, generator=generator) * (per_group * size**2) ** -0.5
        )

    def norm(name, channels):
        state[f"{name}.weight"] = 1 + 0.2 * torch.rand(channels, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=generator)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for number, (inner, outer, ratio, kernel, _) in enumerate(BLOCKS):
        name, wide = f"_blocks.{number}", inner * ratio
        if ratio > 1:
            convolution(f"{name}._expand_conv", wide, inner, 1)
            norm(f"{name}._bn0", wide)
        convolution(f"{name}._depthwise_conv", wide, 1, kernel)
        norm(f"{name}._bn1", wide)
        convolution(f"{name}._project_conv", outer, wide, 1)
        norm(f"{name}._bn2", outer)
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
