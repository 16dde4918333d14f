"""Auxiliary losses that teach a decoder to attend to the right visual tokens. Their heads are not part of the model.

From random weights, a decoder needs many steps to associate a noun in a question with visual tokens, and learns nothing else
about objects before. Linear heads on the visual tokens therefore predict the objects there, like the heads of the encoder.
At every noun of a question, two attention heads of the same layers are trained to attend to the visual tokens with such
objects. Linear heads one layer deeper predict their count and, for a single object, its position.

Rows without known objects have no such losses, so that they can be mixed with others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from ...scenes import CLASSES, KINDS, Scene
from .encoder import LOSS_WEIGHT, TokenHeads, losses, object_table, token_targets
from .scene_images import CANVAS


ATTENTION_LAYERS, READ_LAYER = (1, 2), 3  # of six
NUM_COUNTS = 10
BINS = 16  # along each side of the image
# Weights of the losses; the loss of the answers has weight 1.
GUIDANCE_WEIGHT = {"seen": 0.25, "attention": 0.25, "counted": 0.5, "placed": 0.5, "boxed": 0.5}


@dataclass
class KnownObjects:
    """Annotations of the objects in one image.

    Attributes:
        tokens: (T, kinds, CHANNELS), see `token_targets`.
        scene_class: index of the class.
        counts: (kinds,), at most `NUM_COUNTS` - 1.
        boxes: (kinds, 4) as x1, y1, x2, y2 in bins, of kinds with one object; not a number for the others.
    """

    tokens: torch.Tensor
    scene_class: int
    counts: torch.Tensor
    boxes: torch.Tensor


def known_objects(scene: Scene, side: int) -> KnownObjects:
    """The annotations of a scene whose image has side x side visual tokens."""
    table = object_table(scene)
    counts = torch.tensor([scene.counts[kind] for kind in KINDS]).clamp(max=NUM_COUNTS - 1)
    boxes = torch.full((len(KINDS), 4), torch.nan)
    for kind in (counts == 1).nonzero().flatten().tolist():
        x, y, w, h = table[table[:, 0] == kind][0, 1:] * BINS / CANVAS
        boxes[kind] = torch.from_numpy(np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    tokens = torch.from_numpy(token_targets(table, 0, 0, CANVAS, side))
    return KnownObjects(tokens, list(CLASSES).index(scene.scene_class), counts, boxes)


class Guidance(nn.Module):
    """The guidance losses of one decoder.

    Inside `recording()`, it records the inputs of the attention of some layers for its own forward.

    Args:
        model: an MF-RSVLM with at least five Llama-like decoder layers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        width = config.text_config.hidden_size
        self.image_token_id = config.image_token_id
        self.seen = nn.ModuleList(TokenHeads(width, config.tokens_per_side) for _ in ATTENTION_LAYERS)
        self.counted = nn.Linear(width, NUM_COUNTS)
        self.placed = nn.Linear(width, 2 * BINS)
        self.boxed = nn.Linear(width, 4)
        layers = model.model.language_model.layers
        # In a dictionary, so that they are no part of this module.
        self.layers = {number: layers[number].self_attn for number in (*ATTENTION_LAYERS, READ_LAYER)}
        self.recorded: dict[int, tuple[torch.Tensor, Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the inputs of the attention of the model within the block."""
        hooks = [
            layer.register_forward_pre_hook(partial(self._record, number), with_kwargs=True)
            for number, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.recorded = {}

    def _record(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.recorded[number] = kwargs["hidden_states"], kwargs["position_embeddings"]

    def forward(
        self,
        input_ids: torch.Tensor,
        prefix_lengths: torch.Tensor,
        marks: torch.Tensor,
        objects: Sequence[KnownObjects | None],
    ) -> dict[str, torch.Tensor]:
        """Losses of the forward pass just made; all zero where no row has known objects.

        Args:
            input_ids: (B, S), each row with one image. So are the next two from `BranchCollator`.
            prefix_lengths: (B,).
            marks: (n, 3), row of the batch, position and kind of every noun.
            objects: of each row of the batch.
        """
        recorded, self.recorded = self.recorded, {}
        known = [(row, each) for row, each in enumerate(objects) if each is not None]
        device = input_ids.device
        if not known:
            return {name: torch.zeros((), device=device) for name in GUIDANCE_WEIGHT}
        rows = torch.tensor([row for row, _ in known], device=device)  # (G,)
        tokens = torch.stack([each.tokens for _, each in known]).to(device)  # (G, T, kinds, CHANNELS)
        classes = torch.tensor([each.scene_class for _, each in known], device=device)
        first = (input_ids[rows] == self.image_token_id).int().argmax(1)
        visual = first[:, None] + torch.arange(tokens.shape[1], device=device)  # (G, T), positions

        place = torch.full((len(input_ids),), -1, device=device).scatter(0, rows, torch.arange(len(rows), device=device))
        noun_rows, positions, kinds = marks[place[marks[:, 0]] >= 0].unbind(1)  # (n,) each
        of = place[noun_rows]  # (n,), index among the known
        counts = torch.stack([each.counts for _, each in known]).to(device)[of, kinds]
        boxes = torch.stack([each.boxes for _, each in known]).to(device)[of, kinds]

        seen = torch.zeros((), device=device)
        for head, number in zip(self.seen, ATTENTION_LAYERS, strict=True):
            parts = losses(head, recorded[number][0][rows[:, None], visual], tokens, classes)
            seen = seen + sum(LOSS_WEIGHT[name] * value for name, value in parts.items())
        if not len(of):
            return {name: seen if name == "seen" else torch.zeros((), device=device) for name in GUIDANCE_WEIGHT}
        held = tokens[of, :, kinds, 1]  # (n, T): how many of the noun's objects have their center in each visual token
        states = recorded[READ_LAYER][0][noun_rows, positions]  # (n, D)
        result = {
            "seen": seen,
            "attention": self._attention_loss(recorded, noun_rows, positions, held, visual[of], prefix_lengths[noun_rows]),
            "counted": F.cross_entropy(self.counted(states), counts),
        }
        single = counts == 1
        if single.any():
            x, y = ((boxes[single, :2] + boxes[single, 2:]) / 2).long().unbind(1)
            x_scores, y_scores = self.placed(states[single]).split(BINS, dim=1)
            placed = (F.cross_entropy(x_scores, x) + F.cross_entropy(y_scores, y)) / 2
            return result | {"placed": placed, "boxed": F.l1_loss(self.boxed(states[single]), boxes[single])}
        return result | {"placed": torch.zeros((), device=device), "boxed": torch.zeros((), device=device)}

    def _attention_loss(
        self,
        recorded: dict[int, tuple[torch.Tensor, Any]],
        rows: torch.Tensor,
        positions: torch.Tensor,
        held: torch.Tensor,
        visual: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-entropy of the nouns' attention over the shared prefix, less its minimum.

        The goal of one head is to share its attention between the objects and the first token, so that the share of the
        first token says how many there are. The goal of the other is the objects alone, or the first token if there is none.
        """
        prefix = int(lengths.max())
        goal = torch.zeros(len(rows), 2, prefix, device=held.device)
        goal.scatter_(2, visual[:, None].expand(-1, 2, -1), held[:, None].expand(-1, 2, -1))
        goal[:, 0, 0] = 1
        goal[:, 1, 0] = (held.sum(1) == 0).float()
        goal = goal / goal.sum(-1, keepdim=True)
        least = -torch.special.xlogy(goal, goal).sum(-1).mean()
        beyond = torch.arange(prefix, device=held.device) >= lengths[:, None]  # (n, P)
        total = torch.zeros((), device=held.device)
        for number in ATTENTION_LAYERS:
            attention = self.layers[number]
            states, (cosine, sine) = recorded[number]
            size = attention.head_dim
            cosine, sine = (table.expand(len(states), -1, -1)[:, :, None] for table in (cosine, sine))  # (B, S, 1, d)
            queries = F.linear(states[rows, positions], attention.q_proj.weight[: 2 * size]).unflatten(-1, (2, size))
            keys = F.linear(states[:, :prefix], attention.k_proj.weight[: 2 * size]).unflatten(-1, (2, size))
            queries = queries * cosine[rows, positions] + rotate_half(queries) * sine[rows, positions]
            keys = keys * cosine[:, :prefix] + rotate_half(keys) * sine[:, :prefix]
            scores = torch.einsum("nhd,nkhd->nhk", queries, keys[rows]) * size**-0.5
            scores = scores.masked_fill(beyond[:, None], torch.finfo(scores.dtype).min)
            total = total - (goal * scores.log_softmax(-1)).sum(-1).mean() - least
        return total
