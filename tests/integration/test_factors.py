"""comm="factors" under Accelerate and Trainer: DDP gets its hook by itself; clipping and fp16 are refused."""

import os

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.integrations.arguments import EFCPTrainingArguments
from tests.distributed.processes import run
from tests.reference import relative

STEPS = 6


def data(step):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)).double()


def environment(rank, processes):
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )


def with_accelerate(rank, processes, comm, folder=None):
    """In either order, with accumulation, and with a state saved and loaded half-way."""
    if processes > 1:
        environment(rank, processes)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    options = {**hf_efcp.optim_defaults("efcp_lowrank_mfac"), "error_dtype": None, "window_size": 4, "rank": 2, "comm": comm}
    options["metric"] = "none"  # with factors D is that of the step before, and contains the processes' noise
    optimizer = hf_efcp.create_optimizer("efcp_lowrank_mfac", model, lr=0.02, **options)
    if folder is None:
        optimizer, model = accelerator.prepare(optimizer, model)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        for part in data(step).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(part.chunk(processes)[rank]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        if folder is not None and step == STEPS // 2:
            accelerator.save_state(folder)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            accelerator.wait_for_everyone()  # save_state does not wait for the first process's files
            accelerator.load_state(folder)
    efcp = optimizer.optimizer.state_dict()["efcp"]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), efcp.get("sharded", {}).get("errors")


def both(rank, folder):
    return with_accelerate(rank, 2, "factors"), with_accelerate(rank, 2, "factors", folder)


def test_accelerate_gives_ddp_the_hook(tmp_path):
    alone, _ = with_accelerate(0, 1, "gradients")
    for found in run(2, both, tmp_path):
        for params, errors in found:
            assert errors == 2
            assert relative(params, alone) <= 1e-9


@pytest.mark.parametrize("arguments", [TrainingArguments, EFCPTrainingArguments])
def test_clipping_and_fp16_are_refused_before_training(arguments, tmp_path):
    common = {"output_dir": str(tmp_path), "optim": "efcp_lowrank_ggt", "optim_args": "comm=factors", "use_cpu": True}
    with pytest.raises(OptionError, match=r"comm='factors' with max_grad_norm=1\.0.* set max_grad_norm=0"):
        arguments(**common)
    args = arguments(**common, max_grad_norm=0)
    args.max_grad_norm = 0.5  # changed afterwards
    with pytest.raises(OptionError, match=r"max_grad_norm=0\.5"):
        Trainer(model=net(), args=args).create_optimizer()
    args.max_grad_norm, args.fp16 = 0, True
    with pytest.raises(OptionError, match="with fp16=True"):
        Trainer(model=net(), args=args).create_optimizer()


def test_other_optimizers_do_not_have_it(tmp_path):
    with pytest.raises(OptionError, match=r"no option of efcp_sparse_mfac, but of efcp_lowrank_mfac, efcp_lowrank_ggt"):
        TrainingArguments(str(tmp_path), optim="efcp_sparse_mfac", optim_args="comm=factors", use_cpu=True)
    with pytest.raises(OptionError, match="comm='facts': must be gradients or factors"):
        hf_efcp.LowRankMFAC(net().parameters(), lr=0.1, comm="facts")
