"""Zeros hold during training, with every optimizer of the package and torch's AdamW; M-FAC's window knows nothing of them."""

import pytest
import torch
from torch import nn

import hf_efcp
from hf_efcp.pruning import prune
from tests.reference import NAMES, few, known_to, names, window


def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    x = torch.randn(64, 12, dtype=torch.float64)
    y = torch.randn(64, 8, dtype=torch.float64)
    return model, prune(model, [x], 0.6), x, y


def train(model, optimizer, x, y, steps=6):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [*few(NAMES, {names(windowed=w)[0] for w in (True, False)}.__contains__), "adamw"])
def test_zeros_hold(name):
    model, masks, x, y = pruned()
    before = [p.detach().clone() for p in model.parameters()]
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = hf_efcp.create_optimizer(name, model, lr=1e-2, preset="measured", **known_to(name, {"window_size": 4}))
    masks.hold(optimizer)
    losses = train(model, optimizer, x, y)
    assert losses[-1] < losses[0]
    assert masks.are_zero()
    kept, moved = masks.keep["0.weight"], model[0].weight != before[0]
    assert moved.any() and not moved[~kept].any()
    masks.release()
    train(model, optimizer, x, y, 1)
    assert not masks.are_zero()


def test_an_optimizer_that_accelerate_has_wrapped():
    from accelerate import Accelerator

    model, masks, x, y = pruned()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    masks.hold(optimizer)
    train(model, optimizer, x, y)
    assert masks.are_zero()


@pytest.mark.parametrize("name", names(family="mfac"))
def test_a_window_has_nothing_where_weights_are_pruned(name):
    model, masks, x, y = pruned()
    optimizer = hf_efcp.create_optimizer(name, model, lr=1e-2, window_size=4)
    masks.hold(optimizer)
    train(model, optimizer, x, y)
    if hf_efcp.registry.get_optimizer_info(name).compression != "low rank":  # P Q^T has no zeros
        columns = torch.cat(
            [masks.keep["0.weight"].flatten(), torch.ones(16, dtype=torch.bool), masks.keep["2.weight"].flatten()]
        )
        assert not window(optimizer, list(model.parameters()))[:, : len(columns)][:, ~columns].any()
    assert masks.are_zero()
