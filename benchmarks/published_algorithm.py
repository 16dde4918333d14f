"""The published algorithm, written plainly from its description: what `speed.py` compares with.

One sample at a time, eager attention, all windows of a size in one pass of the encoder, all hidden states kept, windows
stitched one by one, stacks projected one by one and stacked anew before each injection, logits of all positions at prefill.
It takes the weights of a converted model, whose numbers it reproduces.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.configuration_mfrsvlm import CACHE, WindowScale


class PublishedAlgorithm:
    """Answers about one image with the parts of a converted model: resized windows, stack routing, the prefix placement.

    Args:
        model: its parts are copied, and run with eager attention.
    """

    def __init__(self, model: MFRSVLMForConditionalGeneration) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.set_attn_implementation("eager")
        self.config = self.model.config
        inner = self.model.model
        self.tower, self.projector, self.decoder = inner.vision_tower, inner.multi_modal_projector, inner.language_model
        self.injectors = dict(zip(self.config.injection_layers, inner.injectors, strict=True))

    def encode(self, global_view: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(1, 3, s, s), whose enlargement is the canvas, to visual tokens (1, T, d) and K detail stacks (1, T, d)."""
        config = self.config
        side = config.canvas_scale * config.image_size
        pixels = global_view.float()
        canvas = nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
        visual = self.hidden_states(pixels)[config.vision_feature_layer]
        stacks = []
        for window in config.windows:
            cut = canvas.unfold(2, window.size, window.stride).unfold(3, window.size, window.stride)
            # (1, 3, w, w, size, size) -> (w * w, 3, size, size)
            pieces = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, window.size, window.size)
            if window.size != config.image_size:
                size = (config.image_size, config.image_size)
                pieces = nn.functional.interpolate(pieces, size=size, mode="bilinear", align_corners=False)
            hidden_states = self.hidden_states(pieces)
            for layer in config.detail_feature_layers:
                stacks += self.phases(self.stitch(hidden_states[layer], window))
        return self.projector(visual), [self.projector(stack) for stack in stacks]

    def hidden_states(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The patches of all hidden states, (n, T, C) each."""
        outputs = self.tower(pixels.to(self.tower.dtype), output_hidden_states=True)
        return [states[:, 1:] for states in outputs.hidden_states]

    def stitch(self, features: torch.Tensor, window: WindowScale) -> torch.Tensor:
        """(n, T, C) to (1, h, w, C) on the grid of the canvas."""
        side, channels = self.config.tokens_per_side, features.shape[-1]
        features = features.view(-1, side, side, channels)
        tokens, pool = window.tokens_per_side, side // window.tokens_per_side
        if pool > 1:
            features = nn.functional.avg_pool2d(features.permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1)
        profile = torch.hann_window(tokens, periodic=False, device=features.device, dtype=features.dtype)
        weight = torch.outer(profile, profile)[..., None]  # (t, t, 1)
        canvas = features.new_zeros(side * self.config.canvas_scale, side * self.config.canvas_scale, channels)
        total = torch.zeros_like(canvas[..., :1])
        for piece, (top, left) in zip(features, window.offsets, strict=True):
            top, left = top // self.config.patch_size, left // self.config.patch_size
            canvas[top : top + tokens, left : left + tokens] += piece * weight
            total[top : top + tokens, left : left + tokens] += weight
        return (canvas / total.clamp(min=1e-6))[None]

    def phases(self, canvas: torch.Tensor) -> list[torch.Tensor]:
        factor, channels = self.config.canvas_scale, canvas.shape[-1]
        return [canvas[:, r::factor, c::factor].reshape(1, -1, channels) for r in range(factor) for c in range(factor)]

    def inject(self, injector: Any, hidden: torch.Tensor, stacks: list[torch.Tensor]) -> torch.Tensor:
        """Adds the mixture of the stacks to the visual positions, the first T of (1, S, d)."""
        visual = hidden[:, : stacks[0].shape[1]]
        details = torch.stack([stack[0] for stack in stacks])  # (K, T, d)
        router = injector.router
        query = router.query_proj(router.query_norm(visual.mean(dim=1)))  # (1, d)
        keys = router.key_proj(router.key_norm(details.mean(dim=1)))  # (K, d)
        scores = (keys @ query[0]) / visual.shape[-1] ** 0.5
        if torch.isnan(scores).any() or torch.isinf(scores).any():
            scores = torch.zeros_like(scores)
        mixed = injector.detail_norm(torch.einsum("k,ktd->td", scores.softmax(dim=-1), details)[None])
        gate = injector.gate_proj(torch.cat([injector.hidden_norm(visual), mixed], dim=-1)).sigmoid()
        update = torch.zeros_like(hidden)
        update[:, : visual.shape[1]] = injector.residual_scale * gate * injector.detail_proj(mixed)
        return hidden + update

    def decode(self, embeds: torch.Tensor, cache: DynamicCache, stacks: list[torch.Tensor] | None) -> torch.Tensor:
        """One forward of the decoder: (1, S, d) to logits (1, S, V)."""
        past, length = cache.get_seq_length(), embeds.shape[1]
        positions = torch.arange(past, past + length, device=embeds.device)[None]
        mask = torch.full((length, past + length), torch.finfo(embeds.dtype).min, device=embeds.device, dtype=embeds.dtype)
        mask = mask.triu(past + 1)[None, None]
        rotary = self.decoder.rotary_emb(embeds, positions)
        hidden = embeds
        for index, layer in enumerate(self.decoder.layers):
            if stacks is not None and index in self.injectors:
                hidden = self.inject(self.injectors[index], hidden, stacks)
            options = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary, CACHE: cache}
            hidden = layer(hidden, use_cache=True, **options)
        return self.model.lm_head(self.decoder.norm(hidden)).float()

    def prefill(
        self, features: tuple[torch.Tensor, list[torch.Tensor]], text_ids: torch.Tensor
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Logits (1, T + S, V) of the visual tokens and the text (1, S) after them, and the cache."""
        visual, stacks = features
        cache = DynamicCache(config=self.config.text_config)
        embeds = torch.cat([visual, self.decoder.embed_tokens(text_ids)], dim=1)
        return self.decode(embeds, cache, stacks), cache

    def next_token(self, logits: torch.Tensor) -> torch.Tensor:
        """(1, 1), the likeliest that is not the placeholder."""
        logits[..., self.config.image_token_id] = -torch.inf  # the published vocabulary does not have it
        return logits[:, -1:].argmax(dim=-1)

    def step(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The token after `token` (1, 1)."""
        return self.next_token(self.decode(self.decoder.embed_tokens(token), cache, None))
