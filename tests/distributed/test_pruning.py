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


def pruned(rank):
    model, batches = model_and_batches()
    masks = prune(model, batches[rank :: dist.get_world_size()], 0.6, target="dense")
    return [p.detach() for p in model.parameters()], masks.keep


def test_two_processes_prune_as_one_does():
    alone, batches = model_and_batches()
    masks = prune(alone, batches, 0.6, target="dense")
    for weights, keep in run(2, pruned):
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(weights, alone.parameters(), strict=True))
        assert all(torch.equal(mask, keep[name]) for name, mask in masks.keep.items())
