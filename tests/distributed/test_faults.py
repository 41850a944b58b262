"""What can differ between processes, and what they say to each other."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_efcp import OptionError
from tests.distributed.processes import run
from tests.distributed.test_sharding import build, flat, gradients, problem, train
from tests.optim.helpers import differences, snapshot
from tests.reference import IN_TURN, info


def one_gradient_not_finite(rank):
    found = {}
    for name in IN_TURN:
        params = problem()
        optimizer = build(name, params, process_group=dist.group.WORLD, momentum=0.5)
        train(optimizer, params, 0, 4)
        before = snapshot(optimizer, params, without=["skipped"])
        gradients(params, 4)
        if rank == 1:  # as when a device fails: the others' gradients are fine
            for p in params:
                p.grad.view(-1)[0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        same = differences(before, snapshot(optimizer, params, without=["skipped"]))
        train(optimizer, params, 5, 8)
        found[name] = same, optimizer.diagnostics()["skipped_steps"], flat(params)
    return found


def test_all_skip_together():
    first, second = run(2, one_gradient_not_finite)
    for name in IN_TURN:
        assert first[name][:2] == second[name][:2] == ([], 1.0), name
        assert torch.equal(first[name][2], second[name][2]), name


def missing_gradient_on_one(rank):
    params = problem()
    optimizer = build("efcp_lowrank_mfac", params, process_group=dist.group.WORLD)
    for step in range(6):
        gradients(params, step)
        if rank == 0:
            params[step % len(params)].grad = None
        optimizer.step()
    return flat(params)


def test_a_gradient_that_is_missing_on_one_process_only():
    first, second = run(2, missing_gradient_on_one)
    assert torch.equal(first, second)


def different(rank, what):
    params = problem()
    options = {"process_group": dist.group.WORLD}
    if what == "option" and rank == 1:
        options["window_size"] = 7
    if what == "shape" and rank == 1:
        params[1] = nn.Parameter(torch.zeros(12, 11, dtype=torch.float64))
    if what == "order" and rank == 1:
        params.reverse()
    if what == "number" and rank == 1:
        params.pop()
    if what == "class":
        optimizer = build(["efcp_lowrank_mfac", "efcp_sparse_mfac"][rank], params, **options)
    else:
        optimizer = build("efcp_lowrank_mfac", params, **options)
    gradients(params, 0)
    try:
        optimizer.step()
    except OptionError as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("option", "rank 0 has window_size=6, rank 1 has window_size=7"),
        ("shape", "rank 0 has group 0: a parameter (12, 10) torch.float64, rank 1 has group 0: a parameter (12, 11)"),
        ("order", "rank 0 has group 0: a parameter (130, 12) torch.float64, rank 1 has group 0: a parameter ()"),
        ("number", "rank 0 has group 0: a parameter () torch.float64, rank 1 has no more parameters"),
        ("class", "rank 0 has class LowRankMFAC, rank 1 has class SparseMFAC"),
    ],
)
def test_processes_that_differ_are_told_so_on_all_of_them(what, message):
    first, second = run(2, different, what)
    assert first == second
    assert message in first


def independent(rank):
    """Without a process group each process trains its own model."""
    params = problem()
    optimizer = build("efcp_lowrank_mfac", params)
    train(optimizer, params, rank, 4)  # not even as many steps
    return optimizer.memory_footprint(), optimizer.sharding_plan()


def test_plain_optimizers_stay_apart():
    (first, plan), (second, _) = run(2, independent)
    assert first == second
    assert plan == "not sharded"


def collectives(rank, name, options):
    """(name, bytes) of every collective of the fourth step."""
    params = problem(torch.float32)
    optimizer = build(name, params, process_group=dist.group.WORLD, **options)
    train(optimizer, params, 0, 3)
    calls, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather

    def counted(which, function):
        def call(*args, **kwargs):
            t = args[0] if which == "all_reduce" else args[1]
            calls.append((which, t.numel() * t.element_size()))
            return function(*args, **kwargs)

        return call

    dist.all_reduce, dist.all_gather = counted("all_reduce", all_reduce), counted("all_gather", all_gather)
    train(optimizer, params, 3, 4)
    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    return calls, optimizer.sharding_plan()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("efcp_sparse_mfac", {}),
        ("efcp_lowrank_ggt", {}),
        ("efcp_lowrank_mfac", {"power_iterations": 2, "scope": "layer"}),
    ],
)
def test_the_collectives_of_a_step_are_those_of_the_docs(name, options):
    everybody = run(2, collectives, name, options)
    assert everybody[0][0] == everybody[1][0]
    calls, plan = everybody[0]
    m, rank, cols = 6, 2, 12
    divided = [line for line in plan.splitlines() if not line.startswith("rank")]
    assert [line.split(":")[0] for line in divided] == ["parameter 0"]
    iteration = [("all_reduce", rank * rank * 8)] * 2 + [("all_reduce", cols * rank * 4)]
    expected = iteration * options.get("power_iterations", 1) if info(name).compression == "low rank" else []
    rows_of_k = m * (8 if options.get("scope") == "layer" else 1)
    expected.append(("all_reduce", 8 * (rows_of_k + 1)))  # and whether a process has a doubt about its K
    assert calls[:-1] == expected
    # The parameters, once: to each process what the other has updated, padded to 16 bytes a piece.
    total = sum(p.numel() * 4 for p in problem())
    assert calls[-1][0] == "all_gather"
    assert total / 2 <= calls[-1][1] <= 0.7 * total
