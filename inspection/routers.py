"""Router weights: which detail stacks the injectors of a gated model prefer, and where in the image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..configuration_mfrsvlm import MFRSVLMConfig


@contextmanager
def recorded_routers(model: Any) -> Iterator[list[list[np.ndarray]]]:
    """Yields a list for every injection layer that fills with its router's weights, (N, K, T) of each forward pass.

    With `"stack"` routing the last axis has length 1.

    Args:
        model: an `MFRSVLMForConditionalGeneration` with gated injection, see `has_routers`.
    """
    injectors = model.model.injectors
    records: list[list[np.ndarray]] = [[] for _ in injectors]

    def keep(record: list[np.ndarray]) -> Callable[..., None]:
        def hook(module: Any, args: Any, weights: torch.Tensor) -> None:
            by_token = model.config.routing == "token"
            # (K, N, 1, T) or (N, 1, K) to (N, K, T)
            weights = weights[:, :, 0].movedim(1, 0) if by_token else weights[:, 0, :, None]
            record.append(weights.detach().float().cpu().numpy())

        return hook

    handles = [
        injector.router.register_forward_hook(keep(record)) for injector, record in zip(injectors, records, strict=True)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def has_routers(config: Any) -> bool:
    """Whether a model has injectors that weigh detail stacks."""
    return isinstance(config, MFRSVLMConfig) and config.has_details and config.injection_type == "gated"


@dataclass(frozen=True)
class Preference:
    """How much the injectors took from the windows of one size, read at one depth of the encoder.

    Attributes:
        window_size: side of the windows, pixels of the canvas.
        depth: encoder output that was read.
        share: share of all weight, 0 to 1. The shares of all preferences add up to 1.
        by_place: the same for each visual token, (side, side), or (1, 1) with `"stack"` routing.
    """

    window_size: int
    depth: int
    share: float
    by_place: np.ndarray


def preferences(config: MFRSVLMConfig, records: list[list[np.ndarray]]) -> list[Preference]:
    """Means over the injection layers and phases of the first image that `recorded_routers` saw."""
    weights = np.mean([record[0][0] for record in records], axis=0)  # (K, T)
    side = config.tokens_per_side if weights.shape[1] > 1 else 1
    # Stacks are ordered by scale, depth, phase.
    weights = weights.reshape(len(config.window_sizes), len(config.detail_feature_layers), -1, side, side).sum(2)
    return [
        Preference(size, depth, float(weights[scale, level].mean()), weights[scale, level])
        for scale, size in enumerate(config.window_sizes)
        for level, depth in enumerate(config.detail_feature_layers)
    ]


def draw_preference(image: Image.Image, preference: Preference, largest: float) -> Image.Image:
    """The image in grey, red where the injectors took much from these windows.

    Args:
        image: the image, RGB. It is padded to a square as the processor does.
        preference: what to draw.
        largest: weight that is drawn fully red.
    """
    side = max(image.size)
    square = Image.new("L", (side, side))
    square.paste(image.convert("L"), ((side - image.width) // 2, (side - image.height) // 2))
    strength = np.clip(preference.by_place / max(largest, 1e-9), 0, 1)
    heat = Image.fromarray((255 * strength).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    grey = np.asarray(square, np.float32)[..., None] * np.ones(3, np.float32)  # (side, side, 3)
    alpha = np.asarray(heat, np.float32)[..., None] / 255 * 0.7
    return Image.fromarray((grey * (1 - alpha) + np.float32([255, 40, 0]) * alpha).astype(np.uint8))
