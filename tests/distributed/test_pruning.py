"""Pruning on several processes: the moments are summed, and all of them get one model."""

import torch
import torch.distributed as dist
from torch import nn

from hf_efcp.pruning import prune
from tests.distributed.processes import run


def model_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    return model, [torch.randn(20 + 5 * i, 12, dtype=torch.float64) for i in range(4)]


def trained(model, masks, batches):
    """Two steps with held zeros; gradients of pruned weights are zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    masks.hold(optimizer)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(
            not p.grad[~mask].any()
            for p, mask in zip((p for p in model.parameters() if p.ndim == 2), masks.keep.values(), strict=True)
        )
        optimizer.step()
    assert masks.are_zero()


class Scored(nn.Module):
    """A layer whose outputs are to be small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(12, 8).double()

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def pruned_by_window(rank, processes):
    """Each process has every `processes`-th row of the same batches."""
    model, (_, batches) = Scored(), model_and_batches()
    rows = [x[: len(x) // 2 * 2] for x in batches]
    masks = prune(model, [{"x": x[rank::processes]} for x in rows], 0.5, method="mfac")
    return model.layer.weight.detach(), masks.keep


def pruned(rank):
    model, batches = model_and_batches()
    processes = dist.get_world_size()
    masks = prune(model, batches[rank::processes], 0.6, target="dense")
    weights = [p.detach().clone() for p in model.parameters()]
    trained(nn.parallel.DistributedDataParallel(model), masks, [x[rank::processes] for x in batches[:3:2]])
    return weights, masks.keep, [p.detach() for p in model.parameters()], pruned_by_window(rank, processes)


def test_two_processes_prune_and_train_as_one_does():
    alone, batches = model_and_batches()
    masks = prune(alone, batches, 0.6, target="dense")
    before = [p.detach().clone() for p in alone.parameters()]
    trained(alone, masks, batches[:3:2])
    weight, kept = pruned_by_window(0, 1)
    for weights, keep, after, (theirs, by_window) in run(2, pruned):
        assert (theirs - weight).abs().max() < 1e-9 and all(torch.equal(mask, by_window[name]) for name, mask in kept.items())
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(weights, before, strict=True))
        assert all(torch.equal(mask, keep[name]) for name, mask in masks.keep.items())
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(after, alone.parameters(), strict=True))
