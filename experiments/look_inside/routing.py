"""Routing: how the routers weigh the detail stacks, for scenes of small and of large objects.

In gated injection the weights depend on the image and not on the question. Routers read the visual positions and the details
only, and in a causal decoder a visual position sees nothing of a question that comes after it. So images are compared, not
questions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...configuration_mfrsvlm import MFRSVLMConfig
from ...inspection.routers import has_routers, recorded_routers
from ...modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ...processing_mfrsvlm import MFRSVLMProcessor
from ...scenes import Scene, draw, plan_scene, scene_seed
from ...training.demo_model.scene_images import SCENE_SIZE
from .reading import count_questions, prompts_and_answers


# Lengths of the objects in the two groups of scenes whose routing is compared, pixels of a scene of 512.
SMALL_OBJECTS, LARGE_OBJECTS = (8.0, 12.0), (16.0, 32.0)


@torch.inference_mode()
def read_routers(model: MFRSVLMForConditionalGeneration, processor: MFRSVLMProcessor, scenes: Sequence[Scene]) -> np.ndarray:
    """Router weights of every scene, (J, n, K, T), or (J, n, K, 1) with `"stack"` routing; see `recorded_routers`."""
    with recorded_routers(model) as records:
        for scene in tqdm(scenes, desc="routers", leave=False):
            inputs = prompts_and_answers(processor, draw(scene), count_questions(scene)[:1])
            for name in ("first", "predicts"):
                del inputs[name]
            model.model(**inputs, use_cache=False)
    return np.stack([np.concatenate(record) for record in records])


def relative_entropy(weights: np.ndarray, axis: int) -> np.ndarray:
    """Entropy along an axis as a share of the largest possible: 1 weighs all stacks alike, 0 picks one."""
    entropy = -(weights * np.log(np.clip(weights, 1e-30, None))).sum(axis)
    return entropy / math.log(max(weights.shape[axis], 2))


def summarize_router(weights: np.ndarray, config: MFRSVLMConfig) -> dict[str, Any]:
    """Mean weights of one injection layer.

    Args:
        weights: (n, K, T) or (n, K, 1).
        config: says what the stacks are. Their order is scale, depth, row phase, column phase.

    Returns:
        `mean` (scales, depths, row phases, column phases), its sums `by_scale`, `by_depth`, `by_scale_and_depth` and
        `by_phase` (rows, columns); `deviation` of the K weights over scenes; `entropy`, the mean of each choice's own, and
        `entropy_of_mean`. Both are relative to uniform. Where the first is lower, the router chooses differently from
        image to image (or from token to token).
    """
    factor = config.canvas_scale
    shape = (len(config.window_sizes), len(config.detail_feature_layers), factor, factor)
    by_scene = weights.mean(-1, dtype=np.float64)  # (n, K)
    mean = by_scene.mean(0)
    grid = mean.reshape(shape)
    return {
        "mean": grid,
        "deviation": by_scene.std(0).reshape(shape),
        "by_scale": grid.sum((1, 2, 3)),
        "by_depth": grid.sum((0, 2, 3)),
        "by_scale_and_depth": grid.sum((2, 3)),
        "by_phase": grid.sum((0, 1)),
        "entropy": relative_entropy(weights, 1).mean(),
        "entropy_of_mean": relative_entropy(mean, 0),
    }


def routing_shift(first: np.ndarray, second: np.ndarray, shuffles: int = 200) -> dict[str, float]:
    """How differently two groups of scenes are routed by one layer, (n, K, T) and (m, K, T).

    Returns:
        `distance`: the share of weight (0 to 1) that moves to other stacks between the groups' means, and `by_chance`:
        the 95 % quantile of the same with the groups mixed at random.
    """
    both = np.concatenate([first.mean(-1), second.mean(-1)])
    rng = np.random.default_rng(0)

    def distance(order: np.ndarray) -> float:
        one, other = both[order[: len(first)]].mean(0), both[order[len(first) :]].mean(0)
        return float(np.abs(one - other).sum() / 2)

    by_chance = [distance(rng.permutation(len(both))) for _ in range(shuffles)]
    return {"distance": distance(np.arange(len(both))), "by_chance": float(np.quantile(by_chance, 0.95))}


def measure_routing(
    model: MFRSVLMForConditionalGeneration, processor: MFRSVLMProcessor, num_scenes: int
) -> dict[str, Any] | None:
    """Routing of test scenes with small and with large objects, layer by layer; `None` for a model without routers."""
    config = model.config
    if not has_routers(config):
        return None
    seeds = [scene_seed("test", index) for index in range(num_scenes)]
    groups = {
        name: read_routers(model, processor, [plan_scene(seed, SCENE_SIZE, pixels) for seed in seeds])
        for name, pixels in (("small", SMALL_OBJECTS), ("large", LARGE_OBJECTS))
    }
    return {
        "injection_layers": config.injection_layers,
        "window_sizes": config.window_sizes,
        "detail_feature_layers": config.detail_feature_layers,
        "routing": config.routing,
        "object_pixels": {"small": SMALL_OBJECTS, "large": LARGE_OBJECTS},
        "layers": [
            {
                "small": summarize_router(small, config),
                "large": summarize_router(large, config),
                "small_to_large": routing_shift(small, large),
            }
            for small, large in zip(groups["small"], groups["large"], strict=True)
        ],
    }
