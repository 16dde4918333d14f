"""Configuration of MF-RSVLM: all parameters of the architecture, validated. This module does not import torch.

The processor and the model share the geometry of the sliding windows, which is computed here (`window_table`). Both
therefore agree on the packing of pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig


# A number that is derived from the parts if it is not given. It is never None after initialization.
if TYPE_CHECKING:
    Derived = Any
else:
    Derived = int | None

# All that depends on the version of transformers; the package supports 5.16.1 and later.
TRANSFORMERS = Version(transformers.__version__).release
CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"  # what forwards and outputs call the cache
CAN_SELECT_HIDDEN_STATES = TRANSFORMERS >= (5, 23)  # output_hidden_states=[...] keeps these alone
CHUNKS_CARRY_IMAGES = TRANSFORMERS >= (5, 23)  # chunked prefill hands each chunk its share of the encoded images
GENERATE_ENCODES_IMAGES = TRANSFORMERS >= (5, 19)  # generate() encodes images once and takes mm_encoder_outputs

_CONDITIONAL_GENERATION = "modeling_mfrsvlm.MFRSVLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_mfrsvlm.MFRSVLMConfig",
    "AutoModel": "modeling_mfrsvlm.MFRSVLMModel",
    "AutoModelForImageTextToText": _CONDITIONAL_GENERATION,
    # Tools that know only one of these names load the same model: trainers, adapters, lmms-eval.
    "AutoModelForCausalLM": _CONDITIONAL_GENERATION,
    "AutoModelForMultimodalLM": _CONDITIONAL_GENERATION,
}


# Largest sizes that a config may state. Beyond them, a model would take minutes to build, or all memory.
_LAYERS, _WIDTH, _INNER, _VOCABULARY, _PIXELS, _OTHER = 1024, 2**17, 2**20, 2**24, 2**14, 2**31 - 1
MAX_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depths", "depth", "n_layer", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "hidden_sizes", "embedding_size", "embed_dim", "head_dim", "projection_dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "num_channels", "num_experts"), _WIDTH),
    **dict.fromkeys(("vision_feature_size", "routing_size", "cross_attention_size", "cross_attention_heads"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "mlp_dim"), _INNER),
    "vocab_size": _VOCABULARY,
    **dict.fromkeys(("image_size", "patch_size", "window_sizes"), _PIXELS),
    "canvas_scale": 64,
}
MAX_PARAMETERS = 10**12  # of a part
MAX_WINDOWS = 2**14  # of an image
MAX_PIXEL_VALUES = 2**30  # of an image: 4 GiB in float32


CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class WindowScale:
    """Sliding windows of one size over the square canvas. Sides and strides in pixels and in tokens.

    Windows lie on a regular square grid, `windows_per_side` in each direction, in row-major order.
    """

    size: int
    stride: int
    tokens_per_side: int
    token_stride: int
    windows_per_side: int

    @property
    def num_windows(self) -> int:
        return self.windows_per_side**2

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(top, left) pixel of every window on the canvas, in packing order."""
        starts = [i * self.stride for i in range(self.windows_per_side)]
        return [(top, left) for top in starts for left in starts]


def window_table(
    image_size: int, patch_size: int, canvas_scale: int, window_sizes: Sequence[int], window_overlap: float
) -> tuple[WindowScale, ...]:
    """Lays the windows of every size over the canvas.

    Args:
        image_size: side of the global view, pixels.
        patch_size: side of the square of pixels of one visual token.
        canvas_scale: side of the canvas in global views; the canvas has `canvas_scale * image_size` pixels a side.
        window_sizes: sides of the windows, pixels, one scale each, in the order in which they are packed.
        window_overlap: share of a window that its neighbor covers again, in [0, 1). The stride is the rest, rounded
            down to whole tokens and at least one token (0.5 gives the strides of the published model).

    Raises:
        ValueError: a size is not a positive multiple of `patch_size`, exceeds the canvas, is listed twice, or its
            stride does not tile the canvas exactly; or there are more than `MAX_WINDOWS` windows, or `MAX_PIXEL_VALUES`
            pixels in three channels.
    """
    if image_size <= 0 or patch_size <= 0 or image_size % patch_size:
        raise ValueError(f"image_size={image_size} must be a positive multiple of patch_size={patch_size}.")
    if canvas_scale < 1:
        raise ValueError(f"canvas_scale={canvas_scale} must be at least 1.")
    if not 0 <= window_overlap < 1:
        raise ValueError(f"window_overlap={window_overlap} must lie in [0, 1).")
    if len(set(window_sizes)) != len(window_sizes):
        raise ValueError(f"window_sizes={list(window_sizes)} lists a size twice.")

    canvas_size = canvas_scale * image_size
    scales = []
    for size in window_sizes:
        if size <= 0 or size % patch_size:
            raise ValueError(f"Window size {size} must be a positive multiple of patch_size={patch_size}.")
        if size > canvas_size:
            raise ValueError(f"Window size {size} exceeds the canvas of {canvas_size} pixels.")
        tokens = size // patch_size
        # The small addend keeps 10 * (1 - 0.9) at 1 although it is 0.99... in floating point.
        token_stride = max(1, int(tokens * (1 - window_overlap) + 1e-9))
        stride = token_stride * patch_size
        if (canvas_size - size) % stride:
            raise ValueError(
                f"Windows of {size} pixels at stride {stride} (window_overlap={window_overlap}) do not tile the canvas of "
                f"{canvas_size} pixels: {canvas_size} - {size} is not a multiple of {stride}. Change one of them."
            )
        scales.append(WindowScale(size, stride, tokens, token_stride, (canvas_size - size) // stride + 1))
    num_windows = sum(scale.num_windows for scale in scales)
    num_values = sum(packed_lengths(image_size, scales))
    if num_windows > MAX_WINDOWS or num_values > MAX_PIXEL_VALUES:
        raise ValueError(
            f"image_size={image_size}, canvas_scale={canvas_scale}, window_sizes={list(window_sizes)} and "
            f"window_overlap={window_overlap} make {num_windows} windows and {num_values} values an image; at most "
            f"{MAX_WINDOWS} and {MAX_PIXEL_VALUES} are supported."
        )
    return tuple(scales)


def packed_lengths(image_size: int, windows: Sequence[WindowScale], num_channels: int = 3) -> list[int]:
    """Values of each part in a row of `pixel_values`: the global view, then the windows of every scale."""
    return [num_channels * image_size**2, *(window.num_windows * num_channels * window.size**2 for window in windows)]


def efficient_windows(image_size: int, patch_size: int, canvas_scale: int = 2) -> dict[str, Any]:
    """Fields of a config whose windows cost least: one size, about half of the global view, side by side.

    An image then costs about `1 + canvas_scale ** 2` passes of the encoder.
    """
    tokens = image_size // patch_size
    sides = [side for side in range(1, max(1, tokens // 2) + 1) if canvas_scale * tokens % side == 0]
    return {"window_sizes": [max(sides) * patch_size], "window_overlap": 0.0}


@strict
class MFRSVLMConfig(PreTrainedConfig):
    r"""
    Configuration of an MF-RSVLM model. The defaults are a new 7B model: CLIP ViT-L/14-336, windows of 336 and 168
    pixels on a canvas of 672, and gated injection before decoder layers 4, 8, 12 and 16 (counted from one).
    `MFRSVLMConfig.efficient()` is the same model with windows that cost a fourth.

    Args:
        vision_config: vision encoder: a ViT with `num_hidden_layers` (`clip_vision_model`, `siglip_vision_model`,
            `dinov2`, `dinov3_vit`, ...), a hierarchical backbone with `depths` (`resnet`, `convnext`, `swin`, ...), or a
            convolutional model whose hidden states are feature maps (`efficientnet`, `mobilenet_v2`, ...). Its
            `num_channels` is the number of bands of an image.
        stem_channels: of an encoder that was widened: places, among the bands of an image, of those that it had before, in
            the order of its weights. A layer of its own reads the other bands. `None`: the first layer reads all bands.
        text_config: decoder: any model type of `AutoModel` whose model has a list of `layers`.
        image_token_id: id of the `<image>` placeholder, one row of the decoder's embedding. Defaults to the last row.
        image_size: side of the global view, pixels. Defaults to a ViT's own, to 336 for a hierarchical backbone.
        patch_size: side of the square of one visual token, pixels. Defaults to a ViT's own, to 14 for a
            hierarchical backbone. The global view gives `(image_size // patch_size) ** 2` visual tokens.
        vision_feature_layer: which encoder output gives the visual tokens. Index into the hidden states of a ViT (0 is
            the embedding, -1 the last layer) or into the stages of a backbone (0 is the stem, 1 the first stage). Outputs
            of a convolutional model are its hidden states and, if it is not among them, its last hidden state.
        vision_feature_size: channels of the visual features. Defaults to the ViT's width; the stages of a backbone
            are projected to it (1024 by default).
        projector_hidden_act: activation between the two layers of the projector.
        multimodal_projector_bias: whether the layers of the projector have biases.
        visual_position_embeddings: whether a learned embedding of the position in the global view is added to every visual
            token, after the projector. For backbones, whose features contain little position information.
        canvas_scale: side of the canvas in global views.
        window_sizes: sides of the sliding windows, pixels, one scale each. Empty: no windows, global view only.
        window_overlap: share of a window that its neighbor covers again.
        window_encoding: `"native"`: windows are encoded at their own size, with interpolated positions; `"resize"`:
            resized to `image_size` first, and their features pooled (the published model).
        window_weighting: how overlapping windows are blended: `"hann"` is the symmetric Hann window of the published
            model, whose edge weights are zero, so that the features of the outermost ring of the canvas are zero;
            `"hann_nonzero"` is the same curve shifted by half a token, positive everywhere.
        window_chunk_size: windows encoded in one pass of the encoder, which bounds peak memory. `"auto"`: as many as are
            fast on the device, by the tokens of a window, see `MFRSVLMModel.windows_per_pass`. `None`: all at once (under
            ZeRO-3 or FSDP every rank must make the same number of passes).
        window_budget: how many windows of an image are encoded: those that a scorer finds worth it, from the global view
            and, where given, the question. The others show the features of the global view, upsampled. Needs windows of one
            size, side by side. `None`: all windows.
        detail_feature_layers: the depths: encoder outputs that the windows are read at, numbered as
            `vision_feature_layer`, in ascending order.
        injection_layers: 0-based indices of the decoder layers that details are injected before.
        injection_type: `"gated"`: a router weighs the detail stacks and a gate mixes them into the visual positions;
            `"cross_attention"`: every position attends to the detail tokens of the images before it.
        injection_init: initial residual scale of a gated injector.
        routing: of `"gated"`: `"stack"` weighs whole stacks (the published model), `"token"` lets every visual token weigh
            them for itself.
        routing_scope: of `"stack"` routing: whether the weights are shared by all images of a `"sample"` (the
            published model) or computed for every `"image"`.
        routing_size: width of the queries and keys of `"token"` routing, and of the scorer of `window_budget`.
        cross_attention_size: width of the keys and values of `"cross_attention"`, all heads together.
        cross_attention_heads: attention heads of `"cross_attention"`.

    Raises:
        ValueError: a size is beyond `MAX_SIZES`, a part has more than `MAX_PARAMETERS` (10^12), or an image has more than
            `MAX_WINDOWS` windows (16,384) or `MAX_PIXEL_VALUES` values (2^30). Nothing of that size is allocated.
        StrictDataclassError: a field has the wrong type, or fields contradict each other.
    """

    model_type = "mfrsvlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    base_model_tp_plan = {
        "injectors.*.detail_proj": "colwise_gather_output",
        "injectors.*.gate_proj": "colwise_gather_output",
    }

    vision_config: Any = None
    text_config: Any = None
    image_token_id: Derived = None
    tie_word_embeddings: bool = False

    # Visual tokens
    stem_channels: list[int] | tuple[int, ...] | None = None
    image_size: Derived = None
    patch_size: Derived = None
    vision_feature_layer: int = -1
    vision_feature_size: Derived = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    visual_position_embeddings: bool = False

    # Canvas, windows, detail stacks
    canvas_scale: int = 2
    window_sizes: list[int] | tuple[int, ...] = (336, 168)
    window_overlap: float | int = 0.5
    window_encoding: Literal["native", "resize"] = "native"
    window_weighting: Literal["hann", "hann_nonzero"] = "hann_nonzero"
    window_chunk_size: int | Literal["auto"] | None = "auto"
    window_budget: int | None = None
    detail_feature_layers: list[int] | tuple[int, ...] = (8, 16, 24)

    # Injection
    injection_layers: list[int] | tuple[int, ...] = (3, 7, 11, 15)
    injection_type: Literal["gated", "cross_attention"] = "gated"
    injection_init: float | int = 0.1
    routing: Literal["stack", "token"] = "token"
    routing_scope: Literal["sample", "image"] = "image"
    routing_size: int = 128
    cross_attention_size: int = 512
    cross_attention_heads: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        try:
            self._complete(**kwargs)
        except (AttributeError, TypeError, LookupError, ArithmeticError) as error:  # fields of transformers, of a wrong type
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"A field of the config has a value of a wrong type: {reason}.") from error
        for name, part in {
            "dtype": self,
            "vision_config.dtype": self.vision_config,
            "text_config.dtype": self.text_config,
        }.items():
            if part.dtype is not None and not isinstance(part.dtype, dict) and type(part.dtype).__name__ != "dtype":
                raise ValueError(f"{name}={part.dtype!r:.80} is no type of numbers. Use float32, bfloat16 or float16.")

    def _complete(self, **kwargs: Any) -> None:
        """Makes the configs of the parts, and derives what is not given."""
        for name in ("image_size", "patch_size", "canvas_scale", "window_sizes", "vision_feature_size", "routing_size",
                     "cross_attention_size", "cross_attention_heads"):  # fmt: skip
            _check_size(name, getattr(self, name), name)
        self.vision_config = _sub_config("vision_config", self.vision_config, "clip_vision_model", CLIP_VIT_L_14_336)
        self.text_config = _sub_config("text_config", self.text_config, "llama", {})
        super().__post_init__(**kwargs)
        # `save_pretrained` adds only the class that it saves, but a checkpoint must load through each of these.
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        vision_config, text_config = self.vision_config, self.text_config
        if self.image_token_id is None:
            self.image_token_id = text_config.vocab_size - 1
        if self.image_size is None:
            self.image_size = 336 if self.is_hierarchical else _vit_image_size(vision_config)
        if self.patch_size is None:
            self.patch_size = 14 if self.is_hierarchical else getattr(vision_config, "patch_size", None)
        if self.vision_feature_size is None:
            self.vision_feature_size = 1024 if self.is_hierarchical else getattr(vision_config, "hidden_size", None)
        # A decoder that ties its embeddings says so in its own config.
        if not self.tie_word_embeddings and getattr(text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if self.is_backbone:
            # A backbone returns only the stages it is asked for.
            stages = {*self.detail_feature_layers, self.vision_feature_layer % (self.num_vision_layers + 1)}
            vision_config.out_indices = sorted(stage for stage in stages if stage <= self.num_vision_layers)
        if self.stem_channels is not None:
            self.stem_channels = list(self.stem_channels)
        self.window_sizes = list(self.window_sizes)
        self.detail_feature_layers = list(self.detail_feature_layers)
        self.injection_layers = list(self.injection_layers)

    @property
    def is_hierarchical(self) -> bool:
        """Whether the outputs of the encoder are maps of several resolutions, and not the tokens of a ViT."""
        return hasattr(self.vision_config, "depths") or not hasattr(self.vision_config, "patch_size")

    @property
    def is_backbone(self) -> bool:
        """Whether the encoder is read at the stages of a backbone of `transformers`."""
        return self.is_hierarchical and isinstance(getattr(self.vision_config, "stage_names", None), (list, tuple))

    @property
    def vision_has_attention(self) -> bool:
        """Whether an attention implementation means anything to the encoder; to a convolutional one it does not."""
        return hasattr(self.vision_config, "num_heads") or hasattr(self.vision_config, "num_attention_heads")

    @property
    def num_vision_layers(self) -> Any:
        """Number of the last encoder output (int): transformer layers of a ViT, stages of a hierarchical backbone.

        `None` for a convolutional model that is no backbone, whose config does not state it.
        """
        if self.is_hierarchical:
            return len(self.vision_config.stage_names) - 1 if self.is_backbone else None
        return int(self.vision_config.num_hidden_layers)

    @property
    def num_channels(self) -> int:
        """Bands of an image."""
        return int(getattr(self.vision_config, "num_channels", 3))

    def to_dict(self) -> dict[str, Any]:
        """As in `transformers`. Without further bands or a budget, models are saved as if there were no such fields."""
        fields: dict[str, Any] = super().to_dict()
        for name in ("stem_channels", "window_budget"):
            if fields.get(name) is None:
                fields.pop(name, None)
        return fields

    @property
    def tokens_per_side(self) -> int:
        return int(self.image_size // self.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens an image, and tokens of each of its detail stacks."""
        return self.tokens_per_side**2

    @property
    def has_details(self) -> bool:
        return bool(self.window_sizes and self.injection_layers)

    @property
    def num_detail_stacks(self) -> int:
        """Scales x depths x phases."""
        return len(self.window_sizes) * len(self.detail_feature_layers) * self.canvas_scale**2

    @property
    def windows(self) -> tuple[WindowScale, ...]:
        """Windows of every scale, in packing order."""
        return window_table(self.image_size, self.patch_size, self.canvas_scale, self.window_sizes, self.window_overlap)

    @property
    def encoder_passes(self) -> float:
        """What encoding an image costs, in passes of the global view: its tokens and those of its windows, over its own."""
        passes = 1.0
        for window in self.windows if self.has_details else ():
            share = 1.0 if self.window_encoding == "resize" else (window.size / self.image_size) ** 2
            passes += (self.window_budget or window.num_windows) * share
        return passes

    @classmethod
    def efficient(cls, **fields: Any) -> "MFRSVLMConfig":
        """A new model in efficient mode: its windows are those of `efficient_windows`. `fields` set all others.

        It answers many times faster than the defaults, and counts small objects slightly worse.
        """
        bare = cls(**{**fields, "window_sizes": [], "injection_layers": []})
        return cls(**{**efficient_windows(bare.image_size, bare.patch_size, bare.canvas_scale), **fields})

    @property
    def packed_lengths(self) -> list[int]:
        """Values of the global view and of the windows of every scale, in a row of `pixel_values`."""
        return packed_lengths(self.image_size, self.windows if self.has_details else (), self.num_channels)

    def validate_architecture(self) -> None:
        """Raises `ValueError` naming both sides of every conflict.

        Called by `@strict` after initialization, which wraps it in a `StrictDataclassClassValidationError`.
        """
        encoder = self.vision_config
        needed = () if self.is_hierarchical else ("num_hidden_layers", "hidden_size", "patch_size")
        lacking = [name for name in needed if not isinstance(getattr(encoder, name, None), (int, list, tuple))]
        if lacking:
            raise ValueError(
                f"vision_config of type {encoder.model_type!r} lacks {lacking}: an encoder is a ViT with one hidden_size, "
                "one patch_size and num_hidden_layers, a hierarchical backbone with depths and stage_names, or a "
                "convolutional model without patch_size."
            )
        if not self.is_hierarchical:
            if self.patch_size != encoder.patch_size:
                raise ValueError(f"patch_size={self.patch_size} differs from vision_config.patch_size={encoder.patch_size}.")
            if self.vision_feature_size != encoder.hidden_size:
                raise ValueError(
                    f"vision_feature_size={self.vision_feature_size} differs from "
                    f"vision_config.hidden_size={encoder.hidden_size}."
                )
        stem = self.stem_channels
        if stem is not None and not (0 < len(stem) == len(set(stem) & set(range(self.num_channels))) < self.num_channels):
            raise ValueError(
                f"stem_channels={stem} must be different places among the vision_config.num_channels={self.num_channels} "
                "bands, and not all of them."
            )
        windows = self.windows  # validates sizes, overlap and canvas
        depth = self.num_vision_layers
        if depth is None:  # the model compares with what the encoder returns
            depth = max(0, self.vision_feature_layer, -1 - self.vision_feature_layer, *self.detail_feature_layers)
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is out of range: the encoder's outputs are 0 to {depth}."
            )
        _check_ascending("detail_feature_layers", self.detail_feature_layers, 0, depth, "the encoder's outputs")
        _check_ascending(
            "injection_layers",
            self.injection_layers,
            0,
            self.text_config.num_hidden_layers - 1,
            "the decoder's layers",
        )
        if self.window_sizes and not self.detail_feature_layers:
            raise ValueError(f"window_sizes={self.window_sizes} need detail_feature_layers to be read at, but it is empty.")
        if self.injection_layers and not self.window_sizes:
            raise ValueError(
                f"injection_layers={self.injection_layers} have nothing to inject, because window_sizes is empty. Empty "
                "both for a model with the global view only."
            )
        for window in windows:
            tokens, side = window.tokens_per_side, self.tokens_per_side
            if self.window_encoding == "resize" and side % tokens:
                raise ValueError(
                    f'window_encoding="resize" pools {side} tokens a side to {tokens} for windows of {window.size} pixels, '
                    f'which does not divide. Choose another size, or window_encoding="native".'
                )
            if self.window_weighting == "hann" and tokens > 1 and window.token_stride > tokens - 2:
                raise ValueError(
                    f'window_weighting="hann" gives the edge tokens of a window no weight, so windows of {tokens} tokens at '
                    f'stride {window.token_stride} leave gaps. Use "hann_nonzero", or a larger window_overlap than '
                    f"{self.window_overlap}."
                )
        if self.window_budget is not None:
            self._check_window_budget(self.window_budget)
        if isinstance(self.window_chunk_size, int) and self.window_chunk_size < 1:
            raise ValueError(
                f'window_chunk_size={self.window_chunk_size} must be at least 1, "auto", or None for no chunks.'
            )
        for name in ("vision_feature_size", "routing_size", "cross_attention_size", "cross_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not math.isfinite(self.injection_init):
            raise ValueError(f"injection_init={self.injection_init} must be finite.")
        if self.cross_attention_size % self.cross_attention_heads:
            raise ValueError(
                f"cross_attention_size={self.cross_attention_size} must be a multiple of "
                f"cross_attention_heads={self.cross_attention_heads}."
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is no row of the decoder's embedding, which has "
                f"text_config.vocab_size={self.text_config.vocab_size}: resize the embedding first."
            )

    def _check_window_budget(self, budget: int) -> None:
        """Raises `ValueError` if there is nothing to choose from."""
        if len(self.windows) != 1 or not self.injection_layers:
            raise ValueError(
                f"window_budget={budget} needs windows of one size and a layer to inject them into, but "
                f"window_sizes={self.window_sizes} and injection_layers={self.injection_layers}. Change them, or set it to "
                "None."
            )
        (window,) = self.windows
        if window.token_stride < window.tokens_per_side:
            raise ValueError(
                f"window_budget={budget} needs windows side by side, but window_overlap={self.window_overlap}. Set "
                "window_overlap to 0, or window_budget to None."
            )
        if not 1 <= budget <= window.num_windows:
            raise ValueError(
                f"window_budget={budget} must lie between 1 and the {window.num_windows} windows of an image, or be None "
                "for all."
            )


def _sub_config(name: str, part: Any, model_type: str, defaults: dict[str, Any]) -> Any:
    """A part's config from a config, the dictionary of one, or nothing.

    Raises:
        ValueError: it is something else, no config can be made of it, or a size is beyond `MAX_SIZES` or `MAX_PARAMETERS`.
    """
    if part is None:
        part = {"model_type": model_type, **defaults}
    if isinstance(part, dict):
        for field, value in part.items():  # before the config makes a list of all layers
            _check_size(str(field), value, f"{name}.{field}")
        try:
            part = AutoConfig.for_model(**{"model_type": model_type, **part})
        except Exception as error:  # of any model's config
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{name} makes no config of type {part.get('model_type', model_type)!r:.80}: {reason}"
            ) from error
    if not isinstance(part, PreTrainedConfig):
        raise ValueError(f"{name} must be a config or its fields, not {part!r:.80}.")
    sizes = {field: getattr(part, field, None) for field in MAX_SIZES}
    for field, value in sizes.items():
        _check_size(field, value, f"{name}.{field}")
    layers, width, inner, vocab = (
        value if type(value) is int else 0
        for value in map(sizes.get, ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"))
    )
    num_parameters = layers * width * (4 * width + 3 * inner) + 2 * vocab * width
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{name} with num_hidden_layers={layers}, hidden_size={width}, intermediate_size={inner} and vocab_size={vocab} "
            f"has about {num_parameters:.1e} parameters; at most {MAX_PARAMETERS:.0e} are supported."
        )
    return part


def _check_size(field: str, value: Any, place: str) -> None:
    """Raises `ValueError` for a number, alone or in a list, beyond `MAX_SIZES`."""
    limit = MAX_SIZES.get(field, _OTHER)
    if isinstance(value, int) and abs(value) > limit:
        number = f"{value:.3e}" if abs(value) < 10**300 else "a number of more than 300 digits"
        raise ValueError(f"{place}={number if abs(value) > 10**20 else value} is beyond the largest supported, {limit}.")
    if isinstance(value, (list, tuple)):
        if len(value) > _LAYERS * 4:
            raise ValueError(f"{place} has {len(value)} items; at most {_LAYERS * 4} are supported.")
        for item in value:
            _check_size(field, item, place)
    elif isinstance(value, dict) and field not in ("id2label", "label2id"):
        for name, item in value.items():
            _check_size(str(name), item, f"{place}.{name}")


def _vit_image_size(vision_config: Any) -> Any:
    size = getattr(vision_config, "image_size", None)
    if size is None and hasattr(vision_config, "num_patches"):  # SigLIP 2 counts patches
        return math.isqrt(vision_config.num_patches) * vision_config.patch_size
    return size


def _check_ascending(name: str, values: Sequence[int], low: int, high: int, what: str) -> None:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name}={values} must be ascending without duplicates.")
    if values and not (low <= values[0] and values[-1] <= high):
        raise ValueError(f"{name}={values} is out of range: {what} are {low} to {high}.")


# Saving an object of this class also saves its code, so a derived checkpoint loads with `trust_remote_code=True`.
# (Registering with the Auto classes is something else: an installed package would then win over the code on the Hub.)
MFRSVLMConfig.register_for_auto_class()

__all__ = ["MFRSVLMConfig", "WindowScale", "efficient_windows", "packed_lengths", "window_table"]
