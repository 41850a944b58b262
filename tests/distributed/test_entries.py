"""Entries of `optimizer.state` that are replaced, zeroed and popped on several processes, each of which has its own."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import fsdp2, test_sharding
from tests.distributed.processes import run
from tests.optim.entry_runs import KINDS
from tests.optim.helpers import same
from tests.reference import IN_TURN, names, relative

OPTIONS = {"momentum": 0.5, "metric": "factored", "error_dtype": "bf16"}
PLACEMENTS = ["DDP", "FSDP2"]


def start(placement, name, steps=4):
    """An optimizer, its parameters and what trains them."""
    if placement == "DDP":
        params = test_sharding.problem(torch.float32)
        optimizer, train = test_sharding.build(name, params, process_group=dist.group.WORLD, **OPTIONS), test_sharding.train
    else:
        params = list(fsdp2.divided(torch.float32).parameters())
        optimizer, train = test_sharding.build(name, params, **OPTIONS), fsdp2.train
    train(optimizer, params, 0, steps)
    return optimizer, params, train


def changed(rank, placement):
    """Where a run with a change differs from one with the same change written in place."""
    found = []
    for name in IN_TURN:
        for kind in ("replaced by copies", "zeros", "popped"):
            for which in (slice(1, 2), slice(None)):
                runs = []
                for change in KINDS[kind]:
                    optimizer, params, train = start(placement, name)
                    change(optimizer.state, [p for p in params[which] if p in optimizer.state])
                    train(optimizer, params, 4, 9)
                    runs.append([fsdp2.full(p) for p in params])
                if not all(same(p, q) and p.isfinite().all() for p, q in zip(*runs, strict=True)):
                    found.append((name, kind, which))
        optimizer, params, train = start(placement, name)
        optimizer.state.clear()
        train(optimizer, params, 4, 6)
        found += [] if all(fsdp2.full(p).isfinite().all() for p in params) else [(name, "cleared")]
    return found


@pytest.mark.parametrize("placement", [PLACEMENTS[0], pytest.param(PLACEMENTS[1], marks=pytest.mark.slow)])
def test_what_is_put_into_the_state_is_the_state(placement):
    assert run(2, changed, placement) == [[], []]


def of_one_process(name, kind, which):
    """The run of `changed_as_one` on one process."""
    params = test_sharding.problem()
    params = params[:-1]  # FSDP2 divides no scalar
    optimizer = test_sharding.build(name, params, window_momentum=0.5)
    test_sharding.train(optimizer, params, 0, 7)
    KINDS[kind][0](optimizer.state, params[which])
    test_sharding.train(optimizer, params, 7, 9)
    return test_sharding.flat(params)


def changed_as_one(rank, placement):
    """How far a run is from that of one process, after a change that perhaps one process alone sees; and K from G G^T there."""
    found = {}
    for name in names(windowed=True):
        for kind, which in (("zeros", slice(0, 1)), ("popped", slice(4, 5))):
            if placement == "DDP":
                params = test_sharding.problem()[:-1]
                optimizer = test_sharding.build(name, params, process_group=dist.group.WORLD, window_momentum=0.5)
                train = test_sharding.train
            else:
                params, train = list(fsdp2.divided().parameters()), fsdp2.train
                optimizer = test_sharding.build(name, params, window_momentum=0.5)
            train(optimizer, params, 0, 7)
            KINDS[kind][0](optimizer.state, [p for p in params[which] if p in optimizer.state])
            train(optimizer, params, 7, 9)
            here = torch.cat([fsdp2.full(p).flatten() for p in params])
            found[name, kind, str(which)] = relative(here, of_one_process(name, kind, which))
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_change_has_the_effect_that_it_has_on_one_process(placement):
    for found in run(2, changed_as_one, placement):
        assert max(found.values()) < 1e-9, found


def resumed(rank, folder):
    """Under DDP, with the state elsewhere when it is saved, and a wrapper's entries in it."""
    found = []
    for name in IN_TURN:
        optimizer, params, train = start("DDP", name)
        KINDS["replaced by copies"][0](optimizer.state, [p for p in params if p in optimizer.state])
        for i, p in enumerate(params):
            optimizer.state[p]["slow"] = torch.full((2,), float(i))
        optimizer.state["wrapper"] = {"step": 3}
        optimizer.save_shards(folder / name)
        saved = optimizer.state_dict()
        other, others, _ = start("DDP", name, 0)
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q)
        other.shard_folder = folder / name
        other.load_state_dict(saved)
        kept = [float(other.state[p]["slow"][0]) for p in others] == list(range(len(params)))
        train(optimizer, params, 4, 7)
        train(other, others, 4, 7)
        alike = all(same(p, q) for p, q in zip(params, others, strict=True))
        found += [] if alike and kept and other.state["wrapper"] == {"step": 3} else [name]
    return found


def test_a_state_that_is_elsewhere_is_saved_and_what_is_not_ours_too(tmp_path):
    assert run(2, resumed, tmp_path) == [[], []]


def saved_as_dtensors(rank):
    """Under FSDP2 a state that is elsewhere, or has lost an entry, is saved as ever: DTensors of the whole shape."""
    found = []
    for name in IN_TURN:
        optimizer, params, _ = start("FSDP2", name)
        expected = optimizer.state_dict()["state"]
        KINDS["replaced by copies"][0](optimizer.state, params)
        gone = optimizer.state[params[-1]].popitem()[0]
        saved = optimizer.state_dict()["state"]
        for i, entry in expected.items():
            for key, t in entry.items():
                there, lost = saved[i][key], i == len(params) - 1 and key == gone
                alike = type(there) is type(t) and there.shape == t.shape
                equal = not fsdp2.full(there).any() if lost else same(fsdp2.full(there), fsdp2.full(t))
                found += [] if alike and equal else [(name, i, key)]
    return found


def test_fsdp2_saves_dtensors_of_a_state_that_is_elsewhere():
    assert run(2, saved_as_dtensors) == [[], []]
