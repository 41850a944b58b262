"""Low-bit state divided among processes: the same codes as on one, and a checkpoint for any number."""

import torch
import torch.distributed as dist

from tests.distributed.processes import run
from tests.distributed.test_sharding import build, flat, problem, train
from tests.reference import info, make, relative

NAMES = ["efcp_lowrank_mfac", "efcp_sparse_mfac", "efcp_dense_ggt"]
FORMATS = {"window_format": "low_bit", "error_format": "int4"}
HALF, END = 10, 20
BUDGET = 100_000


def start(name, group=None):
    params = problem()
    return build(name, params, process_group=group, **FORMATS), params


def save_half_way(rank, folder):
    ends = {}
    for name in NAMES:
        optimizer, params = start(name, dist.group.WORLD)
        train(optimizer, params, 0, HALF)
        optimizer.save_shards(folder / name)
        if rank == 0:
            torch.save([optimizer.state_dict(), [p.detach() for p in params]], folder / f"{name}.pt")
        plan = optimizer.sharding_plan()
        train(optimizer, params, HALF, END)
        ends[name] = flat(params), plan
        ends[name, "budget"] = within_budget(name, dist.group.WORLD)
    return ends


def within_budget(name, group=None):
    optimizer = make(name, problem(), process_group=group, memory_budget=BUDGET)
    held = sum(optimizer.memory_footprint().values())
    return optimizer.options, held, sum(optimizer.estimate_footprint(2).values())


def test_two_processes_are_one_and_one_goes_on(tmp_path):
    everybody = run(2, save_half_way, tmp_path)
    for name in NAMES:
        optimizer, params = start(name)
        train(optimizer, params, 0, HALF)
        half = {(i, k): t.clone() for i, p in enumerate(params) for k, t in optimizer.state[p].items()}
        train(optimizer, params, HALF, END)
        for theirs in everybody:
            assert "parameter 0: rank 0 rows 0-" in theirs[name][1]
            assert relative(theirs[name][0], flat(params)) <= 1e-9, name
        options, *_ = everybody[0][name, "budget"]
        for theirs in everybody:
            chosen, held, expected = theirs[name, "budget"]
            assert chosen == options and held <= expected <= BUDGET
        assert options != within_budget(name)[0]  # one process has room for less
        again, others = start(name)
        state, values = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for p, value in zip(others, values, strict=True):
            p.data.copy_(value)
        again.shard_folder = tmp_path / name
        again.load_state_dict(state)
        for (i, k), t in half.items():
            saved = again.state[others[i]][k]
            assert saved.dtype == t.dtype and saved.shape == t.shape
            if not t.is_floating_point() and info(name).compression != "low rank":  # a basis has its signs
                assert torch.equal(saved, t), (name, i, k)
        train(again, others, HALF, END)
        assert relative(flat(others), flat(params)) <= 1e-9, name
