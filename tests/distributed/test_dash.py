"""DASH on two processes, which divide matrices between blocks and never through one."""

import pytest
import torch.distributed as dist

from hf_efcp import DASH, OptionError
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_sharding import problem
from tests.reference import relative

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "inverse_root_interval": 3, "root_eps": 1e-6}
BLOCKS = {"eigenvectors": {"block_size": 4}, "newton, momentum": {"block_size": 7, "root_method": "newton", "momentum": 0.5}}
# Rows of FSDP2's matrices on each of two processes are even numbers, or one process has them all.
CUT = {"block_size": 1}


def together(rank):
    results = {}
    for kind, options in BLOCKS.items():
        params = problem()
        optimizer = DASH(params, process_group=dist.group.WORLD, **OPTIONS, **options)
        fsdp2.train(optimizer, params)
        results[kind] = fsdp2.flat(params), sum(optimizer.memory_footprint().values())
    params = list(fsdp2.divided().parameters())
    optimizer = DASH(params, shard="auto", **OPTIONS, **CUT)
    fsdp2.train(optimizer, params)
    results["FSDP2"] = fsdp2.flat(params), 0
    params = list(fsdp2.divided().parameters())
    try:
        DASH(params, shard="auto", **OPTIONS, block_size=1000).setup()
    except OptionError as error:
        results["refused"] = str(error)
    return results


@pytest.fixture(scope="module")
def everybody():
    return run(2, together)


@pytest.mark.parametrize("kind", BLOCKS)
def test_two_processes_train_as_one(kind, everybody):
    params = problem()
    optimizer = DASH(params, **OPTIONS, **BLOCKS[kind])
    fsdp2.train(optimizer, params)
    for results in everybody:
        theirs, held = results[kind]
        assert relative(theirs, fsdp2.flat(params)) < 1e-9
        assert held < 0.75 * sum(optimizer.memory_footprint().values())


def test_fsdp2_trains_as_one_process_where_it_cuts_no_block(everybody):
    params = list(fsdp2.Parameters().parameters())
    fsdp2.train(DASH(params, **OPTIONS, **CUT), params)
    for results in everybody:
        assert relative(results["FSDP2"][0], fsdp2.flat(params)) < 1e-9


def test_a_block_that_fsdp2_would_cut_is_refused_by_name(everybody):
    for results in everybody:
        assert "would be cut inside a block of" in results["refused"] and "which blocks have to divide" in results["refused"]
