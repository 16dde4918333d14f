"""Pretrains a vision encoder to predict the objects in every token.

A decoder cannot learn from an encoder that does not distinguish a car from a bush. Each visual token of a crop predicts how
many objects of each kind have their center in it, the box of one of them, and its own row and column. The mean of all tokens
predicts the class of the scene. The heads are not part of the model.
"""

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...files.writing import write_tensors
from ...modeling_mfrsvlm import MFRSVLMModel, resample_to_grid
from ...scenes import CLASSES, KINDS, Scene
from ..image_features import ENCODER
from .architecture import IMAGE_SIZE, PATCH_SIZE, make_config
from .scene_images import CANVAS, SCENE_SIZE, VIEW, SceneImages


logger = logging.getLogger(__name__)

# What the windows look like: (share of batches, side of the crop, side when encoded). A crop as large
# as the canvas is the global view.
CROPS = ((0.4, 128, 128), (0.3, CANVAS, VIEW), (0.15, 64, 64), (0.15, 64, 128))
# Weights of the losses of the heads.
LOSS_WEIGHT = {"presence": 1.0, "count": 1.0, "box": 4.0, "class": 0.5, "place": 0.2}
CHANNELS = 6  # a kind's outputs for a token: presence, count, and center x, y, width, height in tokens


class TokenHeads(nn.Module):
    """Linear heads that predict objects, position and scene class from the tokens of one depth."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.objects = nn.Linear(width, len(KINDS) * CHANNELS)
        self.place = nn.Linear(width, 2 * side)
        self.scene_class = nn.Linear(width, len(CLASSES))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, t * t, C) to (n, t * t, kinds, CHANNELS), (n, t * t, 2, side) and (n, classes)."""
        objects = self.objects(tokens).unflatten(-1, (len(KINDS), CHANNELS))
        return objects, self.place(tokens).unflatten(-1, (2, -1)), self.scene_class(tokens.mean(1))


def object_table(scene: Scene) -> np.ndarray:
    """(objects, 5): kind, center x, y, width and height in pixels of the canvas."""
    scale = CANVAS / SCENE_SIZE
    rows = []
    for item in scene.objects:
        left, top, right, bottom = (value * scale for value in item.box)
        rows.append((KINDS.index(item.kind), (left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
    return np.array(rows, dtype=np.float32).reshape(-1, 5)


def token_targets(table: np.ndarray, left: float, top: float, side: float, tokens: int) -> np.ndarray:
    """(tokens * tokens, kinds, CHANNELS): targets of the heads for a square crop of the canvas."""
    target = np.zeros((tokens, tokens, len(KINDS), CHANNELS), dtype=np.float32)
    cell = side / tokens
    x, y = (table[:, 1] - left) / cell, (table[:, 2] - top) / cell
    for i in np.flatnonzero((x >= 0) & (x < tokens) & (y >= 0) & (y < tokens)):
        column, row = int(x[i]), int(y[i])
        entry = target[row, column, int(table[i, 0])]
        entry[0] = 1
        entry[1] += 1
        entry[2:] = x[i] - column, y[i] - row, table[i, 3] / cell, table[i, 4] / cell
    return target.reshape(tokens * tokens, len(KINDS), CHANNELS)


def batches(images: SceneImages, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of pixels (n, 3, s, s) in [-1, 1], targets (n, t * t, kinds, CHANNELS) and classes (n,)."""
    rng = np.random.default_rng(seed)
    tables = [object_table(scene) for scene in images.scenes]
    classes = [list(CLASSES).index(scene.scene_class) for scene in images.scenes]
    shares = [share for share, _, _ in CROPS]
    while True:
        _, side, encoded = CROPS[rng.choice(len(CROPS), p=shares)]
        pixels, targets = [], []
        chosen = rng.integers(0, len(images), size)
        for index in chosen:
            left, top = rng.integers(0, CANVAS - side + 1, 2)
            if side == CANVAS:
                pixels.append(images.views[index])
            else:
                pixels.append(images.canvases[index, top : top + side, left : left + side])
            targets.append(token_targets(tables[index], left, top, side, encoded // PATCH_SIZE))
        crop = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if crop.shape[-1] != encoded:
            crop = F.interpolate(crop, size=(encoded, encoded), mode="bilinear", align_corners=False)
        yield crop, torch.from_numpy(np.stack(targets)), torch.tensor([classes[index] for index in chosen])


def encode(model: MFRSVLMModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The depths that windows are read at, each (n, t * t, C)."""
    side = pixels.shape[-1] // PATCH_SIZE
    _, maps = model._encode(pixels, model.config.detail_feature_layers)
    return [resample_to_grid(depth, side).flatten(2).transpose(1, 2) for depth in maps]


def losses(heads: TokenHeads, tokens: torch.Tensor, targets: torch.Tensor, classes: torch.Tensor) -> dict[str, torch.Tensor]:
    objects, place, scene_class = heads(tokens)
    present = targets[..., 0]
    side = int(tokens.shape[1] ** 0.5)
    result = {
        "presence": F.binary_cross_entropy_with_logits(objects[..., 0], present, reduction="sum")
        / present.sum().clamp(min=1),
        "count": F.smooth_l1_loss(objects[..., 1], targets[..., 1], reduction="sum") / present.sum().clamp(min=1),
        "box": ((objects[..., 2:] - targets[..., 2:]).abs().mean(-1) * present).sum() / present.sum().clamp(min=1),
        "class": F.cross_entropy(scene_class, classes),
    }
    if side == IMAGE_SIZE // PATCH_SIZE:
        index = torch.arange(side * side)
        goal = torch.stack([index // side, index % side], dim=-1).expand(len(tokens), -1, -1)
        result["place"] = F.cross_entropy(place.flatten(0, 2), goal.flatten())
    return result


def pretrain(encoder: str, images: SceneImages, output: Path, steps: int, seed: int = 0, batch: int = 32) -> None:
    """Trains the tower (and stage projections) on one cosine cycle and saves them and the heads to `output`.

    The tower computes in bfloat16; weights and losses stay in float32.
    """
    torch.manual_seed(seed)
    config = make_config(16, encoder)
    model = MFRSVLMModel(config)
    del model.language_model, model.multi_modal_projector, model.injectors
    heads = nn.ModuleList(
        TokenHeads(config.vision_feature_size, IMAGE_SIZE // PATCH_SIZE) for _ in config.detail_feature_layers
    )
    model.vision_tower.train()  # unlike in the finished model, batch statistics are learned here
    parameters = [parameter for parameter in [*model.parameters(), *heads.parameters()] if parameter.requires_grad]
    peak = 2e-3
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.02)
    start, running = time.perf_counter(), {}
    for step, (pixels, targets, classes) in enumerate(islice(batches(images, batch, seed), steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
        total = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            depths = encode(model, pixels)
        for head, tokens in zip(heads, depths, strict=True):
            parts = losses(head, tokens.float(), targets, classes)
            total = total + sum(LOSS_WEIGHT[name] * value for name, value in parts.items())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in parts.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if step % 100 == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in running.items())
            logger.info(f"encoder, step {step} of {steps}, {time.perf_counter() - start:.0f} s: {shown}")
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in model.state_dict().items() if name.startswith(ENCODER)}
    write_tensors(output, {"model": kept, "heads": heads.state_dict()})


def load_encoder(model: MFRSVLMModel, path: Path) -> None:
    """Puts a pretrained encoder into a model.

    Raises:
        RuntimeError: the file contains an encoder of another shape.
    """
    state = torch.load(path, weights_only=True)["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    left_out = [name for name in missing if name.startswith(ENCODER)]
    if unexpected or left_out:
        raise RuntimeError(f"{path} does not fit the encoder: it lacks {left_out[:3]} and has {unexpected[:3]} too many.")
