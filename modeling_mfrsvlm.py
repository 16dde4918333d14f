"""MF-RSVLM: a vision encoder, multi-scale sliding windows, and injection into the layers of a stock decoder.

The skeleton is that of LLaVA: `vision_tower` -> `multi_modal_projector` -> `language_model`. Two things are added, both
from the paper *FUSE-RSVLM* (arXiv 2512.24022): windows over a high-resolution canvas are encoded at several depths of
the tower and stitched into *detail stacks*, and *injectors* feed these stacks back into several decoder layers. The
decoder runs its unchanged forward: an injector is a forward pre-hook on its layer, and gets its input through the keyword
argument `injection`.

Letters in shape comments: B samples, S positions, N images over the batch, r rows that share an image (beams), T tokens
an image, K detail stacks, n windows, k of them chosen, t tokens a window side, C vision channels, d decoder channels. All
visual state enters and leaves as arguments; nothing is kept on a module between calls.
"""

import copy
import functools
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoBackbone, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import CandidateGenerator, GenerationMixin, PromptLookupCandidateGenerator
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults

from .checksums_mfrsvlm import MODEL_FILES, remove_stale_weights, update_checksums
from .configuration_mfrsvlm import (
    CACHE,
    CAN_SELECT_HIDDEN_STATES,
    CHUNKS_CARRY_IMAGES,
    GENERATE_ENCODES_IMAGES,
    MFRSVLMConfig,
    WindowScale,
)
from .injection_mfrsvlm import (
    MASKED_SCORE,
    MFRSVLMCrossAttentionInjector,
    MFRSVLMGatedInjector,
    MFRSVLMInjectors,
    cross_attention_injection,
    drop_injection,
    gated_injection,
    is_empty,
    visual_layout,
    with_detail_cache,
)


logger = logging.get_logger(__name__)

# Tokens of the windows in one pass of the encoder if `window_chunk_size="auto"`. On CPUs the activations of more would leave
# the cache, in each type of numbers and from 256 to 1,024 channels; accelerators need more to be busy.
TOKENS_PER_PASS_ON_CPU, TOKENS_PER_PASS = 1200, 16384


# What quantization leaves whole, unless its config names modules itself. These parts are small, and all that the decoder
# sees of an image passes them.
WHOLE_PARTS = ("vision_tower", "stage_projections", "multi_modal_projector", "window_scorer", "injectors")


@dataclass
class MFRSVLMImageFeatures(BaseModelOutputWithPooling):
    """What `get_image_features` returns.

    Args:
        last_hidden_state: of the vision tower for the global views: (N, 1 + T, C) of a ViT, (N, C, h, w) of a backbone.
        pooler_output: the projected visual tokens, a list of N tensors (T, d).
        deepstack_features: the projected detail stacks, a list of K lists of N tensors (T, d), ordered by scale, depth,
            row phase, column phase. `None` for a model without injection.
    """

    deepstack_features: list[list[torch.Tensor]] | None = None


@dataclass
class MFRSVLMModelOutputWithPast(BaseModelOutputWithPast):
    """As its base, and:

    Args:
        image_hidden_states: the projected visual tokens of all images, (N * T, d).
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MFRSVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As its base. With cross-attention injection the cache is an `EncoderDecoderCache` that also holds the detail tokens:
    continue from the returned object, not from the one passed in.

    Args:
        image_hidden_states: the projected visual tokens of all images, (N * T, d).
    """

    image_hidden_states: torch.Tensor | None = None


class MFRSVLMMultiModalProjector(nn.Module):
    """Two-layer MLP from vision channels to decoder channels, shared by visual tokens and detail stacks."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_feature_size, hidden_size, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=config.multimodal_projector_bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class MFRSVLMWindowScorer(nn.Module):
    """One score per window, from the features of the global view and the question: how much its details are worth.

    Channels of a token are multiplied by channels of the question, so that a token can match what is asked for. The mean
    over the tokens of a window follows, since a small object fills few of them.
    """

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        size, depths, channels = config.routing_size, len(config.detail_feature_layers), config.vision_feature_size
        self.windows_per_side = config.windows[0].windows_per_side
        self.tokens_per_side = config.tokens_per_side
        self.content_norm = nn.LayerNorm(channels)
        self.content_proj = nn.Linear(depths * channels, size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.question_norm = nn.LayerNorm(config.text_config.hidden_size)
        self.question_proj = nn.Linear(config.text_config.hidden_size, size)
        self.score_proj = nn.Linear(size, 1, bias=False)

    def forward(self, global_maps: Sequence[torch.Tensor], question: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, h, w) of the global view, one per depth, and mean embeddings (N, d) of the questions, to (N, n).

        An image without a question has zeros in place of its embedding.
        """
        grids = [resample_to_grid(depth, self.tokens_per_side).permute(0, 2, 3, 1) for depth in global_maps]
        content = torch.cat([self.content_norm(grid) for grid in grids], dim=-1)  # (N, side, side, D * C)
        weights = 1 + self.question_proj(self.question_norm(question))  # (N, size)
        hidden = self.act(self.content_proj(content)) * weights[:, None, None]
        pooled = resample_to_grid(hidden.permute(0, 3, 1, 2), self.windows_per_side)  # (N, size, w, w)
        return self.score_proj(pooled.flatten(2).transpose(1, 2)).squeeze(-1)


class MFRSVLMBandConv2d(nn.Conv2d):
    """First layer of an encoder that was widened. `extra_bands` reads the bands that the encoder did not have before.

    The weights for the bands that it had keep their names, and are applied to these bands alone. The sum does not change if
    the others are zero, or their weights, as they are at the start: such images have the features of before, bit for bit.

    Args:
        layer: layer of the same shape for all bands, which it replaces.
        channels: places of the bands that the encoder had, in the order of its weights.
    """

    def __init__(self, layer: nn.Conv2d, channels: Sequence[int]) -> None:
        options: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        options |= {"padding_mode": layer.padding_mode, "device": layer.weight.device, "dtype": layer.weight.dtype}
        super().__init__(len(channels), layer.out_channels, bias=layer.bias is not None, **options)
        self.channels = list(channels)
        self.others = [place for place in range(layer.in_channels) if place not in self.channels]
        self.extra_bands = nn.Conv2d(len(self.others), layer.out_channels, bias=False, **options)
        with torch.no_grad():
            self.weight.copy_(layer.weight[:, self.channels])
            if self.bias is not None and layer.bias is not None:
                self.bias.copy_(layer.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) to (n, C, h', w')."""
        return super().forward(pixels[:, self.channels]) + self.extra_bands(pixels[:, self.others])


class MFRSVLMBandLinear(nn.Module):
    """As `MFRSVLMBandConv2d`, of an encoder that takes patches as rows, whose channels come last.

    No `nn.Linear`, which quantization would replace.
    """

    def __init__(self, layer: nn.Linear, channels: Sequence[int], num_channels: int) -> None:
        super().__init__()
        self.channels, self.num_channels = list(channels), num_channels
        self.others = [place for place in range(num_channels) if place not in self.channels]
        weight = layer.weight.detach().unflatten(1, (-1, num_channels))  # (C, pixels, channels)
        self.weight = nn.Parameter(weight[..., self.channels].flatten(1))
        self.bias = layer.bias
        self.extra_bands = nn.Linear(weight.shape[1] * len(self.others), len(weight), bias=False, dtype=weight.dtype)
        self.extra_bands.to(weight.device)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, h * w, pixels * channels) to (n, h * w, C)."""
        pixels = patches.unflatten(-1, (-1, self.num_channels))
        own, others = (pixels[..., places].flatten(-2) for places in (self.channels, self.others))
        return nn.functional.linear(own, self.weight, self.bias) + self.extra_bands(others)


def widen_stem(tower: nn.Module, config: MFRSVLMConfig) -> None:
    """Replaces the first layer of an encoder of `config.num_channels` bands.

    Raises:
        ValueError: its first layer does not read that many bands.
    """
    name, layer = next((name, m) for name, m in tower.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    channels: Any = config.stem_channels
    stem: nn.Module
    if isinstance(layer, nn.Conv2d) and layer.in_channels == config.num_channels:
        stem = MFRSVLMBandConv2d(layer, channels)
    elif isinstance(layer, nn.Linear) and layer.in_features == config.num_channels * config.patch_size**2:
        stem = MFRSVLMBandLinear(layer, channels, config.num_channels)
    else:
        raise ValueError(
            f"stem_channels={channels}: {name}, the first layer of an encoder of type "
            f"{config.vision_config.model_type!r}, does not read {config.num_channels} bands."
        )
    parent, _, child = name.rpartition(".")
    setattr(tower.get_submodule(parent), child, stem)


def feature_maps(outputs: Any) -> list[torch.Tensor]:
    """All outputs of a convolutional model: its hidden states and, if it is not among them, its last hidden state."""
    maps = list(outputs.hidden_states)
    return maps if maps[-1] is outputs.last_hidden_state else [*maps, outputs.last_hidden_state]


def resample_to_grid(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Average-pools (or bilinearly upsamples) (n, C, h, w) to (n, C, side, side)."""
    if maps.shape[-2:] == (side, side):
        return maps
    if min(maps.shape[-2:]) >= side:
        return nn.functional.adaptive_avg_pool2d(maps, side)
    return nn.functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def stitch_windows(features: torch.Tensor, window: WindowScale, canvas_side: int, weighting: str) -> torch.Tensor:
    """Blends overlapping windows into one canvas: the weighted mean of all windows that cover a token.

    Args:
        features: (N, n, C, t, t), windows in row-major order.
        window: geometry of the scale.
        canvas_side: tokens a side of the canvas.
        weighting: `"hann"` or `"hann_nonzero"`, see `MFRSVLMConfig.window_weighting`.

    Returns:
        (N, C, canvas_side, canvas_side)
    """
    side = features.shape[-1]
    pieces = features.permute(0, 1, 3, 4, 2)  # (N, n, t, t, C): channels lie last in memory, as the encoder leaves them
    blocks, per_side, stride = -(-side // window.token_stride), window.windows_per_side, window.token_stride

    def overlap_add(pieces: torch.Tensor) -> torch.Tensor:
        """(N, n, t, t, C) to (N, canvas_side, canvas_side, C)."""
        count, channels, rest = len(pieces), pieces.shape[-1], blocks * stride - side
        if rest:
            pieces = nn.functional.pad(pieces, (0, 0, 0, rest, 0, rest))
        pieces = pieces.reshape(count, per_side, per_side, blocks, stride, blocks, stride, channels)
        # A window covers blocks of one stride, so all windows are added at once, block by block.
        blocks_per_side = per_side + blocks - 1
        canvas = pieces.new_zeros(count, blocks_per_side, stride, blocks_per_side, stride, channels)
        for row in range(blocks):
            for column in range(blocks):
                block = pieces[:, :, :, row, :, column].transpose(2, 3)  # (N, w, s, w, s, C)
                canvas[:, row : row + per_side, :, column : column + per_side] += block
        canvas = canvas.view(count, blocks_per_side * stride, blocks_per_side * stride, channels)
        return canvas[:, :canvas_side, :canvas_side]

    if blocks == 1:  # the windows lie side by side, and weights would cancel
        return overlap_add(pieces).permute(0, 3, 1, 2)
    if weighting == "hann":
        profile = torch.hann_window(side, periodic=False, device=features.device)
    else:
        profile = torch.sin(torch.pi * (torch.arange(side, device=features.device) + 0.5) / side).square()
    weights = torch.outer(profile, profile).to(features.dtype)[..., None]  # (t, t, 1)
    total = overlap_add(weights.expand(1, per_side**2, side, side, 1))
    return (overlap_add(pieces * weights) / total.clamp(min=1e-6)).permute(0, 3, 1, 2)


def check_question(question_ids: Any, pixel_values: Any) -> None:
    """Raises `ValueError` for questions without the images whose windows they choose."""
    if question_ids is not None and pixel_values is None:
        raise ValueError("question_ids choose windows of pixel_values, but there are none: pass both, or neither.")


def choose_windows(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """The places (N, k) of the highest scores (N, n), ascending; of equal ones, the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(dim=1).values


class ScoreBySensitivity(torch.autograd.Function):
    """The identity, from whose gradient scores learn how strongly the loss depends on each window.

    The softmax of the scores learns the share of a window in the sum of |<gradient, change>| over the windows of its image,
    as with a cross-entropy. The sign is left out: from the global view to a window is a large step, so the slope at its
    start tells which windows matter, but rarely whether they help.
    """

    @staticmethod
    def forward(ctx: Any, shown: torch.Tensor, change: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`shown` and `change` (N, n, ...), where the change is from the global view to the window; `scores` (N, n)."""
        ctx.save_for_backward(change, scores)
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        change, scores = ctx.saved_tensors
        sensitivity = (gradient.float() * change.float()).flatten(2).sum(dim=2).abs()  # (N, n)
        total = sensitivity.sum(dim=1, keepdim=True)
        shares = sensitivity / total.clamp(min=torch.finfo(total.dtype).tiny)
        # Images count alike, and all together as the loss does: a loss that is scaled scales this as well.
        update = torch.where(total > 0, scores.float().softmax(dim=1) - shares, torch.zeros_like(shares)) * total.mean()
        return gradient, None, update.to(scores.dtype)


def fill_windows(
    global_maps: Sequence[torch.Tensor],
    windows: torch.Tensor,
    chosen: torch.Tensor,
    window: WindowScale,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """Shows the chosen windows, and in place of the others the features of the global view, upsampled.

    With scores, the features of all windows are given. The result is the same, but the scores learn from the loss, see
    `ScoreBySensitivity`: from every window, and not only from those that were chosen.

    Args:
        global_maps: (N, C, h, w) of the global view, one per depth.
        windows: (N, k, depths, C, t, t) of the chosen windows, or (N, n, depths, C, t, t) of all if there are scores.
        chosen: (N, k), see `choose_windows`.
        window: geometry of the windows, which lie side by side.
        scores: (N, n), or `None`.

    Returns:
        (N, n, depths, C, t, t)
    """
    per_side, tokens = window.windows_per_side, window.tokens_per_side
    canvas = torch.stack([resample_to_grid(depth, per_side * tokens) for depth in global_maps], dim=1).to(windows.dtype)
    # (N, depths, C, w * t, w * t) -> (N, w, w, depths, C, t, t) -> (N, n, depths, C, t, t)
    filled = canvas.unflatten(4, (per_side, tokens)).unflatten(3, (per_side, tokens)).permute(0, 3, 5, 1, 2, 4, 6)
    filled = filled.flatten(1, 2)
    if scores is None:
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return filled.index_put((rows, chosen), windows)
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    shown = torch.where(is_chosen[..., None, None, None, None], windows, filled)
    return ScoreBySensitivity.apply(shown, (windows - filled).detach(), scores)


def keep_parts_whole(quantization_config: Any) -> Any:
    """A copy of a quantization config that leaves `WHOLE_PARTS` and the head out. It is unchanged if it names modules."""
    field = next(
        (name for name in ("modules_to_not_convert", "llm_int8_skip_modules") if hasattr(quantization_config, name)), None
    )
    if field is None or getattr(quantization_config, field):
        return quantization_config
    quantization_config = copy.deepcopy(quantization_config)
    # By their names in the whole model, and in one without a head.
    setattr(quantization_config, field, [*WHOLE_PARTS, *(f"model.{part}" for part in WHOLE_PARTS), "lm_head"])
    return quantization_config


def split_phases(canvas: torch.Tensor, factor: int) -> torch.Tensor:
    """Splits (N, C, factor * s, factor * s) into its shifted sub-grids `[r::factor, c::factor]`, r outer, c inner.

    Returns:
        (factor^2, N, s * s, C)
    """
    num_images, channels, canvas_side, _ = canvas.shape
    side = canvas_side // factor
    grid = canvas.reshape(num_images, channels, side, factor, side, factor)
    return grid.permute(3, 5, 0, 2, 4, 1).reshape(factor**2, num_images, side * side, channels)


class MFRSVLMPreTrainedModel(PreTrainedModel):
    config: MFRSVLMConfig
    config_class = MFRSVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MFRSVLMGatedInjector", "MFRSVLMCrossAttentionInjector"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`; an encoder without attention ignores the switch."""
        if isinstance(attn_implementation, str) and not self.config.vision_has_attention:
            names = dict.fromkeys(("", "text_config"), attn_implementation)
            attn_implementation = {**names, "vision_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in `transformers`. Quantization leaves vision tower, projector, injectors and head whole, see `WHOLE_PARTS`."""
        if quantization_config is not None:
            kwargs["quantization_config"] = keep_parts_whole(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, with `checksums.json`, and without weights of an earlier save in another number of files."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and os.path.isdir(save_directory):
            remove_stale_weights(save_directory)
            update_checksums(save_directory, MODEL_FILES)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # `save_pretrained` of transformers uploads before it returns.
        update_checksums(working_dir, MODEL_FILES)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():  # here, since `_init_weights` of the encoder is asked for its layers
            if isinstance(module, (MFRSVLMBandConv2d, MFRSVLMBandLinear)):
                init.zeros_(module.extra_bands.weight)  # but for weights that were loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        if isinstance(module, MFRSVLMGatedInjector):
            init.constant_(module.residual_scale, module.injection_init)
            if module.routing == "token":
                init.normal_(module.stack_embedding, std=std)
        elif isinstance(module, MFRSVLMCrossAttentionInjector):
            init.zeros_(module.gate)
            init.normal_(module.stack_embedding, std=std)
            init.normal_(module.place_embedding, std=std)


class MFRSVLMModel(MFRSVLMPreTrainedModel):
    """Vision tower, projector, window encoder and decoder with injection, without a language modeling head."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__(config)
        vision_config = config.vision_config
        if config.is_hierarchical:
            if not config.vision_has_attention:
                vision_config._attn_implementation = "eager"  # so the switch of the other parts means nothing to it
            kind = AutoBackbone if config.is_backbone else AutoModel
            self.vision_tower = kind.from_config(vision_config)
        else:
            self.vision_tower = AutoModel.from_config(vision_config)
        if config.stem_channels is not None:
            widen_stem(self.vision_tower, config)
        self.tower_interpolates = "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters
        self._check_window_sizes()
        if config.is_hierarchical:
            self.stages, channels = self._stages()
            self.stage_projections = nn.ModuleDict(
                {str(stage): nn.Linear(size, config.vision_feature_size) for stage, size in channels.items()}
            )
        self._freeze_unread_parameters()
        self.multi_modal_projector = MFRSVLMMultiModalProjector(config)
        if config.visual_position_embeddings:
            self.visual_position_embedding = nn.Embedding(config.image_seq_length, config.text_config.hidden_size)
        if config.window_budget is not None:
            self.window_scorer = MFRSVLMWindowScorer(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.injection_type == "gated":
            self.injectors = MFRSVLMInjectors([MFRSVLMGatedInjector(config) for _ in config.injection_layers])
        else:
            ranks = range(len(config.injection_layers))
            self.injectors = MFRSVLMInjectors([MFRSVLMCrossAttentionInjector(config, rank) for rank in ranks])
        self._hook_injectors()
        self.post_init()

    def _stages(self) -> tuple[dict[int, int], dict[int, int]]:
        """Of a hierarchical encoder: stage by layer as the config writes it, and channels by stage, ascending.

        Raises:
            ValueError: the encoder has no such output, or its outputs are no feature maps.
        """
        config, tower = self.config, self.vision_tower
        layers = [config.vision_feature_layer, *config.detail_feature_layers]
        if config.is_backbone:
            stages = {layer: layer % (config.num_vision_layers + 1) for layer in layers}
            return stages, dict(zip(config.vision_config.out_indices, tower.channels, strict=True))
        with torch.device("meta"), torch.no_grad():
            trial = AutoModel.from_config(copy.deepcopy(config.vision_config)).eval()
            outputs = trial(
                torch.zeros(1, config.num_channels, config.image_size, config.image_size), output_hidden_states=True
            )
        maps = feature_maps(outputs)
        kind = config.vision_config.model_type
        if any(feature_map.ndim != 4 for feature_map in maps):
            shapes = [tuple(feature_map.shape) for feature_map in maps if feature_map.ndim != 4]
            raise ValueError(
                f"vision_config of type {kind!r} has outputs of shape {shapes[0]}, but feature maps are needed: "
                "(n, C, h, w). Use a ViT, a backbone, or a convolutional model."
            )
        out_of_range = [layer for layer in layers if not -len(maps) <= layer < len(maps)]
        if out_of_range:
            raise ValueError(
                f"vision_feature_layer and detail_feature_layers: {out_of_range} are out of range: the outputs of the "
                f"encoder ({kind!r}) are 0 to {len(maps) - 1}."
            )
        stages = {layer: layer % len(maps) for layer in layers}
        return stages, {stage: maps[stage].shape[1] for stage in sorted(set(stages.values()))}

    def _check_window_sizes(self) -> None:
        """Raises `ValueError` if the encoder cannot take an image of the sizes that it would be shown."""
        config, tower = self.config, self.vision_tower
        sizes = sorted(
            {config.image_size, *(config.window_sizes if config.window_encoding == "native" and config.has_details else ())}
        )
        advice = (
            f'Use window_encoding="resize", or other sizes than image_size={config.image_size} and {config.window_sizes}.'
        )
        if config.is_hierarchical:
            # Only a trial tells how small a map the last stage still takes; on the meta device it costs nothing.
            with torch.device("meta"), torch.no_grad():
                kind = AutoBackbone if config.is_backbone else AutoModel
                trial = kind.from_config(copy.deepcopy(config.vision_config)).eval()
                for size in sizes:
                    try:
                        trial(torch.zeros(1, config.num_channels, size, size))
                    except (RuntimeError, ValueError) as error:
                        raise ValueError(
                            f"vision_config of type {config.vision_config.model_type!r} cannot encode {size} pixels: "
                            f"{str(error).splitlines()[0]} {advice}"
                        ) from error
            return
        own_size = getattr(config.vision_config, "image_size", None)
        others = [size for size in sizes if size != own_size]
        interpolates = self.tower_interpolates or any(
            hasattr(module, "interpolate_pos_encoding") or hasattr(module, "resize_positional_embeddings")
            for module in tower.modules()
        )
        learned = [name for name, _ in tower.named_parameters() if "position" in name]
        if own_size is not None and others and learned and not interpolates:
            raise ValueError(
                f"vision_config of type {config.vision_config.model_type!r} has positions for {own_size} pixels only "
                f"({learned[0]}), so it cannot encode {others}. {advice}"
            )

    def _freeze_unread_parameters(self) -> None:
        """Freezes the parameters of a ViT after the last used layer, since DDP would wait for their gradients."""
        config = self.config
        if config.is_hierarchical:
            return
        deepest = max([config.vision_feature_layer % (config.num_vision_layers + 1), *config.detail_feature_layers])
        layers = next(m for m in self.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) >= deepest)
        read = {id(p) for layer in layers[:deepest] for p in layer.parameters()}
        passed = False
        for name, parameter in self.vision_tower.named_parameters():
            passed = passed or id(parameter) in read
            if (passed and id(parameter) not in read) or name.endswith("mask_token"):
                parameter.requires_grad_(False)

    def _hook_injectors(self) -> None:
        """Makes every injector a pre-hook of its decoder layer.

        Raises:
            ValueError: the decoder has no list of layers, or does not pass keyword arguments to them.
        """
        decoder = self.language_model
        layers: Any = getattr(decoder, "layers", None)
        lacking = None
        if not isinstance(layers, nn.ModuleList):
            lacking = "a list of `layers`"
        elif not all(
            any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
            for module in (decoder, *layers)
        ):
            lacking = "keyword arguments that its forward hands down to its layers"
        if lacking is not None:
            raise ValueError(
                f"text_config.model_type={self.config.text_config.model_type!r} cannot be injected into: "
                f"{type(decoder).__name__} lacks {lacking}."
            )
        self.injectors.decoder_config = decoder.config
        ranks = {index: rank for rank, index in enumerate(self.config.injection_layers)}
        for index, layer in enumerate(layers):
            hook = functools.partial(self.injectors.before_layer, ranks[index]) if index in ranks else drop_injection
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    def train(self, mode: bool = True) -> "MFRSVLMModel":
        """Batch normalization stays in evaluation mode, since the windows of a few images give poor statistics."""
        super().train(mode)
        if mode:
            self._freeze_unread_parameters()  # again: loading gives every parameter a gradient
        for module in self.vision_tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _encode(self, pixels: torch.Tensor, layers: Sequence[int], **kwargs: Any) -> tuple[ModelOutput, list[torch.Tensor]]:
        """Runs the tower on (n, channels, size, size): its outputs, and feature maps (n, C, h, w) at the given layers."""
        config, size = self.config, pixels.shape[-1]
        if config.is_hierarchical:
            stages = [self.stages[layer] for layer in layers]
            if config.is_backbone:
                outputs = self.vision_tower(pixels, return_dict=True, **kwargs)
                maps = [outputs.feature_maps[config.vision_config.out_indices.index(stage)] for stage in stages]
            else:
                outputs = self.vision_tower(pixels, return_dict=True, **{**kwargs, "output_hidden_states": True})
                every = feature_maps(outputs)
                maps = [every[stage] for stage in stages]
            return outputs, [
                self.stage_projections[str(stage)](feature_map.movedim(1, -1)).movedim(-1, 1)
                for stage, feature_map in zip(stages, maps, strict=True)
            ]
        if self.tower_interpolates:
            kwargs["interpolate_pos_encoding"] = size != config.vision_config.image_size
        side = size // config.patch_size
        if config.vision_config.model_type == "siglip2_vision_model":
            # Takes patches in place of images, (n, h * w, patch * patch * channels).
            patches = pixels.unfold(2, config.patch_size, config.patch_size).unfold(3, config.patch_size, config.patch_size)
            pixels = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
            kwargs["pixel_attention_mask"] = torch.ones(pixels.shape[:2], dtype=torch.long, device=pixels.device)
            kwargs["spatial_shapes"] = torch.full((len(pixels), 2), side, dtype=torch.long, device=pixels.device)
        kwargs.setdefault("output_hidden_states", list(layers) if CAN_SELECT_HIDDEN_STATES else True)
        outputs = self.vision_tower(pixels, return_dict=True, **kwargs)
        # (n, prefix + h * w, C) -> (n, C, h, w): class and register tokens come first
        tokens = [outputs.hidden_states[layer][:, -(side**2) :] for layer in layers]
        return outputs, [layer_tokens.transpose(1, 2).unflatten(2, (side, side)) for layer_tokens in tokens]

    def _unpack(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Views of the rows (N, L): the global views (N, channels, s, s), then (N * n, channels, size, size) per scale."""
        config = self.config
        lengths = config.packed_lengths
        if pixel_values.ndim != 2 or pixel_values.shape[1] != sum(lengths):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but this model needs (images, {sum(lengths)}): "
                f"{config.num_channels} channels of a global view of {config.image_size} pixels"
                + "".join(f", {w.num_windows} windows of {w.size}" for w in config.windows if config.has_details)
                + ". A shorter row lacks windows or was made with other settings: use the processor of this checkpoint."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values hold {pixel_values.dtype}, which are not normalized yet: pass the inputs through "
                "image_processor.to_device(inputs, model.device, model.dtype)."
            )
        sizes = [config.image_size, *(window.size for window in config.windows)]
        parts = pixel_values.to(self.vision_tower.dtype).split(lengths, dim=1)
        return [part.reshape(-1, config.num_channels, s, s) for part, s in zip(parts, sizes, strict=False)]

    def windows_per_pass(self, window: WindowScale, device: torch.device) -> int | None:
        """How many windows the encoder takes at once, as `config.window_chunk_size` says; `None`: all."""
        chunk_size = self.config.window_chunk_size
        if chunk_size != "auto":
            return chunk_size
        side = window.size if self.config.window_encoding == "native" else self.config.image_size
        tokens = TOKENS_PER_PASS_ON_CPU if device.type == "cpu" else TOKENS_PER_PASS
        return max(1, tokens // (side // self.config.patch_size) ** 2)

    def _encode_windows(self, pixels: torch.Tensor, window: WindowScale, chunk_size: int | None) -> list[torch.Tensor]:
        """Encodes (N * n, channels, size, size); one (N * n, C, t, t) per depth."""
        config = self.config
        chunks = []
        for chunk in pixels.split(chunk_size or self.windows_per_pass(window, pixels.device) or len(pixels)):
            if config.window_encoding == "resize" and window.size != config.image_size:
                chunk = nn.functional.interpolate(
                    chunk, size=(config.image_size, config.image_size), mode="bilinear", align_corners=False
                )
            _, maps = self._encode(chunk, config.detail_feature_layers)
            chunks.append([resample_to_grid(depth, window.tokens_per_side) for depth in maps])
        return [torch.cat(depth) for depth in zip(*chunks, strict=True)]

    def score_windows(self, global_maps: Sequence[torch.Tensor], question_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the windows of N images, of a model with `window_budget`.

        Nothing but the scorer gets a gradient from them: tower and embeddings learn from the answers.

        Args:
            global_maps: (N, C, h, w) per depth, features of the global views.
            question_ids: see `get_image_features`.

        Returns:
            (N, n)

        Raises:
            ValueError: `question_ids` are not one row an image.
        """
        content = [depth.detach() for depth in global_maps]
        count, width = len(content[0]), self.config.text_config.hidden_size
        if question_ids is None:
            return self.window_scorer(content, content[0].new_zeros(count, width))
        if question_ids.ndim != 2 or len(question_ids) != count:
            raise ValueError(
                f"question_ids has shape {tuple(question_ids.shape)}, but there are {count} images: pass (images, tokens), "
                "one question an image, padded with -100."
            )
        is_token = (question_ids >= 0)[..., None]
        embedded = self.get_input_embeddings()(question_ids.clamp(min=0)).detach() * is_token
        question = embedded.sum(dim=1) / is_token.sum(dim=1).clamp(min=1)
        return self.window_scorer(content, question.to(content[0].dtype))

    def _encode_chosen_windows(
        self,
        pixels: torch.Tensor,
        window: WindowScale,
        chunk_size: int | None,
        global_maps: Sequence[torch.Tensor],
        question_ids: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """As `_encode_windows`, but encodes `config.window_budget` windows of each image, see `fill_windows`.

        While the scorer is trained, all windows are encoded, since it learns from each of them.
        """
        scores = self.score_windows(global_maps, question_ids)
        chosen = choose_windows(scores, self.config.window_budget or window.num_windows)
        learns = self.training and scores.requires_grad
        if not learns:
            rows = torch.arange(len(chosen), device=chosen.device)[:, None]
            pixels = pixels.unflatten(0, scores.shape)[rows, chosen].flatten(0, 1)  # (N * k, channels, size, size)
        windows = torch.stack(self._encode_windows(pixels, window, chunk_size), dim=1)  # (N * k, depths, C, t, t)
        windows = windows.unflatten(0, (len(scores), -1))
        shown = fill_windows(global_maps, windows, chosen, window, scores if learns else None)
        return list(shown.flatten(0, 1).unbind(1))

    def get_detail_features(
        self,
        pixel_values: torch.Tensor,
        window_chunk_size: int | None = None,
        question_ids: torch.Tensor | None = None,
        global_maps: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encodes the windows of N images at every depth, and stitches them into detail stacks, before the projector.

        Args:
            pixel_values: (N, L), as the processor returns them.
            window_chunk_size: windows an encoder pass; defaults to what the config says.
            question_ids: see `get_image_features`.
            global_maps: with `window_budget`, features of the global views, (N, C, h, w) per depth. `None`: encoded here.

        Returns:
            (K, N, T, C), ordered by scale, depth, row phase, column phase.
        """
        config = self.config
        canvas_side = config.canvas_scale * config.tokens_per_side
        views, *packed = self._unpack(pixel_values)
        if config.window_budget is not None and global_maps is None:
            _, global_maps = self._encode(views, config.detail_feature_layers)
        stacks = []
        for window, pixels in zip(config.windows, packed, strict=True):
            if global_maps is None:
                depths = self._encode_windows(pixels, window, window_chunk_size)
            else:
                depths = self._encode_chosen_windows(pixels, window, window_chunk_size, global_maps, question_ids)
            for depth in depths:
                depth = depth.unflatten(0, (len(pixel_values), window.num_windows))  # (N, n, C, t, t)
                canvas = stitch_windows(depth, window, canvas_side, config.window_weighting)
                stacks.append(split_phases(canvas, config.canvas_scale))  # (phases, N, T, C)
        return torch.cat(stacks)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        window_chunk_size: int | None = None,
        question_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MFRSVLMImageFeatures:
        """Encodes N images: their global views and, for a model with injection, their windows.

        Args:
            pixel_values: (N, L), one row an image: the normalized global view and the windows of every scale, as the
                processor packs them.
            window_chunk_size: windows an encoder pass; defaults to what the config says.
            question_ids: with `window_budget`, what is asked about each image: (N, S), padded with -100, as
                `MFRSVLMProcessor.question_ids` returns them. `None`: windows are chosen by the image alone.

        Raises:
            ValueError: the rows do not have the length that the config asks for; there are `question_ids` without a
                `window_budget`, or not one row an image.
        """
        config = self.config
        if question_ids is not None and config.window_budget is None:
            raise ValueError("question_ids choose windows, but this model encodes all (window_budget=None): leave them out.")
        wanted = kwargs.pop("output_hidden_states", None) or getattr(config.vision_config, "output_hidden_states", False)
        if wanted:
            kwargs["output_hidden_states"] = True
        global_views = self._unpack(pixel_values)[0]
        layers = [config.vision_feature_layer, *(config.detail_feature_layers if config.window_budget is not None else ())]
        outputs, (global_map, *global_maps) = self._encode(global_views, layers, **kwargs)
        visual = resample_to_grid(global_map, config.tokens_per_side).flatten(2).transpose(1, 2)  # (N, T, C)
        visual = self.multi_modal_projector(visual)  # (N, T, d)
        if config.visual_position_embeddings:
            visual = visual + self.visual_position_embedding.weight
        details = None
        if config.has_details:
            stacks = self.multi_modal_projector(
                self.get_detail_features(pixel_values, window_chunk_size, question_ids, global_maps or None)
            )
            details = [list(stack) for stack in stacks]  # views of one tensor
        return MFRSVLMImageFeatures(
            last_hidden_state=outputs.feature_maps[-1] if config.is_backbone else outputs.last_hidden_state,
            pooler_output=list(visual),
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.get("attentions"),
            deepstack_features=details,
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(B, S) bool: which positions hold a visual token."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @property
    def splits_images(self) -> bool:
        """Whether an image may be prefilled in pieces: only where every token is routed for itself."""
        return not self.config.has_details or (self.config.injection_type == "gated" and self.config.routing == "token")

    def _check_image_tokens(self, mask: torch.Tensor, num_features: int) -> None:
        """Compares placeholders with features, on every device."""
        tokens = self.config.image_seq_length
        per_sample = mask.sum(dim=1)
        torch_compilable_check(
            per_sample.sum() == num_features,
            lambda: (
                f"Image features and image tokens do not match: {int(per_sample.sum())} tokens, {num_features} features. "
                f"Every image needs {tokens} tokens, which the processor writes for each `<image>`; with a cache, pass the "
                "images that are new."
            ),
        )
        if not self.splits_images:
            torch_compilable_check(
                (per_sample % tokens == 0).all(),
                lambda: (
                    f"An image is split: the samples hold {per_sample.tolist()} image tokens, but an image has {tokens}, "
                    "and this model weighs details image by image. Prefill without chunks."
                ),
            )

    def _check_positions(self, position_ids: torch.Tensor | None, length: int, cache: Cache | None) -> None:
        """Raises `ValueError` for positions beyond the decoder's limit. Checked on the CPU only, since others would wait."""
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is None or torch.compiler.is_compiling():
            return
        known: Any = position_ids  # asked for its device before anything is computed on it
        if known is None:
            known = length - 1 + (0 if cache is None else cache.get_seq_length())
        if isinstance(known, torch.Tensor) and known.device.type != "cpu":
            return
        last = known if isinstance(known, int) else known.max()
        if last >= limit:
            raise ValueError(
                f"The prompt reaches position {int(last)}, visual tokens included, but the decoder has {limit} "
                "(text_config.max_position_embeddings). Shorten the text or pass fewer images."
            )

    def _empty_image_features(self, device: torch.device) -> MFRSVLMImageFeatures:
        """Features of a blank image that no position uses.

        If parameters are sharded or gradients are averaged over ranks, a rank whose batch has only text must also run the
        tower and the injectors. Otherwise the other ranks would wait forever.
        """
        return self.get_image_features(torch.zeros(1, sum(self.config.packed_lengths), device=device), return_dict=True)

    def _ranks_need_images(self) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        if torch.distributed.get_world_size() == 1:
            return False
        return self.training or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        window_chunk_size: int | None = None,
        mm_encoder_outputs: dict[str, MFRSVLMImageFeatures] | None = None,
        cache: Cache | None = None,
        image_repeats: int = 1,
        question_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MFRSVLMModelOutputWithPast:
        """
        Args:
            input_ids: (B, S), with `config.image_token_id` at every visual position.
            pixel_values: (N, L), images in reading order over the batch, one row an image.
            attention_mask: (B, past + S), 0 at padding on either side.
            position_ids: (B, S). Where they restart in a row without mask and cache, the row is packed, and its sequences
                do not see each other's images.
            past_key_values: the cache, under either name.
            inputs_embeds: (B, S, d) in place of ids, with the placeholder's embedding at every visual position.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of the pixels.
            image_repeats: how many rows that follow each other share the images of one sample (beams).
            question_ids: with `pixel_values`, see `get_image_features`. In training it must not hold the answers.

        Raises:
            ValueError: a position exceeds the decoder's; both or neither of two exclusive arguments are given; the image
                tokens do not match the images; `question_ids` come without `pixel_values`, or see `get_image_features`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if cache is not None and past_key_values is not None:
            raise ValueError("You cannot specify both `cache` and `past_key_values`: they are one argument.")
        check_question(question_ids, pixel_values)
        cache = past_key_values if cache is None else cache

        features = (mm_encoder_outputs or {}).get("image")
        if features is None and pixel_values is not None:
            features = self.get_image_features(
                pixel_values, window_chunk_size=window_chunk_size, question_ids=question_ids, return_dict=True
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        self._check_positions(position_ids, inputs_embeds.shape[1], cache)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if features is not None:
            self._check_image_tokens(mask[::image_repeats], sum(map(len, features.pooler_output)))
        elif mask.device.type == "cpu" and not torch.compiler.is_compiling() and is_empty(cache) and mask.any():
            logger.warning_once(
                f"The prompts hold {int(mask.sum())} image tokens, but there are no pixel_values: the model sees no image. "
                "Pass all that the processor returns."
            )
        if features is None and self._ranks_need_images() and is_empty(cache):
            features = self._empty_image_features(mask.device)

        visual = layout = details = None
        if features is not None:
            visual = torch.cat(list(features.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)  # (N * T, d)
            tokens = self.config.image_seq_length
            # Pieces of images (chunked prefill) count as one image: they come only where no border matters.
            num_images, tokens = (len(visual) // tokens, tokens) if len(visual) % tokens == 0 else (1, len(visual))
            sequence = None
            if position_ids is not None and attention_mask is None and cache is None:
                sequence = find_packed_sequence_indices(position_ids.expand(len(mask), -1))
            layout = visual_layout(mask, num_images, tokens, image_repeats, sequence)
            inputs_embeds = torch.where(mask[..., None], visual[layout.token], inputs_embeds)
            if features.deepstack_features is not None:
                # K lists of N tensors (T, d) -> (K, N, T, d)
                details = torch.cat([image for stack in features.deepstack_features for image in stack])
                details = details.view(len(features.deepstack_features), num_images, tokens, -1)
                details = details.to(inputs_embeds.device, inputs_embeds.dtype)

        injection = None
        if self.config.has_details and self.config.injection_type == "cross_attention":
            use_cache = kwargs.get("use_cache")
            use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
            if cache is None and use_cache and not self.training:
                cache = DynamicCache(config=self.config.text_config)
            cache = None if cache is None else with_detail_cache(cache)
            injection = cross_attention_injection(details, layout, inputs_embeds, cache, rank=len(self.injectors))
        elif details is not None and layout is not None:
            injection = gated_injection(details, layout, self.config.routing)
        decoder_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            injection=injection,
            **{CACHE: decoder_cache},
            **{**kwargs, "return_dict": True},
        )
        return MFRSVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual,
            **{CACHE: cache if isinstance(cache, EncoderDecoderCache) else outputs.get(CACHE)},
        )


class MFRSVLMForConditionalGeneration(MFRSVLMPreTrainedModel, GenerationMixin):
    """MF-RSVLM with a language modeling head: answers questions about overhead images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__(config)
        self.model = MFRSVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_forward_pre_hook(self._check_labels, with_kwargs=True)
        self.post_init()

    def _check_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `ValueError` if TRL, which then replaces the forward and its loss, would score image tokens."""
        labels = kwargs.get("labels")
        if kwargs.get("fused_lm_head") and labels is not None and (labels == self.config.image_token_id).any():
            raise ValueError(
                f"labels hold image tokens (image_token_id={self.config.image_token_id}), which TRL would score. Set "
                "assistant_only_loss=True, or pass data_collator=ConversationCollator(processor)."
            )

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        window_chunk_size: int | None = None,
        question_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MFRSVLMImageFeatures:
        """See `MFRSVLMModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values, window_chunk_size=window_chunk_size, question_ids=question_ids, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        window_chunk_size: int | None = None,
        mm_encoder_outputs: dict[str, MFRSVLMImageFeatures] | None = None,
        cache: Cache | None = None,
        image_repeats: int = 1,
        question_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MFRSVLMCausalLMOutputWithPast:
        """As `MFRSVLMModel.forward`, and:

        Args:
            labels: (B, S), -100 where no loss is wanted. Image tokens never count.
            logits_to_keep: how many positions from the end to compute logits for (0: all), or their indices.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("demo/model", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("demo/model", trust_remote_code=True)
        >>> content = [{"type": "image"}, {"type": "text", "text": "How many ships are there?"}]
        >>> prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        >>> inputs = processor(images=Image.open("scene.png"), text=prompt, return_tensors="pt")
        >>> answer = model.generate(**inputs, max_new_tokens=32)[:, inputs.input_ids.shape[1] :]
        >>> print(processor.batch_decode(answer, skip_special_tokens=True)[0])
        ```
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            window_chunk_size=window_chunk_size,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            image_repeats=image_repeats,
            question_ids=question_ids,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, keep]), self.config.text_config)
        # The placeholder is in the vocabulary but is never an output: it is masked for loss, sampling and beams.
        logits[..., self.config.image_token_id] = MASKED_SCORE

        loss = None
        if labels is not None:
            image_token_id = self.config.image_token_id
            targets = kwargs.get("shift_labels", labels[:, 1:])  # what the loss sees
            if kwargs.get("num_items_in_batch") is not None:
                # The trainer counts the targets before those of image tokens are masked here.
                counted = targets != -100
                share = (counted & (targets != image_token_id)).sum() / counted.sum().clamp(min=1)
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * share
            if "shift_labels" in kwargs:
                kwargs["shift_labels"] = targets.masked_fill(targets == image_token_id, -100)
            labels = labels.masked_fill(labels == image_token_id, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MFRSVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        # Rows are repeated for beams and for several sequences, images are not: the forward knows how many rows share them.
        if expand_size == 1:
            return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        names = ("pixel_values", "question_ids", "mm_encoder_outputs")
        shared = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, {**kwargs, **shared, "image_repeats": expand_size}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if model_kwargs.get("use_cache", True):
            # What was encoded has served: decoding reads the cache. Emptied, since the caller's frame holds the same object.
            model_kwargs.pop("pixel_values", None)
            model_kwargs.pop("question_ids", None)
            (model_kwargs.pop("mm_encoder_outputs", None) or {}).clear()
        return model_kwargs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            return MFRSVLMPromptLookup(generator, self.config.image_token_id)
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `NotImplementedError`: continuous batching passes token ids only, without images."""
        raise NotImplementedError(
            "MF-RSVLM does not support continuous batching, which passes token ids only, without images. Use generate() on "
            "padded batches."
        )

    def _check_chunks(self, mask: Any, chunk_size: int) -> None:
        """Raises `ValueError` if prefilling the visual positions `mask` (B, S) in chunks would go wrong."""
        if not CHUNKS_CARRY_IMAGES and mask.any():
            raise ValueError(
                f"prefill_chunk_size={chunk_size}: transformers {transformers.__version__} loses images between chunks. "
                "Leave it out, or use a newer transformers."
            )
        if self.model.splits_images:
            return
        # The first of the T tokens of every image, by column: an image is whole if it ends in the same chunk.
        starts = (mask & ((mask.cumsum(dim=1) - 1) % self.config.image_seq_length == 0)).nonzero()[:, 1]
        ends = starts + self.config.image_seq_length - 1
        if (starts // chunk_size != ends // chunk_size).any():
            raise ValueError(
                f"prefill_chunk_size={chunk_size} would split an image of {self.config.image_seq_length} tokens, and this "
                "model weighs details image by image. Leave it out, or choose chunks that end between images."
            )

    def _new_images(self, rows: torch.Tensor, input_ids: torch.Tensor, past_length: int) -> torch.Tensor | None:
        """Of rows of `pixel_values` or `question_ids`, those whose image tokens are not cached yet; `None`: none is left."""
        per_sample = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.image_seq_length
        cached = (input_ids[:, :past_length] == self.config.image_token_id).sum(dim=1) // self.config.image_seq_length
        if len(rows) != per_sample.sum():
            return rows
        images = zip(rows.split(per_sample.tolist()), cached.tolist(), strict=True)
        rows = torch.cat([of_sample[seen:] for of_sample, seen in images])
        return rows if len(rows) else None

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. A conversation that goes on from a cache may pass all its images, or those that are new.

        Raises:
            ValueError: `prefill_chunk_size` would split an image that must not be split; `assistant_model` does not have
                the placeholder; this version of transformers does not take `mm_encoder_outputs`; there are `question_ids`
                without `pixel_values`.
        """
        check_question(kwargs.get("question_ids"), kwargs.get("pixel_values"))
        if kwargs.get("mm_encoder_outputs"):
            if not GENERATE_ENCODES_IMAGES:
                raise ValueError(
                    f"generate() of transformers {transformers.__version__} does not take mm_encoder_outputs, 5.19 and "
                    "later do. Pass pixel_values."
                )
            # It is emptied after prefill: the caller's own must stay as it is.
            kwargs["mm_encoder_outputs"] = dict(kwargs["mm_encoder_outputs"])
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.get_input_embeddings().num_embeddings <= self.config.image_token_id:
            raise ValueError(
                f"assistant_model has {assistant.get_input_embeddings().num_embeddings} embeddings, so it cannot read "
                f"image_token_id={self.config.image_token_id}. Use an MF-RSVLM assistant, or prompt_lookup_num_tokens."
            )
        settings = generation_config if generation_config is not None else self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if chunk_size and input_ids is not None:
            self._check_chunks(input_ids == self.config.image_token_id, chunk_size)
        cache: Any = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        if input_ids is not None and not is_empty(cache):
            for name in ("pixel_values", "question_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = self._new_images(kwargs[name], input_ids, int(cache.get_seq_length()))
        return super().generate(inputs, generation_config, *args, **kwargs)


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Scales logits after the head as some decoders do: Granite divides, Cohere multiplies, Gemma caps them."""
    if getattr(text_config, "logits_scaling", None) is not None:
        logits = logits / text_config.logits_scaling
    if getattr(text_config, "logit_scale", None) is not None:
        logits = logits * text_config.logit_scale
    if getattr(text_config, "final_logit_softcapping", None) is not None:
        logits = (logits / text_config.final_logit_softcapping).tanh() * text_config.final_logit_softcapping
    return logits


class MFRSVLMPromptLookup(CandidateGenerator):
    """Prompt lookup whose candidates end before the first placeholder: a piece of the prompt may run into an image."""

    def __init__(self, generator: PromptLookupCandidateGenerator, image_token_id: int) -> None:
        self.generator = generator
        self.image_token_id = image_token_id

    def get_candidates(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        candidates, logits = self.generator.get_candidates(input_ids, *args, **kwargs)
        words = (candidates[:, input_ids.shape[1] :] != self.image_token_id).long().cumprod(dim=1)
        return candidates[:, : input_ids.shape[1] + int(words.sum())], logits

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        self.generator.update_candidate_strategy(*args, **kwargs)


# See the end of `configuration_mfrsvlm.py`.
MFRSVLMModel.register_for_auto_class("AutoModel")
MFRSVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "MFRSVLMForConditionalGeneration",
    "MFRSVLMImageFeatures",
    "MFRSVLMModel",
    "MFRSVLMPreTrainedModel",
]
