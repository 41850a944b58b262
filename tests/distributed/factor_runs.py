"""A model, its batches and its training loop for comm="factors", on one process or on several under DDP."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_efcp

STEPS, BATCH, M, RANK = 20, 24, 6, 2


class Net(nn.Module):
    """An embedding that is divided by rows, matrices alike and not, a matrix too thin to compress, a convolution, 1-D tensors."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(300, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 16)])
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 9, 3)
        self.head = nn.Linear(9, 2)
        self.to(dtype)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.conv(self.norm(x).mT).amax(-1)).square().mean()


def batch(step, rank=0, processes=1, parts=1, part=0):
    """This process's share of a step's batch, or one of its parts."""
    ids = torch.randint(300, (BATCH, 5), generator=torch.Generator().manual_seed(step))
    return ids.chunk(processes)[rank].chunk(parts)[part]


def build(name, params, **options):
    return hf_efcp.create_optimizer(name, params, **{"lr": 0.005, "window_size": M, "rank": RANK, "update_rms": 0.3, **options})


def start(name, comm="factors", group=True, **options):
    """An optimizer and a model, wrapped where there are several processes."""
    model = Net()
    several = dist.is_initialized()
    optimizer = build(name, model, comm=comm, process_group=dist.group.WORLD if several and group else None, **options)
    if several:
        model = DistributedDataParallel(model, bucket_cap_mb=0.01)
        if comm == "factors":
            optimizer.register_comm_hook(model)
    return optimizer, model


def train(optimizer, model, begin=0, end=STEPS, accumulate=1, rank=None):
    several = isinstance(model, DistributedDataParallel)
    place = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    for step in range(begin, end):
        optimizer.zero_grad()
        for part in range(accumulate):
            last = part == accumulate - 1
            with contextlib.nullcontext() if last or not several else model.no_sync():
                (model(batch(step, *place, accumulate, part)) / accumulate).backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
