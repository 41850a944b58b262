"""FSDP1 hands out flat pieces: refused, with an error that names FSDP2."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import hf_efcp
from hf_efcp import OptionError
from tests.distributed.processes import run


def refused(rank, cases=(True, False)):
    for original in cases:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        before = hf_efcp.create_optimizer("efcp_sparse_mfac", model.parameters(), lr=0.1)
        model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(OptionError, match=r"FSDP1 hands it flat pieces: use FSDP2"):
            hf_efcp.create_optimizer("efcp_sparse_mfac", model.parameters(), lr=0.1)
        if original:  # the parameters are the same objects, and their pieces are found at the first step
            model(torch.ones(2, 8)).sum().backward()
            with pytest.raises(OptionError, match=r"FSDP1 hands it flat pieces: use FSDP2"):
                before.step()


@pytest.mark.slow
def test_pieces_are_refused():
    run(2, refused)


@pytest.mark.parametrize("original", [True, False])
def test_of_one_process_too(original, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused(0, [original])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", hf_efcp.list_optimizers())
def test_accelerate_refuses_before_training(name):
    """Accelerate runs FSDP on accelerators only: its state is told so by hand."""
    accelerator = Accelerator(cpu=True)
    optimizer = hf_efcp.create_optimizer(name, nn.Linear(4, 4).parameters(), lr=0.1)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(OptionError, match=f"fsdp_version=1: {type(optimizer).__name__} .* use fsdp_version=2 or DDP"):
        accelerator.prepare_optimizer(optimizer)
    accelerator.prepare_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    accelerator.prepare_optimizer(optimizer)
