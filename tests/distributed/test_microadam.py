"""MicroAdam on two processes, FSDP2 among them: rows are divided, vectors whole; in four bits too they store what one stores."""

import pytest
import torch
import torch.distributed as dist

from hf_efcp import MicroAdam
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_sharding import problem
from tests.reference import relative

OPTIONS = {"lr": 0.02, "window_size": 4, "density": 0.2, "block_size": 8, "weight_decay": 0.1}
EXACT = {"window_dtype": None, "error_format": "plain", "alpha": 0.2}
FORMATS = {"exact": EXACT, "as in the paper": {}, "int8": {"error_format": "int8"}}


def together(rank):
    results = {}
    for kind, options in FORMATS.items():
        params = problem()
        optimizer = MicroAdam(params, process_group=dist.group.WORLD, **OPTIONS, **options)
        fsdp2.train(optimizer, params)
        results[kind, "DDP"] = fsdp2.flat(params), sum(optimizer.memory_footprint().values()), {}
        params = list(fsdp2.divided().parameters())
        optimizer = MicroAdam(params, shard="auto", **OPTIONS, **options)
        assert optimizer.estimate_footprint(2, fsdp=True) == optimizer.memory_footprint() or rank
        fsdp2.train(optimizer, params)
        entries = optimizer.state_dict()["state"]
        state = {(i, k): fsdp2.full(t) for i, e in entries.items() for k, t in e.items()}
        results[kind, "FSDP2"] = fsdp2.flat(params), sum(optimizer.memory_footprint().values()), state
    return results


@pytest.fixture(scope="module")
def everybody():
    return run(2, together)


def alone(kind, params):
    optimizer = MicroAdam(params, **OPTIONS, **FORMATS[kind])
    fsdp2.train(optimizer, params)
    return optimizer


@pytest.mark.parametrize("kind", FORMATS)
def test_two_processes_train_as_one(kind, everybody):
    params = problem()
    total = sum(alone(kind, params).memory_footprint().values())
    for results in everybody:
        theirs, held, _ = results[kind, "DDP"]
        assert relative(theirs, fsdp2.flat(params)) < 1e-9
        assert held < 0.75 * total


@pytest.mark.parametrize("kind", FORMATS)
def test_fsdp2_trains_as_one_process_and_has_its_state(kind, everybody):
    params = list(fsdp2.Parameters().parameters())
    entries = alone(kind, params).state_dict()["state"]
    for results in everybody:
        theirs, _, state = results[kind, "FSDP2"]
        assert relative(theirs, fsdp2.flat(params)) < 1e-9
        for i, entry in entries.items():
            for name, t in entry.items():
                torch.testing.assert_close(state[i, name].to(t.dtype), t, rtol=1e-9, atol=1e-12)
