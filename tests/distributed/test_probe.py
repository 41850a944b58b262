"""The figures of a probed step on two processes are those of one: DDP with shared state, FSDP2, and comm="factors"."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import factor_runs, test_sharding
from tests.distributed.fsdp2 import divided, gradients
from tests.distributed.processes import run
from tests.reference import NAMES, info, make, names

STEPS = 3
# One of each kind of method and of entries.
EXAMPLES = list({(info(name).windowed, info(name).compression): name for name in NAMES}.values())
ADAM = {"metric": "factored", "residual": "momentum", "window_momentum": 0.5, "window_size": 4, "update_rms": 0.5}
FACTORS = {"metric": "none", "residual": "feedback"}


def probed(name, params, fill, **options):
    optimizer = make(name, params, lr=0.01, **ADAM, **options)
    for t in range(STEPS):
        fill(params, t)
        optimizer.probe_next_step()
        optimizer.step()
    return optimizer.diagnostics()


def with_factors():
    name = names(family="mfac", compression="low rank")[0]
    optimizer, model = factor_runs.start(name, **FACTORS)
    factor_runs.train(optimizer, model, end=STEPS - 1)
    optimizer.probe_next_step()
    factor_runs.train(optimizer, model, STEPS - 1, STEPS)
    return optimizer.diagnostics()


def shapes_of_fsdp():
    return [p for p in test_sharding.problem() if p.ndim]


def everything(rank):
    ddp = {n: probed(n, shapes_of_fsdp(), test_sharding.gradients, process_group=dist.group.WORLD) for n in EXAMPLES}
    fsdp = {n: probed(n, list(divided().parameters()), gradients) for n in EXAMPLES}
    return {"ddp": ddp, "fsdp": fsdp, "factors": {"factors": with_factors()}}


def test_two_processes_answer_what_one_would():
    everybody = run(2, everything)
    alone = {n: probed(n, shapes_of_fsdp(), test_sharding.gradients) for n in EXAMPLES}
    expected = {"ddp": alone, "fsdp": alone, "factors": {"factors": with_factors()}}
    for placement, of_names in expected.items():
        for name, figures in of_names.items():
            mine, others = (found[placement][name] for found in everybody)
            assert mine == others
            mine, figures = ({k: v for k, v in d.items() if k != "error_share"} for d in (mine, figures))  # of one process
            assert mine == pytest.approx(figures, rel=1e-6, abs=1e-9), (placement, name)
            assert mine["cosine_update_gradient"] > 0 and torch.tensor(mine["error_norm"]).isfinite()
