"""One optimizer that combines Muon for the matrices between hidden states with AdamW for all other parameters."""

from collections.abc import Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Optimizes groups with `muon=True` by `torch.optim.Muon`, the others by `torch.optim.AdamW`.

    A `Trainer` can use it as a single optimizer, with one list of groups for the schedule and one state for checkpoints.
    Updates of Muon are scaled to the size of those of AdamW.

    Args:
        groups: parameter groups with `params`, `lr`, `weight_decay` and `muon`. Muon takes matrices only.
        betas: betas of AdamW.
        eps: epsilon of AdamW.

    Raises:
        ValueError: a group with `muon=True` has a parameter that is not a matrix.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        groups = [dict(group) for group in groups]
        muon = [group for group in groups if group["muon"]]
        adamw = [group for group in groups if not group["muon"]]
        self.parts: dict[bool, torch.optim.Optimizer] = {}
        if muon:
            self.parts[True] = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")
        if adamw:
            self.parts[False] = torch.optim.AdamW(adamw, betas=betas, eps=eps)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives the parts this optimizer's own groups and state."""
        for muon, part in self.parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] == muon]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts.values():
            part.step()
        return loss
