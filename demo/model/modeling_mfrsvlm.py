"""MF-RSVLM: CLIP (or a convolutional backbone), multi-scale sliding windows, and injection into a Llama-like decoder.

The skeleton is that of LLaVA: `vision_tower` -> `multi_modal_projector` -> `language_model`. Two things are added, both
from the paper *FUSE-RSVLM* (arXiv 2512.24022): windows over a high-resolution canvas are encoded at several depths of
the tower and stitched into *detail stacks*, and *injectors* feed these stacks back into several decoder layers.

Letters in shape comments: B samples, S positions, N images over the batch, T tokens an image, K detail stacks,
n windows, t tokens a window side, C vision channels, d decoder channels. All visual state enters and leaves as
arguments; nothing is kept on a module between calls.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoBackbone, AutoModel, LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin, PromptLookupCandidateGenerator
from transformers.generation import utils as generation_utils
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging, output_capturing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mfrsvlm import MFRSVLMConfig, WindowScale


logger = logging.get_logger(__name__)

# Whether chunked prefill hands each chunk its share of the encoded images.
CHUNKS_CARRY_IMAGES = hasattr(generation_utils, "_slice_mm_encoder_output")

# Key position of detail tokens that no query may see. Any real position is smaller.
NEVER_VISIBLE = torch.iinfo(torch.int64).max


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
    """Args:
    image_hidden_states: the projected visual tokens of all images, (N * T, d).
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MFRSVLMCausalLMOutputWithPast(ModelOutput):
    """Args:
    loss: next-token loss over the positions whose label is not -100, shape ().
    logits: (B, S, vocabulary), or the positions chosen by `logits_to_keep`.
    past_key_values: the cache. With cross-attention injection it is an `EncoderDecoderCache` that also holds the
        detail tokens: continue from the returned object, not from the one passed in.
    hidden_states: inputs of the decoder layers before injection, and the final normalised state, each (B, S, d).
    attentions: of the decoder layers, each (B, heads, S, S).
    image_hidden_states: the projected visual tokens of all images, (N * T, d).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
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


def unpack_windows(pixel_values_local: torch.Tensor, windows: tuple[WindowScale, ...]) -> list[torch.Tensor]:
    """Views the packed windows of N images, (N, sum of n * 3 * size^2), as one (N * n, 3, size, size) per scale.

    Raises:
        ValueError: the packed length is not what the window table asks for.
    """
    lengths = [window.num_values for window in windows]
    if pixel_values_local.ndim != 2 or pixel_values_local.shape[1] != sum(lengths):
        raise ValueError(
            f"pixel_values_local has shape {tuple(pixel_values_local.shape)}, but windows of "
            f"{[window.size for window in windows]} pixels, {[window.num_windows for window in windows]} an image, need "
            f"(images, {sum(lengths)}). Use the processor of this checkpoint."
        )
    return [
        packed.reshape(-1, 3, window.size, window.size)
        for packed, window in zip(pixel_values_local.split(lengths, dim=1), windows, strict=True)
    ]


def resample_to_grid(feature_maps: torch.Tensor, side: int) -> torch.Tensor:
    """Average-pools (or bilinearly upsamples) (n, C, h, w) to (n, C, side, side)."""
    if feature_maps.shape[-2:] == (side, side):
        return feature_maps
    if min(feature_maps.shape[-2:]) >= side:
        return nn.functional.adaptive_avg_pool2d(feature_maps, side)
    return nn.functional.interpolate(feature_maps, size=(side, side), mode="bilinear", align_corners=False)


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
    num_images, num_windows, channels, side, _ = features.shape
    if weighting == "hann":
        profile = torch.hann_window(side, periodic=False, device=features.device)
    else:
        profile = torch.sin(torch.pi * (torch.arange(side, device=features.device) + 0.5) / side).square()
    weights = torch.outer(profile, profile).to(features.dtype)

    def overlap_add(columns: torch.Tensor) -> torch.Tensor:
        return nn.functional.fold(
            columns, (canvas_side, canvas_side), kernel_size=window.tokens_per_side, stride=window.token_stride
        )

    weighted = (features * weights).permute(0, 2, 3, 4, 1)  # (N, C, t, t, n)
    canvas = overlap_add(weighted.reshape(num_images, channels * side * side, num_windows))
    total = overlap_add(weights.reshape(1, side * side, 1).expand(1, side * side, num_windows))
    return canvas / total.clamp(min=1e-6)


def split_phases(canvas: torch.Tensor, factor: int) -> torch.Tensor:
    """Splits (N, C, factor * s, factor * s) into its shifted sub-grids `[r::factor, c::factor]`, r outer, c inner.

    Returns:
        (factor^2, N, s * s, C)
    """
    num_images, channels, canvas_side, _ = canvas.shape
    side = canvas_side // factor
    grid = canvas.reshape(num_images, channels, side, factor, side, factor)
    return grid.permute(3, 5, 0, 2, 4, 1).reshape(factor**2, num_images, side * side, channels)


class VisualLayout(NamedTuple):
    """Where the N images lie in a batch of B x S positions. Made without reading a value on the host."""

    mask: torch.Tensor  # (B, S) bool, visual positions
    rank: torch.Tensor  # (B, S), which of the N * T visual tokens a visual position holds; 0 elsewhere
    position: torch.Tensor  # (N * T,), flat position b * S + s of every visual token; 0 where it has none
    row: torch.Tensor  # (N,), sample of every image
    same_sample: torch.Tensor  # (N, N) bool, images that share a sample


def visual_layout(mask: torch.Tensor, num_images: int, tokens_per_image: int) -> VisualLayout:
    """Numbers the visual positions of `mask` (B, S) in reading order, T to an image."""
    total = num_images * tokens_per_image
    flat = mask.flatten()
    rank = (flat.cumsum(0) - 1).clamp(min=0, max=total - 1)
    positions = torch.arange(flat.shape[0], device=mask.device)
    # Text positions write to a slot past the end that is cut off again, so that the shapes stay static.
    position = positions.new_zeros(total + 1).scatter(0, torch.where(flat, rank, total), positions)[:total]
    row = position[::tokens_per_image] // mask.shape[1]
    return VisualLayout(mask, rank.view(mask.shape), position, row, row[:, None] == row[None, :])


class MFRSVLMStackRouter(nn.Module):
    """One weight per detail stack, from the mean visual token and the mean token of every stack."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.scope = config.routing_scope
        self.query_norm = nn.LayerNorm(hidden_size)
        self.query_proj = nn.Linear(hidden_size, hidden_size)
        self.key_norm = nn.LayerNorm(hidden_size)
        self.key_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, visual: torch.Tensor, details: torch.Tensor, same_sample: torch.Tensor) -> torch.Tensor:
        """(N, T, d) and (K, N, T, d) to weights (N, K) that sum to one."""
        query = visual.mean(dim=1)  # (N, d)
        key = details.mean(dim=2).transpose(0, 1)  # (N, K, d)
        if self.scope == "sample":
            # All images have T tokens, so the mean over the tokens of a sample is the mean of its images' means.
            share = same_sample.to(query.dtype)
            share = share / share.sum(dim=1, keepdim=True)  # (N, N)
            query = share @ query
            key = torch.einsum("nm,mkd->nkd", share, key)
        query = self.query_proj(self.query_norm(query))
        key = self.key_proj(self.key_norm(key))
        scores = torch.einsum("nkd,nd->nk", key, query / query.shape[-1] ** 0.5)  # scaled first, for float16
        finite = torch.isfinite(scores).all(dim=1, keepdim=True)
        return torch.where(finite, scores, torch.zeros_like(scores)).softmax(dim=1)


class MFRSVLMTokenRouter(nn.Module):
    """One weight per detail stack and visual token, from low-rank queries and keys of the tokens themselves."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.query_norm = nn.LayerNorm(hidden_size)
        self.query_proj = nn.Linear(hidden_size, config.routing_size)
        self.key_norm = nn.LayerNorm(hidden_size)
        self.key_proj = nn.Linear(hidden_size, config.routing_size)

    def forward(self, visual: torch.Tensor, details: torch.Tensor) -> torch.Tensor:
        """(N, T, d) and (K, N, T, d) to weights (K, N, T) that sum to one over the stacks."""
        query = self.query_proj(self.query_norm(visual))
        key = self.key_proj(self.key_norm(details))
        scores = torch.einsum("kntr,ntr->knt", key, query / query.shape[-1] ** 0.5)
        finite = torch.isfinite(scores).all(dim=0, keepdim=True)
        return torch.where(finite, scores, torch.zeros_like(scores)).softmax(dim=0)


class MFRSVLMGatedInjector(GradientCheckpointingLayer):
    """Mixes the detail stacks and adds the mixture to the visual positions through a gate (FUSE-RSVLM).

    With m the mixture and n = LN(m): h <- h + scale * sigmoid(W_g [LN(h); n]) * (W_d n). Other positions pass unchanged.
    """

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.router: nn.Module
        if config.routing == "token":
            self.router = MFRSVLMTokenRouter(config)
            # Mixing alone would lose which phase a feature came from, so every stack carries a mark of its own.
            self.stack_embedding = nn.Parameter(torch.zeros(config.num_detail_stacks, hidden_size))
        else:
            self.router = MFRSVLMStackRouter(config)
        self.routing = config.routing
        self.injection_init = config.injection_init
        self.hidden_norm = nn.LayerNorm(hidden_size)
        self.detail_norm = nn.LayerNorm(hidden_size)
        self.detail_proj = nn.Linear(hidden_size, hidden_size)
        self.gate_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.residual_scale = nn.Parameter(torch.full((1,), float(config.injection_init)))

    def forward(self, hidden_states: torch.Tensor, details: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
        """(B, S, d) and (K, N, T, d) to (B, S, d)."""
        num_images, tokens, hidden_size = details.shape[1:]
        visual = hidden_states.flatten(0, 1)[layout.position].view(num_images, tokens, hidden_size)
        if self.routing == "token":
            details = details + self.stack_embedding[:, None, None]
            mixed = torch.einsum("knt,kntd->ntd", self.router(visual, details), details)
        else:
            mixed = torch.einsum("nk,kntd->ntd", self.router(visual, details, layout.same_sample), details)
        mixed = self.detail_norm(mixed)
        gate = self.gate_proj(torch.cat([self.hidden_norm(visual), mixed], dim=-1)).sigmoid()
        update = self.residual_scale * gate * self.detail_proj(mixed)  # (N, T, d)
        update = update.flatten(0, 1)[layout.rank]  # (B, S, d)
        return hidden_states + torch.where(layout.mask[..., None], update, torch.zeros_like(update))


class MFRSVLMCrossAttentionInjector(GradientCheckpointingLayer):
    """Lets every position attend to the detail tokens of the images before it, through a gate that starts at zero.

    h <- h + tanh(gate) * W_o attention(W_q LN(h), keys, values). Keys and values are computed once, at prefill.
    """

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size, size = config.text_config.hidden_size, config.cross_attention_size
        self.num_heads = config.cross_attention_heads
        self.hidden_norm = nn.LayerNorm(hidden_size)
        self.detail_norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, size)
        self.k_proj = nn.Linear(hidden_size, size)
        self.v_proj = nn.Linear(hidden_size, size)
        self.o_proj = nn.Linear(size, hidden_size)
        # Which stack (scale, depth, phase) and which place on the grid a detail token comes from.
        self.stack_embedding = nn.Parameter(torch.zeros(config.num_detail_stacks, size))
        self.place_embedding = nn.Parameter(torch.zeros(config.image_seq_length, size))
        self.gate = nn.Parameter(torch.zeros(1))

    def keys_and_values(self, details: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, N, T, d) to keys and values, each (N, heads, K * T, size / heads)."""
        details = self.detail_norm(details)
        origin = self.stack_embedding[:, None, None] + self.place_embedding  # (K, 1, T, size)

        def heads(states: torch.Tensor) -> torch.Tensor:
            num_stacks, num_images, tokens, size = states.shape
            states = states.view(num_stacks, num_images, tokens, self.num_heads, size // self.num_heads)
            return states.permute(1, 3, 0, 2, 4).flatten(2, 3)  # (N, heads, K * T, size / heads)

        return heads(self.k_proj(details) + origin), heads(self.v_proj(details) + origin)

    def forward(
        self,
        hidden_states: torch.Tensor,
        details: torch.Tensor | None,
        slots: Any,
        visible: torch.Tensor,
        sees_any: torch.Tensor,
        images_per_sample: int,
        rank: int,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (B, S, d).
            details: (K, N, T, d) of images that are new in this call; `None` if all are cached.
            slots: (N,), see `sample_slots`.
            visible: (B, 1, S, L) bool, which of the L detail tokens each position attends to.
            sees_any: (B, S, 1) bool, whether a position sees an image at all; one that does not passes unchanged.
            images_per_sample: slots that every sample has for the new images.
            rank: number of this injector, its layer in the cache.
            past_key_values: cache of the detail tokens.

        Returns:
            (B, S, d)
        """
        batch_size, length, _ = hidden_states.shape

        def by_sample(states: torch.Tensor) -> torch.Tensor:
            _, heads, tokens, size = states.shape
            rows = states.new_zeros(batch_size * images_per_sample, heads, tokens, size).index_copy(0, slots, states)
            # (B * images, heads, K * T, size) -> (B, heads, images * K * T, size)
            return rows.view(batch_size, images_per_sample, heads, tokens, size).transpose(1, 2).flatten(2, 3)

        if details is not None:
            key, value = map(by_sample, self.keys_and_values(details))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, rank)
        else:
            key, value = past_key_values.layers[rank].keys, past_key_values.layers[rank].values

        query = self.q_proj(self.hidden_norm(hidden_states))
        query = query.view(batch_size, length, self.num_heads, -1).transpose(1, 2)  # (B, heads, S, size / heads)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        attended = attended.transpose(1, 2).flatten(2)  # (B, S, size)
        update = torch.where(sees_any, self.o_proj(attended), torch.zeros_like(hidden_states))
        return hidden_states + self.gate.tanh() * update


class MFRSVLMInjectors(nn.Module):
    """The injectors of all injection layers. A plain module with a forward, so that PEFT can save it as one."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        kind = MFRSVLMGatedInjector if config.injection_type == "gated" else MFRSVLMCrossAttentionInjector
        self.layers = nn.ModuleList([kind(config) for _ in config.injection_layers])

    def forward(self, rank: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layers[rank](hidden_states, *args, **kwargs)


# The mixin stands before a decoder class in the bases of another one, and is no model by itself.
DecoderBase: Any = PreTrainedModel if TYPE_CHECKING else object


class MFRSVLMDecoderMixin(DecoderBase):
    """Adds the injection to the forward of a Llama-like decoder; everything else is the decoder's own.

    `details` are the K stacks of the N images of the batch, `visual_pos_masks` the positions of their visual tokens.
    """

    def __init__(self, config: Any, injection_config: MFRSVLMConfig) -> None:
        super().__init__(config)
        self.injection_type = injection_config.injection_type
        self.injection_layers = tuple(injection_config.injection_layers)
        self.injectors = MFRSVLMInjectors(injection_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MFRSVLMGatedInjector):
            init.constant_(module.residual_scale, module.injection_init)
            if module.routing == "token":
                init.normal_(module.stack_embedding, std=self.config.initializer_range)
        elif isinstance(module, MFRSVLMCrossAttentionInjector):
            init.zeros_(module.gate)
            init.normal_(module.stack_embedding, std=self.config.initializer_range)
            init.normal_(module.place_embedding, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        details: torch.Tensor | None = None,
        images_per_sample: int = 1,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the decoder's own, and:

        Args:
            visual_pos_masks: (B, S) bool, the positions of the visual tokens, N * T in all.
            details: (K, N, T, d), the detail stacks of the images in reading order.
            images_per_sample: most images that one sample of the batch holds (cross-attention only).
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and self.injection_type == "cross_attention" and self.injection_layers:
            past_key_values = with_detail_cache(past_key_values)
        cache, detail_cache = past_key_values, None
        if isinstance(past_key_values, EncoderDecoderCache):
            cache, detail_cache = past_key_values.self_attention_cache, past_key_values.cross_attention_cache

        past_length = cache.get_seq_length() if cache is not None else 0
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = columns.unsqueeze(0)

        causal_mask: Any = attention_mask  # a static cache comes with one mask per kind of layer, ready made
        if not isinstance(attention_mask, dict):
            causal_mask = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
        layout = None
        if details is not None and visual_pos_masks is not None:
            layout = visual_layout(visual_pos_masks, details.shape[1], details.shape[2])
        slots = visible = sees_any = None
        if self.injection_type == "cross_attention":
            slots = None if layout is None else sample_slots(layout, images_per_sample)
            visible, sees_any = self._visible_details(columns, layout, slots, details, images_per_sample, detail_cache)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if layer_idx in self.injection_layers:
                rank = self.injection_layers.index(layer_idx)
                if visible is not None:
                    hidden_states = self.injectors(
                        rank,
                        hidden_states,
                        details,
                        slots,
                        visible,
                        sees_any,
                        images_per_sample,
                        rank,
                        past_key_values=detail_cache,
                    )
                elif layout is not None and self.injection_type == "gated":
                    hidden_states = self.injectors(rank, hidden_states, details, layout)
            if isinstance(causal_mask, dict):
                layer_mask = causal_mask[self.config.layer_types[layer_idx]]
            else:
                layer_mask = causal_mask
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=layer_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _visible_details(
        self,
        columns: torch.Tensor,
        layout: VisualLayout | None,
        slots: Any,
        details: Any,
        images_per_sample: int,
        detail_cache: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which detail tokens each position attends to, (B, 1, S, L), and whether it sees any, (B, S, 1).

        Both are `None` if the batch holds no image at all.

        A detail token is placed at the first visual token of its image. The places are cached beside the keys, as
        one more layer, so that they follow every reordering of the cache.
        """
        places_layer = len(self.injection_layers)
        places = None
        if layout is not None:
            num_stacks, num_images, tokens, _ = details.shape
            place = columns[layout.position[::tokens] % layout.mask.shape[1]]  # (N,)
            present = torch.arange(num_images, device=place.device) * tokens < layout.mask.sum()
            place = torch.where(present, place, NEVER_VISIBLE)
            places = place.new_full((layout.mask.shape[0] * images_per_sample,), NEVER_VISIBLE)
            places = places.index_copy(0, slots, place).view(layout.mask.shape[0], images_per_sample)
            places = places.repeat_interleave(num_stacks * tokens, dim=1)[:, None, :, None]  # (B, 1, images * K * T, 1)
            if detail_cache is not None:
                places, _ = detail_cache.update(places, places, places_layer)
        elif detail_cache is not None and detail_cache.get_seq_length(places_layer):
            places = detail_cache.layers[places_layer].keys
        if places is None:
            return None, None
        visible = places.transpose(2, 3) <= columns[None, None, :, None]
        sees_any = visible.any(dim=-1, keepdim=True)
        # A position that sees no image would divide zero by zero: it attends anywhere and is silenced after.
        return visible | ~sees_any, sees_any[:, 0]


def sample_slots(layout: VisualLayout, images_per_sample: int) -> torch.Tensor:
    """Slot `sample * images_per_sample + place in the sample` of every image, (N,)."""
    earlier = torch.tril(layout.same_sample, diagonal=-1).sum(dim=1)
    return layout.row * images_per_sample + earlier.clamp(max=images_per_sample - 1)


def with_detail_cache(past_key_values: Cache) -> EncoderDecoderCache:
    """Puts a cache for the detail tokens beside a decoder's cache, which cannot take extra layers itself.

    Raises:
        ValueError: the decoder's cache is in use already, so the detail tokens of its images are lost.
    """
    if isinstance(past_key_values, EncoderDecoderCache):
        return past_key_values
    if not torch.compiler.is_compiling() and not is_empty(past_key_values):
        raise ValueError(
            f"past_key_values holds {past_key_values.get_seq_length()} positions but no detail tokens. With cross-attention "
            "injection, continue from the `past_key_values` that the model returned."
        )
    return EncoderDecoderCache(past_key_values, DynamicCache())


def hidden_states_at(layers: Sequence[int]) -> list[int] | bool:
    """Value of `output_hidden_states` that keeps only these; all of them where `transformers` is too old to choose."""
    return list(layers) if hasattr(output_capturing, "select_hidden_states") else True


def is_empty(past_key_values: Cache | None) -> bool:
    """Whether nothing is cached yet. Asking a static cache waits for the device, so ask only where that is all right."""
    return past_key_values is None or bool(past_key_values.get_seq_length() == 0)


class MFRSVLMLlamaModel(MFRSVLMDecoderMixin, LlamaModel):
    pass


class MFRSVLMMistralModel(MFRSVLMDecoderMixin, MistralModel):
    pass


class MFRSVLMQwen2Model(MFRSVLMDecoderMixin, Qwen2Model):
    pass


class MFRSVLMQwen3Model(MFRSVLMDecoderMixin, Qwen3Model):
    pass


# Decoders whose forward is embedding, rotary positions, layers and a norm, and nothing else. Others (Gemma scales its
# embeddings, Granite its residuals) would run and be wrong, so they are refused.
DECODERS = {
    "llama": MFRSVLMLlamaModel,
    "mistral": MFRSVLMMistralModel,
    "qwen2": MFRSVLMQwen2Model,
    "qwen3": MFRSVLMQwen3Model,
}


class MFRSVLMPreTrainedModel(PreTrainedModel):
    config: MFRSVLMConfig
    config_class = MFRSVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MFRSVLMGatedInjector", "MFRSVLMCrossAttentionInjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class MFRSVLMModel(MFRSVLMPreTrainedModel):
    """Vision tower, projector, window encoder and decoder with injection, without a language modelling head."""

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__(config)
        if config.has_vit:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        else:
            self.vision_tower = AutoBackbone.from_config(config.vision_config)
            self.stage_projections = nn.ModuleDict(
                {
                    str(stage): nn.Linear(channels, config.vision_feature_size)
                    for stage, channels in zip(config.vision_config.out_indices, self.vision_tower.channels, strict=True)
                }
            )
        self.multi_modal_projector = MFRSVLMMultiModalProjector(config)
        if config.visual_position_embeddings:
            self.visual_position_embedding = nn.Embedding(config.image_seq_length, config.text_config.hidden_size)
        decoder_class = DECODERS.get(config.text_config.model_type)
        if decoder_class is None:
            raise ValueError(
                f"text_config.model_type={config.text_config.model_type!r} is not supported; supported decoders are "
                f"{sorted(DECODERS)}."
            )
        self.language_model = decoder_class._from_config(config.text_config, injection_config=config)
        self.post_init()

    def train(self, mode: bool = True) -> "MFRSVLMModel":
        """As usual, but batch normalisation stays in evaluation mode: windows of a few images are no statistic."""
        super().train(mode)
        for module in self.vision_tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _vision_features(self, outputs: ModelOutput, layers: Sequence[int]) -> list[torch.Tensor]:
        """Feature maps of the tower at the given layers, each (n, C, h, w), without CLS."""
        if self.config.has_vit:
            maps = []
            for layer in layers:
                tokens = outputs.hidden_states[layer][:, 1:]  # (n, h * w, C)
                side = int(tokens.shape[1] ** 0.5)
                maps.append(tokens.transpose(1, 2).unflatten(2, (side, side)))
            return maps
        stages = self.config.vision_config.out_indices
        maps = []
        for layer in layers:
            stage = layer % (self.config.num_vision_layers + 1)
            feature_map = outputs.feature_maps[stages.index(stage)]  # (n, channels, h, w)
            maps.append(self.stage_projections[str(stage)](feature_map.movedim(1, -1)).movedim(-1, 1))
        return maps

    def _encode_windows(self, pixels: torch.Tensor, window: WindowScale, chunk_size: int | None) -> list[torch.Tensor]:
        """Encodes (N * n, 3, size, size); one (N * n, C, t, t) per depth."""
        config = self.config
        chunks = []
        for chunk in pixels.split(chunk_size or len(pixels)):
            if config.window_encoding == "resize" and window.size != config.image_size:
                chunk = nn.functional.interpolate(
                    chunk, size=(config.image_size, config.image_size), mode="bilinear", align_corners=False
                )
            kwargs: dict[str, Any] = {}
            if config.has_vit:
                kwargs = {"interpolate_pos_encoding": chunk.shape[-1] != config.image_size}
            wanted = config.has_vit and hidden_states_at(config.detail_feature_layers)
            outputs = self.vision_tower(chunk, output_hidden_states=wanted, return_dict=True, **kwargs)
            maps = self._vision_features(outputs, config.detail_feature_layers)
            chunks.append([resample_to_grid(depth, window.tokens_per_side) for depth in maps])
        return [torch.cat(depth) for depth in zip(*chunks, strict=True)]

    def _detail_stacks(self, pixel_values_local: torch.Tensor, chunk_size: int | None) -> torch.Tensor:
        """Packed windows of N images to unprojected detail stacks (K, N, T, C)."""
        config = self.config
        num_images = pixel_values_local.shape[0]
        canvas_side = config.canvas_scale * config.tokens_per_side
        stacks = []
        for window, pixels in zip(config.windows, unpack_windows(pixel_values_local, config.windows), strict=True):
            for depth in self._encode_windows(pixels, window, chunk_size):
                depth = depth.unflatten(0, (num_images, window.num_windows))  # (N, n, C, t, t)
                canvas = stitch_windows(depth, window, canvas_side, config.window_weighting)
                stacks.append(split_phases(canvas, config.canvas_scale))  # (phases, N, T, C)
        return torch.cat(stacks)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_local: torch.Tensor | None = None,
        window_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> MFRSVLMImageFeatures:
        """Encodes N images: their global views and, for a model with injection, their windows.

        Args:
            pixel_values: (N, 3, image_size, image_size), the normalised global views.
            pixel_values_local: (N, packed), the normalised windows of every scale as the processor packs them.
            window_chunk_size: windows an encoder pass; defaults to the config's.

        Raises:
            ValueError: windows are missing or their number does not fit the config or the global views.
        """
        config = self.config
        if window_chunk_size is None:
            window_chunk_size = config.window_chunk_size
        dtype = self.vision_tower.dtype  # of its floating point parameters: quantised weights have another
        wanted = kwargs.pop("output_hidden_states", None) or getattr(config.vision_config, "output_hidden_states", False)
        kwargs["output_hidden_states"] = wanted or (config.has_vit and hidden_states_at([config.vision_feature_layer]))
        outputs = self.vision_tower(pixel_values.to(dtype), return_dict=True, **kwargs)
        (global_map,) = self._vision_features(outputs, [config.vision_feature_layer])
        visual = resample_to_grid(global_map, config.tokens_per_side).flatten(2).transpose(1, 2)  # (N, T, C)
        if config.has_vit and self.training:
            # Nothing depends on the tower's post-layernorm, but DDP waits for a gradient of every parameter.
            visual = visual + 0 * outputs.pooler_output.sum()

        details = None
        if config.has_details:
            if pixel_values_local is None or len(pixel_values_local) != len(pixel_values):
                got = "none" if pixel_values_local is None else f"those of {len(pixel_values_local)}"
                raise ValueError(
                    f"pixel_values holds {len(pixel_values)} images, so pixel_values_local must hold windows of as many, "
                    f"but it holds {got}. Pass both as the processor returns them."
                )
            stacks = self._detail_stacks(pixel_values_local.to(dtype), window_chunk_size)
            details = [list(self.multi_modal_projector(stack)) for stack in stacks]

        visual = self.multi_modal_projector(visual)  # (N, T, D)
        if config.visual_position_embeddings:
            visual = visual + self.visual_position_embedding.weight
        return MFRSVLMImageFeatures(
            last_hidden_state=outputs.last_hidden_state if config.has_vit else outputs.feature_maps[-1],
            pooler_output=list(visual),
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
            deepstack_features=details,
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: Any) -> torch.Tensor:
        """(B, S) bool: which positions hold a visual token."""
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            return input_ids == image_token_id
        if image_token_id >= self.config.text_config.vocab_size:
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool)
        placeholder = self.get_input_embeddings()(torch.full((), image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def _check_image_tokens(self, mask: torch.Tensor, image_features: list[torch.Tensor] | None) -> None:
        """Compares placeholders with features, on the CPU only: elsewhere it would wait for the device."""
        per_sample = mask.sum(dim=1)
        num_tokens = int(per_sample.sum())
        if image_features is None:
            if num_tokens:
                logger.warning_once(
                    f"The prompts hold {num_tokens} image tokens, but there are no pixel_values: the model sees no image. "
                    "Pass all that the processor returns."
                )
            return
        num_features = sum(map(len, image_features))
        if num_tokens != num_features:
            raise ValueError(
                f"Image features and image tokens do not match: {num_tokens} tokens, {num_features} features. Every image "
                f"needs {self.config.image_seq_length} tokens, which the processor writes for each `<image>`."
            )
        if not self.splits_images and (per_sample % self.config.image_seq_length).any():
            raise ValueError(
                f"An image is split: the samples hold {per_sample.tolist()} image tokens, but an image has "
                f"{self.config.image_seq_length}, and this model weighs details image by image. Prefill without chunks."
            )

    @property
    def splits_images(self) -> bool:
        """Whether an image may be prefilled in pieces: only where every token is routed for itself."""
        return not self.config.has_details or (self.config.injection_type == "gated" and self.config.routing == "token")

    def _empty_image_features(self, device: torch.device) -> MFRSVLMImageFeatures:
        """Features of a blank image that no position shows.

        Where parameters are sharded or their gradients averaged over ranks, a rank whose batch holds only text must
        run the tower and the injectors all the same, or the others wait for it forever.
        """
        config = self.config
        size = config.image_size
        pixel_values_local = None
        if config.has_details:
            length = sum(window.num_values for window in config.windows)
            pixel_values_local = torch.zeros(1, length, device=device)
        return self.get_image_features(torch.zeros(1, 3, size, size, device=device), pixel_values_local, return_dict=True)

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
        pixel_values_local: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        window_chunk_size: int | None = None,
        mm_encoder_outputs: dict[str, MFRSVLMImageFeatures] | None = None,
        **kwargs: Any,
    ) -> MFRSVLMModelOutputWithPast:
        """
        Args:
            input_ids: (B, S), with `config.image_token_id` at every visual position.
            pixel_values: (N, 3, image_size, image_size), images in reading order over the batch.
            pixel_values_local: (N, packed), their windows.
            attention_mask: (B, past + S), 0 at padding on either side.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of the pixels.

        Raises:
            ValueError: the prompt is longer than the decoder's positions; both or neither of two exclusive arguments
                are given; on the CPU, the image tokens do not match the images.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        length = given.shape[1]
        max_positions = self.config.text_config.max_position_embeddings
        if length > max_positions:
            raise ValueError(
                f"The prompt has {length} positions, visual tokens included, but the decoder has {max_positions} "
                "(text_config.max_position_embeddings). Shorten the text or pass fewer images."
            )

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values, pixel_values_local, window_chunk_size=window_chunk_size, return_dict=True
            )
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            if image_outputs is not None or is_empty(past_key_values):
                self._check_image_tokens(mask, None if image_outputs is None else image_outputs.pooler_output)
        if image_outputs is None and self._ranks_need_images() and is_empty(past_key_values):
            image_outputs = self._empty_image_features(mask.device)

        if inputs_embeds is None:
            # The placeholder may lie outside the vocabulary, so it is looked up as some token and overwritten.
            inputs_embeds = self.get_input_embeddings()(given.masked_fill(mask, 0))

        image_features, injection = None, {}
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)
            if image_outputs.deepstack_features is not None:
                injection = self._injection_arguments(image_outputs.deepstack_features, mask, inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **injection,
            **{**kwargs, "return_dict": True},
        )
        return MFRSVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _injection_arguments(
        self, deepstack_features: list[list[torch.Tensor]], mask: torch.Tensor, inputs_embeds: torch.Tensor
    ) -> dict[str, Any]:
        # K lists of N tensors (T, d) -> (K, N * T, d)
        details = torch.cat([image for stack in deepstack_features for image in stack])
        details = details.unflatten(0, (len(deepstack_features), -1))
        details = details.to(inputs_embeds.device, inputs_embeds.dtype)
        tokens = self.config.image_seq_length
        if details.shape[1] % tokens == 0:
            details = details.unflatten(1, (-1, tokens))  # (K, N, T, d)
        elif self.splits_images:
            details = details.unsqueeze(1)  # pieces of images; token routing needs no image borders
        else:
            raise ValueError(
                f"An image is split: {details.shape[1]} image tokens in this chunk, but an image has {tokens}, and this "
                "model weighs details image by image. Prefill without chunks, or so that chunks end between images."
            )
        arguments: dict[str, Any] = {"visual_pos_masks": mask, "details": details}
        if self.config.injection_type == "cross_attention":
            # The one value read on the host, at prefill: how many key slots a sample needs. A single sample has all.
            images = details.shape[1] if len(mask) == 1 else int(mask.sum(dim=1).max()) // tokens
            arguments["images_per_sample"] = max(images, 1)
        return arguments


class MFRSVLMForConditionalGeneration(MFRSVLMPreTrainedModel, GenerationMixin):
    """MF-RSVLM with a language modelling head: answers questions about overhead images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__(config)
        self.model = MFRSVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_local: torch.Tensor | None = None,
        window_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> MFRSVLMImageFeatures:
        """See `MFRSVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_local, window_chunk_size=window_chunk_size, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_local: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        window_chunk_size: int | None = None,
        mm_encoder_outputs: dict[str, MFRSVLMImageFeatures] | None = None,
        **kwargs: Any,
    ) -> MFRSVLMCausalLMOutputWithPast:
        """As `MFRSVLMModel.forward`, and:

        Args:
            labels: (B, S), -100 where no loss is wanted. Image tokens never count.
            logits_to_keep: how many positions from the end to compute logits for (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_local=pixel_values_local,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            window_chunk_size=window_chunk_size,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MFRSVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            # It proposes pieces of the prompt, placeholders among them, and looks each up in a row of scores. The model
            # never agrees to a placeholder, but the row has to reach that far.
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching takes token ids only, so the model would never see an image."""
        raise NotImplementedError(
            "MF-RSVLM does not support continuous batching, which passes token ids only: the images would be lost without a "
            "word. Use generate() on padded batches."
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

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`.

        Raises:
            ValueError: `prefill_chunk_size` would split an image that the model has to see whole; `assistant_model` does
                not know the placeholder.
        """
        if kwargs.get("mm_encoder_outputs"):
            # Beams and several sequences repeat the features in place: the caller's own must stay as they are.
            kwargs["mm_encoder_outputs"] = {name: copy.copy(value) for name, value in kwargs["mm_encoder_outputs"].items()}
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.get_input_embeddings().num_embeddings <= self.config.image_token_id:
            if assistant.config.model_type != self.config.model_type:
                raise ValueError(
                    f"assistant_model has {assistant.get_input_embeddings().num_embeddings} embeddings, so it cannot read "
                    f"image_token_id={self.config.image_token_id}. Use an MF-RSVLM assistant, or prompt_lookup_num_tokens."
                )
        settings = generation_config if generation_config is not None else self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if chunk_size and input_ids is not None:
            self._check_chunks(input_ids == self.config.image_token_id, chunk_size)
        return super().generate(inputs, generation_config, *args, **kwargs)


__all__ = [
    "MFRSVLMForConditionalGeneration",
    "MFRSVLMImageFeatures",
    "MFRSVLMModel",
    "MFRSVLMPreTrainedModel",
]
