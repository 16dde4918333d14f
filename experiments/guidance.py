"""Teaches a decoder where to look: losses beside that of the answers, thrown away after training.

From nothing, a decoder takes long to find out that the noun in a question stands for certain visual tokens, and learns
nothing else about objects before. Linear read-outs of the visual tokens therefore ask what stands there, as the encoder was
asked. At every noun of a question, two heads of the same layers are shown which visual tokens hold such objects, and
read-outs a little deeper ask how many there are and, of a single one, where.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from mfrsvlm.experiments.dataset import CANVAS
from mfrsvlm.experiments.encoder import LOSS_WEIGHT, TokenHeads, losses, object_table, token_targets
from mfrsvlm.scenes import CLASSES, KINDS, Scene


ATTENTION_LAYERS, READ_LAYER = (1, 2), 3  # of six
NUM_COUNTS = 10
BINS = 16  # along each side of the image


class Guidance(nn.Module):
    """The losses of one decoder.

    Args:
        model: an MF-RSVLM with at least five decoder layers; what goes into their attention is listened to.
        scenes: all training scenes.
        first: position of the first visual token in every prompt.
        prefix: length of what all prompts share.
    """

    def __init__(self, model: Any, scenes: Sequence[Scene], first: int, prefix: int) -> None:
        super().__init__()
        config = model.config
        width, side = config.text_config.hidden_size, config.tokens_per_side
        self.first, self.prefix = first, prefix
        self.seen = nn.ModuleList(TokenHeads(width, side) for _ in ATTENTION_LAYERS)
        self.counted = nn.Linear(width, NUM_COUNTS)
        self.placed = nn.Linear(width, 2 * BINS)
        self.boxed = nn.Linear(width, 4)
        tables = [object_table(scene) for scene in scenes]
        self.targets = np.stack([token_targets(table, 0, 0, CANVAS, side) for table in tables])  # see `token_targets`
        self.classes = torch.tensor([list(CLASSES).index(scene.scene_class) for scene in scenes])
        self.counts = torch.tensor([[scene.counts[kind] for kind in KINDS] for scene in scenes]).clamp(max=NUM_COUNTS - 1)
        self.boxes = torch.full((len(scenes), len(KINDS), 4), torch.nan)  # of single objects, in bins
        for boxes, counts, table in zip(self.boxes, self.counts, tables, strict=True):
            for kind in (counts == 1).nonzero().flatten().tolist():
                x, y, w, h = table[table[:, 0] == kind][0, 1:] * BINS / CANVAS
                boxes[kind] = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        self.layers = {number: model.model.language_model.layers[number].self_attn for number in ATTENTION_LAYERS}
        self.heard: dict[int, tuple[torch.Tensor, Any]] = {}
        self.hooks = [
            model.model.language_model.layers[number].self_attn.register_forward_pre_hook(
                self._listen(number), with_kwargs=True
            )
            for number in (*ATTENTION_LAYERS, READ_LAYER)
        ]

    def stop(self) -> None:
        """Listens no longer."""
        for hook in self.hooks:
            hook.remove()

    def _listen(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.heard[number] = kwargs["hidden_states"], kwargs["position_embeddings"]

        return hook

    def forward(self, scenes: Sequence[int], nouns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of the forward pass just made.

        Args:
            scenes: index of the scene of every row of the batch.
            nouns: (n, 3) row of the batch, position and index of the kind of every noun.
        """
        rows, positions, kinds = nouns.unbind(1)
        chosen = torch.as_tensor(scenes)
        targets = torch.from_numpy(self.targets[scenes])  # (B, T, kinds, CHANNELS)
        counts, boxes = self.counts[chosen[rows], kinds], self.boxes[chosen[rows], kinds]
        seen = torch.zeros(())
        for head, number in zip(self.seen, ATTENTION_LAYERS, strict=True):
            visual = self.heard[number][0][:, self.first : self.first + targets.shape[1]]  # (B, T, D)
            parts = losses(head, visual, targets, self.classes[chosen])
            seen = seen + sum(LOSS_WEIGHT[name] * value for name, value in parts.items())
        held = targets[rows, :, kinds, 1]  # (n, T): how many of the noun's objects have their centre in each visual token
        states = self.heard[READ_LAYER][0][rows, positions]  # (n, D)
        single = counts == 1
        x, y = ((boxes[single, :2] + boxes[single, 2:]) / 2).long().unbind(1)
        x_scores, y_scores = self.placed(states[single]).split(BINS, dim=1)
        return {
            "seen": seen,
            "attention": self._attention_loss(rows, positions, held),
            "counted": F.cross_entropy(self.counted(states), counts),
            "placed": (F.cross_entropy(x_scores, x) + F.cross_entropy(y_scores, y)) / 2,
            "boxed": F.l1_loss(self.boxed(states[single]), boxes[single]),
        }

    def _attention_loss(self, rows: torch.Tensor, positions: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of attention over the shared prefix, less the least it can be.

        One head shall share its attention between the objects and `<s>`, so that the share of `<s>` says how many there
        are; the other shall give all to the objects, and to `<s>` only if there is none.
        """
        goal = torch.zeros(len(rows), 2, self.prefix)
        goal[:, :, self.first : self.first + held.shape[1]] = held[:, None]
        goal[:, 0, 0] = 1
        goal[:, 1, 0] = (held.sum(1) == 0).float()
        goal = goal / goal.sum(-1, keepdim=True)
        least = -torch.special.xlogy(goal, goal).sum(-1).mean()
        total = torch.zeros(())
        for number, attention in self.layers.items():
            states, (cosine, sine) = self.heard[number]
            size = attention.head_dim
            cosine, sine = (table.expand(len(states), -1, -1)[:, :, None] for table in (cosine, sine))  # (B, S, 1, d)
            queries = F.linear(states[rows, positions], attention.q_proj.weight[: 2 * size]).unflatten(-1, (2, size))
            keys = F.linear(states[:, : self.prefix], attention.k_proj.weight[: 2 * size]).unflatten(-1, (2, size))
            queries = queries * cosine[rows, positions] + rotate_half(queries) * sine[rows, positions]
            keys = keys * cosine[:, : self.prefix] + rotate_half(keys) * sine[:, : self.prefix]
            scores = torch.einsum("nhd,nkhd->nhk", queries, keys[rows]) * size**-0.5
            total = total - (goal * scores.log_softmax(-1)).sum(-1).mean() - least
        return total
