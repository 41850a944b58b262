"""Sharded checkpoints of hf_efcp 0.1 load, on as many processes and on others. tests/data/write_checkpoints.py wrote them."""

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.data.write_checkpoints import CONTINUED, DISTRIBUTED, LARGE, RUNS, SAVED, Alone, flat, put, read
from tests.distributed.processes import run
from tests.reference import relative

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_0.1"
BOUND = 1e-4  # of an update, relative, since BLAS differs between CPUs


def resumed(file):
    """A run that has loaded the checkpoint, and the parameters of then."""
    saved, (name, options) = read(FOLDER / file / "run.pt.gz"), DISTRIBUTED[file]
    several = dist.is_initialized()
    run = RUNS[file](name, options) if several or file == "factors" else Alone(name, options, LARGE)
    if file == "fsdp2":
        state = {"optimizer": get_optimizer_state_dict(run.module, run.optimizer)}
        dcp.load(state, checkpoint_id=FOLDER / file / "dcp")
        set_optimizer_state_dict(run.module, run.optimizer, state["optimizer"])
    else:
        run.optimizer.shard_folder = FOLDER / file / "efcp_optim"
        run.optimizer.load_state_dict(saved["optimizer"])
    put(run.params, saved["before"])
    return run, saved["before"]


def continued(rank, files):
    """The update that the further steps make, and that of a fresh optimizer."""
    updates = {}
    for file in files:
        run, before = resumed(file)
        run.train(SAVED, SAVED + CONTINUED)
        fresh = type(run)(*DISTRIBUTED[file], *([LARGE] if type(run) is Alone else []))
        put(fresh.params, before)
        fresh.train(SAVED, SAVED + CONTINUED)
        updates[file] = flat(run.params) - before, flat(fresh.params) - before
    return updates


def check(updates):
    for file, (update, fresh) in updates.items():
        saved = read(FOLDER / file / "run.pt.gz")
        expected = saved["after"] - saved["before"]
        assert relative(update, expected) <= BOUND, file
        assert relative(fresh, expected) > 3 * BOUND, file  # a state that is lost would be seen


def test_old_checkpoints_of_two_processes_go_on():
    for updates in run(2, continued, tuple(DISTRIBUTED)):
        assert updates.keys() == DISTRIBUTED.keys()
        check(updates)


def test_old_checkpoints_of_two_processes_go_on_as_one():
    check(continued(0, ("ddp_shards", "factors")))


@pytest.mark.parametrize("processes", [3])
def test_old_checkpoints_of_two_processes_go_on_as_three(processes):
    for updates in run(processes, continued, ("ddp_shards", "fsdp2")):
        check(updates)
