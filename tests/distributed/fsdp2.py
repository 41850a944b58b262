"""FSDP2 on gloo processes: the parameters of a test problem, divided, with the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.distributed.test_sharding import STEPS, problem

HSDP = "two replicas of two shards"
BF16 = {"error_dtype": "bf16", "window_dtype": "bf16", "momentum": 0.5}
# Its stand-in for a CUDA stream has no events there; our steps need none.
runs_models = pytest.mark.skipif(torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 runs no model on CPUs")


class Parameters(nn.Module):
    """The test problem as a module; FSDP2 divides no scalar."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.tensors = nn.ParameterList([p for p in problem(dtype) if p.ndim])


def divided(dtype=torch.float64, layout=None):
    """The module after fully_shard, on as many processes as there are; HSDP: on a 2 x 2 mesh."""
    module = Parameters(dtype)
    if layout == HSDP:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(module, mesh=mesh)


def gradients(params, step, perturbed=None):
    """Those of tests.distributed.test_sharding, divided as the parameters are; `perturbed`: 1 ulp towards that number."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        whole = full(p)
        noise = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        g = (0.1 * noise + 0.05 * whole.double()).to(p.dtype)
        if perturbed is not None:
            g = torch.nextafter(g, torch.full_like(g, perturbed))
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g


def train(optimizer, params, start=0, stop=STEPS, **options):
    for step in range(start, stop):
        gradients(params, step, **options)
        optimizer.step()


def full(t):
    """The whole of a DTensor; collective."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def flat(params):
    return torch.cat([full(p).double().flatten() for p in params])
