"""Muon with AdamW as one optimizer: the steps of the two of torch, and a state that can be saved."""

import copy

import pytest
import torch

from mfrsvlm.training.muon import MuonWithAdamW


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))


def groups(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [
        {"params": rest, "lr": 0.01, "weight_decay": 0.0, "muon": False},
        {"params": matrices, "lr": 0.03, "weight_decay": 0.1, "muon": True},
    ]


def step(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.linspace(-1, 1, 18).view(3, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_steps_are_those_of_torch():
    ours, theirs = make(), make()
    rest, matrices = groups(theirs)
    optimizer = MuonWithAdamW(groups(ours))
    adamw = torch.optim.AdamW(rest["params"], lr=0.01, weight_decay=0.0)
    muon = torch.optim.Muon(matrices["params"], lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda n: 0.5**n) for each in (optimizer, adamw, muon)]
    for _ in range(4):
        step(ours, optimizer)
        step(theirs, adamw, muon)
        for schedule in schedules:
            schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_saved_state_continues_as_if_it_had_not_stopped():
    model = make()
    optimizer = MuonWithAdamW(groups(model))
    step(model, optimizer)
    other = copy.deepcopy(model)
    resumed = MuonWithAdamW(groups(other))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] = 0.02
    for _ in range(2):
        step(model, optimizer)
        step(other, resumed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match="2D"):
        MuonWithAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1, "weight_decay": 0, "muon": True}])
