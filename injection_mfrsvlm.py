"""Injection of the detail stacks of images into the layers of a decoder.

An injector is a forward pre-hook on its layer. The decoder passes the keyword argument `injection` to all layers, and the
pre-hook of every layer removes it before the layer runs.

Letters in shape comments: B samples, S positions, N images over the batch, r rows that share an image (beams), T tokens
an image, K detail stacks, I images of a sample, d decoder channels.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mfrsvlm import MFRSVLMConfig


# Key position of detail tokens that no query may attend to. All real positions are smaller.
NEVER_VISIBLE = torch.iinfo(torch.int64).max
# A score whose softmax is zero in every dtype, and that is finite in float16.
MASKED_SCORE = -1e4
# Engines that run the decoder themselves and pass only the visual tokens.
FOREIGN_ENGINES = ("vllm", "sglang")


class VisualLayout(NamedTuple):
    """Positions of the N images in a batch of B x S positions. Computed without synchronization with the host."""

    mask: torch.Tensor  # (B, S) bool, visual positions
    token: torch.Tensor  # (B, S), which of the N * T visual tokens a visual position holds; 0 elsewhere
    slot: torch.Tensor  # (B, S), which of the N * r * T updates a visual position takes; 0 elsewhere
    position: torch.Tensor  # (N, r, T), flat position b * S + s of every visual token; 0 where it has none
    row: torch.Tensor  # (N,), sample of every image
    sequence: torch.Tensor | None  # (B, S), number of the sequence in a packed row; None where no row is packed

    @property
    def same_sample(self) -> torch.Tensor:
        """(N, N) bool, images that share a sample, and in a packed row the sequence."""
        same = self.row[:, None] == self.row[None, :]
        if self.sequence is None:
            return same
        sequence = self.sequence.flatten()[self.position[:, 0, 0]]  # (N,)
        return same & (sequence[:, None] == sequence[None, :])


def visual_layout(
    mask: torch.Tensor, num_images: int, tokens: int, repeats: int = 1, sequence: torch.Tensor | None = None
) -> VisualLayout:
    """Numbers the visual positions of `mask` (B, S) in reading order, T to an image.

    With `repeats` = r, every r rows that follow each other are copies of one sample and share its images.
    """
    batch_size, length = mask.shape
    total = num_images * tokens
    flat = mask[::repeats].flatten()
    token = (flat.cumsum(0) - 1).clamp(min=0, max=total - 1)
    positions = torch.arange(flat.shape[0], device=mask.device)
    # Text positions write to a slot past the end that is cut off again, so that the shapes stay static.
    position = positions.new_zeros(total + 1).scatter(0, torch.where(flat, token, total), positions)[:total]
    position = position.view(num_images, 1, tokens)
    copies = torch.arange(repeats, device=mask.device)[:, None]
    row = position // length
    token = token.view(-1, 1, length)
    slot = (token // tokens * repeats + copies) * tokens + token % tokens  # (B / r, r, S)
    return VisualLayout(
        mask=mask,
        token=token.expand(-1, repeats, -1).reshape(batch_size, length),
        slot=slot.reshape(batch_size, length),
        position=(row * repeats + copies) * length + position % length,
        row=row[:, 0, 0],
        sequence=sequence,
    )


class DetailMemory(NamedTuple):
    """State of cross-attention for the images of this call and of earlier calls."""

    cache: Any  # keys, values and places of the detail tokens, a layer an injector and one more; None without a cache
    slots: Any  # (N,), sample * images a sample + place in the sample, of the new images
    images_per_sample: int  # slots that every sample has for its new images
    visible: torch.Tensor | None  # (B, S, I) bool, which of the I images of its sample a position sees; None: no image


class Injection(NamedTuple):
    """The input of the injectors, a keyword argument of the decoder's forward."""

    details: torch.Tensor | None  # (K, N, T, d), the detail stacks of the images of this call
    summary: torch.Tensor | None  # of gated injectors: means (N, K, d) or variances (K, N, T), the same for every layer
    layout: VisualLayout | None  # where the images of this call lie
    memory: DetailMemory | None  # cross-attention only


def gated_injection(details: torch.Tensor, layout: VisualLayout, routing: str) -> Injection:
    """The input of gated injectors from the stacks (K, N, T, d), computed once for all of them."""
    if routing == "token":
        # One stack at a time: a copy of all in float32 would be twice their size.
        summary = torch.stack([variance(stack.float()) for stack in details])
    else:
        summary = details.mean(dim=2).transpose(0, 1)
    return Injection(details, summary, layout, None)


def variance(values: torch.Tensor) -> torch.Tensor:
    """The variance over the last dimension. On CPUs, `Tensor.var` takes nine times as long."""
    return (values - values.mean(dim=-1, keepdim=True)).square().mean(dim=-1)


def cross_attention_injection(
    details: torch.Tensor | None, layout: VisualLayout | None, inputs_embeds: torch.Tensor, cache: Any, rank: int
) -> Injection:
    """The input of cross-attention injectors at the positions of `inputs_embeds` (B, S, d).

    A position attends to the images of its sample that start at or before it. The first position of every image is cached
    with the keys of the injectors, as layer `rank`, so that it is reordered together with the cache.
    """
    batch_size, length = inputs_embeds.shape[:2]
    past_length, memory_cache = 0, None
    if cache is not None:
        past_length, memory_cache = cache.self_attention_cache.get_seq_length(), cache.cross_attention_cache
    columns = torch.arange(length, device=inputs_embeds.device) + past_length
    slots = visible = None
    images = 1
    if layout is not None:
        num_images, repeats, tokens = layout.position.shape
        rows = batch_size // repeats
        tokens_per_row = layout.mask[::repeats].sum(dim=1)
        # The one value read on the host, at prefill: how many images a sample holds at most. All of them is a bound.
        images = num_images
        if rows > 1 and not torch.compiler.is_compiling():
            images = max(int(tokens_per_row.max()) // tokens, 1)
        earlier = torch.tril(layout.row[:, None] == layout.row[None, :], diagonal=-1).sum(dim=1)
        slots = layout.row * images + earlier.clamp(max=images - 1)

        def by_sample(values: torch.Tensor, fill: int) -> torch.Tensor:
            """(N,) to (B, I)."""
            values = values.new_full((rows * images,), fill).index_copy(0, slots, values)
            return values.view(rows, images).repeat_interleave(repeats, dim=0)

        first = layout.position[:, 0, 0]  # (N,), flat
        present = torch.arange(num_images, device=first.device) * tokens < tokens_per_row.sum()
        places = by_sample(torch.where(present, columns[first % length], NEVER_VISIBLE), NEVER_VISIBLE)
        if memory_cache is not None:
            places = memory_cache.update(places[:, None, :, None], places[:, None, :, None], rank)[0][:, 0, :, 0]
        visible = places[:, None] <= columns[:, None]  # (B, S, I)
        if layout.sequence is not None:
            sequence = by_sample(layout.sequence.flatten()[first], -1)
            visible = visible & (sequence[:, None] == layout.sequence[..., None])
    elif memory_cache is not None and memory_cache.get_seq_length(rank):
        visible = memory_cache.layers[rank].keys[:, 0, None, :, 0] <= columns[:, None]
    return Injection(details, None, layout, DetailMemory(memory_cache, slots, images, visible))


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

    def forward(self, visual: torch.Tensor, means: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
        """(N, r, T, d) and the stacks' means (N, K, d) to weights (N, r, K) that sum to one."""
        query, key = visual.mean(dim=2), means
        if self.scope == "sample":
            # All images have T tokens, so the mean over the tokens of a sample is the mean of its images' means.
            share = layout.same_sample.to(query.dtype)
            share = share / share.sum(dim=1, keepdim=True)  # (N, N)
            query = torch.einsum("nm,mrd->nrd", share, query)
            key = torch.einsum("nm,mkd->nkd", share, key)
        query = self.query_proj(self.query_norm(query))
        key = self.key_proj(self.key_norm(key))
        scores = torch.einsum("nkd,nrd->nrk", key, query / query.shape[-1] ** 0.5)  # scaled first, for float16
        return finite_softmax(scores, dim=2)


class MFRSVLMTokenRouter(nn.Module):
    """One weight per detail stack and visual token, from low-rank queries and keys of the tokens themselves.

    The key of a detail token y is W LN(y) + b. It is never computed: with g and c the scale and the shift of the norm, a
    query q scores it (y - mean(y)) . (W g)^T q / std(y) + q . (W c + b), and subtracting the mean may fall on the
    projected query instead. So no tensor of the size of the details is made.
    """

    def __init__(self, config: MFRSVLMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.query_norm = nn.LayerNorm(hidden_size)
        self.query_proj = nn.Linear(hidden_size, config.routing_size)
        self.key_norm = nn.LayerNorm(hidden_size)
        self.key_proj = nn.Linear(hidden_size, config.routing_size)

    def forward(
        self, visual: torch.Tensor, details: torch.Tensor, variance: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Weights (K, N, r, T) that sum to one over the stacks.

        Args:
            visual: (N, r, T, d).
            details: (K, N, T, d), without the stack embedding.
            variance: (K, N, T), of the channels of `details`, in float32.
            embedding: (K, d), added to the details of a stack.
        """
        size = details.shape[-1]
        query = self.query_proj(self.query_norm(visual))
        query = query / query.shape[-1] ** 0.5  # scaled first, for float16
        projected = query @ (self.key_proj.weight * self.key_norm.weight)  # (N, r, T, d)
        projected = projected - projected.mean(dim=-1, keepdim=True)
        shift = embedding - embedding.mean(dim=-1, keepdim=True)
        # var(x + e) = var(x) + 2 cov(x, e) + var(e)
        covariance = torch.einsum("kntd,kd->knt", details, shift / size).float()
        variance = variance + 2 * covariance + shift.float().square().mean(dim=-1)[:, None, None]
        scores = torch.einsum("kntd,nrtd->knrt", details, projected) + torch.einsum("kd,nrtd->knrt", embedding, projected)
        scores = scores.float() * (variance.clamp(min=0) + self.key_norm.eps).rsqrt()[:, :, None]
        # The same for every stack, so it changes no weight; but a parameter without a gradient would stop DDP.
        constant = query @ self.key_proj(self.key_norm.bias)
        return finite_softmax(scores + constant, dim=0).to(details.dtype)


def finite_softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax with uniform weights if a score is not finite, as in the published model."""
    finite = torch.isfinite(scores).all(dim=dim, keepdim=True)
    return torch.where(finite, scores, torch.zeros_like(scores)).softmax(dim=dim)


class MFRSVLMInjectors(nn.ModuleList):
    """The injectors by rank, and the forward pre-hooks by which they enter the decoder's layers.

    A hook looks up its injector at every call, since PEFT replaces modules by the copies that it trains.
    """

    decoder_config: Any  # of the decoder that runs the layers

    def before_layer(self, rank: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Takes `injection` out of the layer's keyword arguments and injects it into the hidden states, `args[0]`."""
        injection = kwargs.pop("injection", None)
        if injection is not None:
            return (self[rank](args[0], injection), *args[1:]), kwargs
        engine = str(getattr(self.decoder_config, "_attn_implementation", None))
        if engine.startswith(FOREIGN_ENGINES):
            raise NotImplementedError(
                f"The decoder runs under {engine!r}, which does not pass detail stacks: answers would be wrong without a "
                'warning. Use generate(), `mfrsvlm serve`, or vLLM with its plugin: pip install "mfrsvlm[vllm]".'
            )
        return args, kwargs


def drop_injection(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The pre-hook of a layer without an injector: removes `injection`, which attention functions do not take."""
    kwargs.pop("injection", None)
    return args, kwargs


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
            # Mixing alone would lose which phase a feature came from, so every stack has an embedding of its own.
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

    def forward(self, hidden_states: torch.Tensor, injection: Injection) -> torch.Tensor:
        """(B, S, d) to (B, S, d)."""
        details, summary, layout, _ = injection
        if details is None or layout is None:
            return hidden_states
        visual = hidden_states.flatten(0, 1)[layout.position]  # (N, r, T, d)
        if self.routing == "token":
            weights = self.router(visual, details, summary, self.stack_embedding)
            mixed = torch.einsum("knrt,kntd->nrtd", weights, details)
            mixed = mixed + torch.einsum("knrt,kd->nrtd", weights, self.stack_embedding)
        else:
            mixed = torch.einsum("nrk,kntd->nrtd", self.router(visual, summary, layout), details)
        mixed = self.detail_norm(mixed)
        gate = self.gate_proj(torch.cat([self.hidden_norm(visual), mixed], dim=-1)).sigmoid()
        update = self.residual_scale * gate * self.detail_proj(mixed)
        update = update.flatten(0, 2)[layout.slot]  # (B, S, d)
        return hidden_states + torch.where(layout.mask[..., None], update, torch.zeros_like(update))


class MFRSVLMCrossAttentionInjector(GradientCheckpointingLayer):
    """Lets every position attend to the detail tokens of the images before it, through a gate that starts at zero.

    h <- h + tanh(gate) * W_o attention(W_q LN(h), keys, values). Keys and values are computed once, at prefill.
    """

    def __init__(self, config: MFRSVLMConfig, rank: int) -> None:
        super().__init__()
        hidden_size, size = config.text_config.hidden_size, config.cross_attention_size
        self.rank = rank  # its layer in the cache
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

    def forward(self, hidden_states: torch.Tensor, injection: Injection) -> torch.Tensor:
        """(B, S, d) to (B, S, d). A position that sees no image passes unchanged."""
        details, _, layout, memory = injection
        if memory is None or memory.visible is None:
            return hidden_states
        batch_size, length, _ = hidden_states.shape
        images, slots = memory.images_per_sample, memory.slots

        def by_sample(states: torch.Tensor) -> torch.Tensor:
            _, heads, tokens, size = states.shape
            rows = batch_size // repeats
            states = states.new_zeros(rows * images, heads, tokens, size).index_copy(0, slots, states)
            # (B / r * images, heads, K * T, size) -> (B, heads, images * K * T, size)
            states = states.view(rows, images, heads, tokens, size).transpose(1, 2).flatten(2, 3)
            return states if repeats == 1 else states.repeat_interleave(repeats, dim=0)

        if details is not None and layout is not None:
            repeats = layout.position.shape[1]
            key, value = map(by_sample, self.keys_and_values(details))
            if memory.cache is not None:
                key, value = memory.cache.update(key, value, self.rank)
        else:
            key, value = memory.cache.layers[self.rank].keys, memory.cache.layers[self.rank].values

        query = self.q_proj(self.hidden_norm(hidden_states))
        query = query.view(batch_size, length, self.num_heads, -1).transpose(1, 2)  # (B, heads, S, size / heads)
        head_size, total = query.shape[-1], memory.visible.shape[-1]
        if total > 1:
            # Which images a position sees is the same for all tokens of an image. So it enters as further channels, one an
            # image, in place of a mask of S x L entries: the query holds the score, the key which image it belongs to.
            score = torch.where(memory.visible, 0.0, MASKED_SCORE).to(query.dtype)[:, None]  # (B, 1, S, I)
            owner = torch.eye(total, dtype=key.dtype, device=key.device).repeat_interleave(key.shape[2] // total, dim=0)
            query = torch.cat([query, score.expand(-1, self.num_heads, -1, -1)], dim=-1)
            key = torch.cat([key, owner.expand(batch_size, self.num_heads, -1, -1)], dim=-1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, scale=head_size**-0.5)
        attended = attended.transpose(1, 2).flatten(2)  # (B, S, size)
        sees_any = memory.visible.any(dim=-1, keepdim=True)
        update = torch.where(sees_any, self.o_proj(attended), torch.zeros_like(hidden_states))
        return hidden_states + self.gate.tanh() * update


def with_detail_cache(cache: Cache) -> EncoderDecoderCache:
    """Combines a decoder's cache, which cannot take extra layers, with a cache for the detail tokens.

    Raises:
        ValueError: the decoder's cache is in use already, so the detail tokens of its images are lost.
    """
    if isinstance(cache, EncoderDecoderCache):
        return cache
    if not torch.compiler.is_compiling() and not is_empty(cache):
        raise ValueError(
            f"The cache holds {cache.get_seq_length()} positions but no detail tokens. With cross-attention injection, "
            "continue from the cache that the model returned."
        )
    return EncoderDecoderCache(cache, DynamicCache())


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing is cached yet. For a static cache, this waits for the device."""
    return cache is None or bool(cache.get_seq_length() == 0)
