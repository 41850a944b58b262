"""Two small methods have the whole contract without a line of their own for it: tests/toys.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hf_efcp
from hf_efcp.core.random import counted_noise
from hf_efcp.registry import get_optimizer_info
from tests import toys
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.optim.helpers import differences, snapshot, step_quietly, through_a_file
from tests.reference import relative

FORMATS = [{}, {"error_dtype": "bf16"}, {"error_format": "int8"}, {"error_format": "int4"}]
RUNS = [(name, options) for name in ("efcp_toy_mean", "efcp_toy_factors") for options in FORMATS]
EVERY = pytest.mark.parametrize(
    ("name", "options"), RUNS, ids=lambda x: x if isinstance(x, str) else ",".join(x.values()) or "plain"
)
# The first is larger than all others together: it is divided by rows.
SHAPES = [(130, 12), (12, 10), (12, 10), (7,), (5, 3, 2), (9, 8)]


@pytest.fixture(autouse=True)
def registered():
    with toys.registered():
        yield


def build(name, params, **options):
    window = {"window_size": 6, "window_momentum": 0.5} if get_optimizer_info(name).windowed else {}
    return hf_efcp.create_optimizer(
        name, params, lr=0.02, **get_optimizer_info(name).lossy, **window, weight_decay=0.1, **options
    )


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (0.1 * noise + 0.05 * p.detach().double()).to(p.dtype)


def train(optimizer, params, start=0, stop=15):
    for step in range(start, stop):
        gradients(params, step)
        optimizer.step()


@EVERY
def test_resume_is_bit_for_bit_and_the_estimate_to_the_byte(name, options):
    params = problem(torch.float32)
    optimizer = build(name, params, **options)
    assert optimizer.estimate_footprint() == optimizer.memory_footprint()
    train(optimizer, params, 0, 8)
    saved = through_a_file(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    train(optimizer, params, 8, 15)
    other = build(name, others, **options)
    other.load_state_dict(saved)
    train(other, others, 8, 15)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
def test_a_gradient_that_is_not_finite_changes_nothing(name, options):
    params = problem(torch.float32)
    optimizer = build(name, params, **options)
    train(optimizer, params)
    before = snapshot(optimizer, params, without=("skipped",))
    gradients(params, 20)
    params[1].grad[0, 0] = torch.nan
    step_quietly(optimizer)
    assert differences(before, snapshot(optimizer, params, without=("skipped",))) == []
    assert optimizer.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_a_tensor_without_a_gradient_is_left_alone(options):
    """The per-tensor step, in a stack of two and in one of one: neither parameter, state nor count move."""
    params = problem(torch.float32)
    optimizer = build("efcp_toy_factors", params, **options)
    train(optimizer, params)
    absent = [params[1], params[3]]
    before = [(p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()}) for p in absent]
    gradients(params, 20)
    for p in absent:
        p.grad = None
    others = [p.detach().clone() for p in params if p.grad is not None]
    optimizer.step()
    for p, (value, state) in zip(absent, before, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][k], t) for k, t in state.items())
    assert not any(torch.equal(p, q) for p, q in zip([p for p in params if p.grad is not None], others, strict=True))


def oracle(w, rank, steps, lr=0.02, decay=0.1, b=0.5):
    """a = e + g;  P = orth(a Q),  Q = a^T P;  e = a - P Q^T;  m <- b m + (1 - b) P Q^T;  w <- (1 - lr wd) w - lr m."""
    e, m = torch.zeros_like(w), torch.zeros_like(w)
    q = counted_noise(torch.tensor(0), torch.tensor([0]), rank, w.shape[1])[0].T.to(w.dtype)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        a = e + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype) + 0.05 * w
        p = torch.linalg.qr(a @ (q / q.norm(dim=0)))[0]
        q = a.T @ p
        e = a - p @ q.T
        m = b * m + (1 - b) * p @ q.T
        w = (1 - lr * decay) * w - lr * m
    return w


def test_fifty_steps_are_those_of_the_dense_method():
    p = nn.Parameter(torch.randn(12, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    start = p.detach().clone()
    train(build("efcp_toy_factors", [p]), [p], 0, 50)
    assert relative(p.detach(), oracle(start, 2, 50)) < 1e-10


def test_vectors_have_torchs_adamw_and_its_state_names():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(9, generator=generator, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    optimizer, reference = build("efcp_toy_factors", [p]), torch.optim.AdamW([q], lr=0.02, weight_decay=0.1)
    for step in range(20):
        if step == 7:
            p.grad = q.grad = None
        else:
            gradients([p], step)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
    assert reference.state[q].keys() <= optimizer.state[p].keys()
    assert optimizer.state[p]["step"] == reference.state[q]["step"]


# Several processes -------------------------------------------------------------------------------------------------------


def trained_together(rank, folder):
    toys.register()
    results = {}
    for name, options in RUNS:
        params = problem()
        optimizer = build(name, params, process_group=dist.group.WORLD, **options)
        train(optimizer, params)
        key = name, *options.values()
        place = f"{folder}/{'_'.join(key)}"
        optimizer.save_shards(place)
        if rank == 0:
            torch.save(optimizer.state_dict(), f"{place}.pt")
        results[key] = torch.cat([p.detach().flatten() for p in params]), sum(optimizer.memory_footprint().values())
    for name in ("efcp_toy_mean", "efcp_toy_factors"):
        params = list(fsdp2.divided().parameters())
        optimizer = build(name, params, shard="auto")
        fsdp2.train(optimizer, params, 0, 15)
        entries = optimizer.state_dict()["state"]
        results[name, "FSDP2"] = fsdp2.flat(params), {(i, k): fsdp2.full(t) for i, e in entries.items() for k, t in e.items()}
    return results


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes give, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("together")
    with toys.registered():
        return run(2, trained_together, str(folder)), folder


def test_two_processes_train_as_one_and_one_goes_on(together):
    everybody, tmp_path = together
    for name, options in RUNS:
        key, alone = (name, *options.values()), problem()
        optimizer = build(name, alone, **options)
        train(optimizer, alone)
        flat = torch.cat([p.detach().flatten() for p in alone])
        total = sum(optimizer.memory_footprint().values())
        bound = 1e-9 if "error_format" not in options and "error_dtype" not in options else 2e-2  # rounding in other bases
        for theirs, held in (results[key] for results in everybody):
            assert torch.equal(theirs, everybody[0][key][0])
            assert relative(theirs, flat) < bound, key
            assert held < 0.75 * total, key
        other = build(name, alone, **options)
        other.shard_folder = tmp_path / "_".join(key)
        other.load_state_dict(torch.load(f"{other.shard_folder}.pt", weights_only=True))
        train(other, alone, 15, 20)


@pytest.mark.parametrize("name", ["efcp_toy_mean", "efcp_toy_factors"])
def test_fsdp2_trains_as_one_process_and_state_follows_the_rows(name, together):
    everybody, _ = together
    alone = list(fsdp2.Parameters().parameters())
    optimizer = build(name, alone)
    fsdp2.train(optimizer, alone, 0, 15)
    shapes = {(i, k): t.shape for i, e in optimizer.state_dict()["state"].items() for k, t in e.items()}
    for results in everybody:
        params, state = results[name, "FSDP2"]
        assert relative(params, fsdp2.flat(alone)) < 1e-9
        assert {key: t.shape for key, t in state.items()} == shapes
