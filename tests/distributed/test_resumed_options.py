"""Several processes resume after the --optim defaults have changed: with the checkpoint's options, which one of them logs."""

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hf_efcp
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_sharding import problem
from tests.distributed.test_sharding import train as train_ddp
from tests.optim.helpers import differences

NAME = "efcp_lowrank_mfac"
EARLIER = {"window_size": 32, "update_rms": 0.5, "error_dtype": torch.bfloat16}
LATER = {"window_size": 16, "rank": 8, "error_dtype": torch.float32, "damping": 0.1, "metric": "factored"}
HALF, END = 5, 9


def start(params, measured=EARLIER, **options):
    hf_efcp.LowRankMFAC.measured = measured
    return hf_efcp.create_optimizer(NAME, params, lr=0.01, **hf_efcp.optim_defaults(NAME, **options))


def lines():
    """What is logged from now on."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_efcp").addHandler(handler)
    return said


def state(optimizer):
    return {f"{i}.{n}": fsdp2.full(t) for i, entry in optimizer.state_dict()["state"].items() for n, t in entry.items()}


def shards(rank, folder):
    """The parameters at the end, whether saved and resumed or not."""
    params, said = problem(), lines()
    optimizer = start(params)
    train_ddp(optimizer, params, 0, HALF)
    optimizer.save_shards(folder)
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in params]
    train_ddp(optimizer, params, HALF, END)

    others = problem()
    other = start(others, LATER)
    train_ddp(other, others, 0, 1)  # a state of the new options, which must not survive
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    other.shard_folder = folder
    other.load_state_dict(saved)
    own = other.state_dict()
    other.load_state_dict(own)  # as Accelerate's prepare does
    train_ddp(other, others, HALF, END)
    assert other.sharding_plan() != "not sharded"
    return [i for i, p in enumerate(params) if not torch.equal(p, others[i])], other.options == optimizer.options, said


def test_shards_of_ddp(tmp_path):
    first, second = run(2, shards, tmp_path / "shards")
    taken = "error_dtype=bfloat16, window_size=32, update_rms=0.5, metric=none, damping=1e-06, rank=4"
    assert first == ([], True, [f"LowRankMFAC: options from the checkpoint: {taken}"])
    assert second == ([], True, [])


def given_otherwise(rank, folder):
    """A refused load, where the option that differs shapes the state."""
    params = problem()
    optimizer = start(params)
    train_ddp(optimizer, params, 0, HALF)
    optimizer.save_shards(folder)
    other = start(problem(), window_size=6)
    other.shard_folder = folder
    try:
        other.load_state_dict(optimizer.state_dict())
    except hf_efcp.OptionError as error:
        return str(error)


def test_a_given_window_is_refused_on_every_process(tmp_path):
    message = "checkpoint was made with window_size=32, this optimizer has window_size=6"
    assert run(2, given_otherwise, tmp_path / "shards") == [message, message]


def save_divided(rank, folder):
    module = fsdp2.divided()
    params = list(module.parameters())
    optimizer = start(params, scope="layer")
    fsdp2.train(optimizer, params, 0, HALF)
    dcp.save({"optimizer": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=folder)
    return state(optimizer)


def load_divided(rank, folder):
    said = lines()
    module = fsdp2.divided() if dist.is_initialized() else fsdp2.Parameters()
    optimizer = start(list(module.parameters()), LATER)
    optimizer.choose_as(folder)
    saved = {"optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.load(saved, checkpoint_id=folder)
    set_optimizer_state_dict(module, optimizer, saved["optimizer"])
    return state(optimizer), optimizer.options.damping, said


@pytest.mark.parametrize("processes", [2, 3])
def test_the_tensors_of_fsdp2_tell_what_shapes_them(processes, tmp_path):
    saved = run(2, save_divided, tmp_path / "saved")[0]
    first, *rest = run(processes, load_divided, tmp_path / "saved")
    (line,) = first[2]
    assert line.startswith(
        "LowRankMFAC: options from the checkpoint: error_dtype=bfloat16, window_size=32, scope=layer, metric=none"
    )
    assert all(said == [] for *_, said in rest)
    for loaded, damping, _ in (first, *rest):
        assert differences(saved, loaded) == []
        assert damping == 0.1  # no tensor tells it: who resumes gives it
