"""Which parameters move: those with a gradient, whatever requires_grad says; the others stay, and do not count.

Every method, the two toys of tests/toys.py among them: one that keeps a window, and one that couples no tensors.
"""

import warnings

import pytest
import torch
from torch.nn import Parameter

import hf_efcp
from tests import toys
from tests.optim.helpers import KERNELS, M, bits, clones, differences, gradients_at, pairwise, same, shared, snapshot
from tests.reference import NAMES, info, names, parameters, relative, row, window

WINDOWED = names(windowed=True)
EVERY_NAME = [*NAMES, "efcp_toy_mean", "efcp_toy_factors"]
EVERY = pytest.mark.parametrize("name", EVERY_NAME)
METRICS = pytest.mark.parametrize("metric", ["none", "factored"])
OPTIONS = [
    {},
    {"weight_decay": 0.1, "window_momentum": 0.8},
    {"weight_decay": 0.1, "weight_decay_mode": "l2", "momentum": 0.9},
    {"scope": "layer", "momentum": 0.9, "weight_decay": 0.1},
    {"error_dtype": "bf16", "window_dtype": "bf16", "stochastic_rounding": True},
    {"metric": "factored", "window_momentum": 0.8, "window_nesterov": True, "rms_mode": "adam", "weight_decay": 0.1},
    {"metric": "diagonal", "scope": "layer", "weight_decay": 0.1, "weight_decay_mode": "l2"},
    {"metric": "tensor", "momentum": 0.9},
]
# Of the entries of a parameter's state, those that go on without it: the new row of zeros, K and the counters.
GOING_ON = ("window_", "gram", "step", "skipped", "counter")


@pytest.fixture(autouse=True)
def registered():
    with toys.registered():
        yield


def start(name, params, **options):
    """An optimizer before its first step. What only window methods have, a method without a window is not given."""
    given = {"lr": 0.01, "window_size": M, "update_rms": 0.1, **info(name).lossy, **options}
    if not info(name).windowed:
        given = {key: value for key, value in given.items() if key in info(name).options()}
    return hf_efcp.create_optimizer(name, params, **given)


def train(optimizer, params, first, last, absent=()):
    for t in range(first, last):
        gradients_at(t, params)
        for i in absent:
            params[i].grad = None
        optimizer.step()


# requires_grad at the moment of step() -----------------------------------------------------------------------------------


@pairwise(name=EVERY_NAME, options=OPTIONS, dtype=[torch.float32, torch.bfloat16], kernels=KERNELS)
@pytest.mark.usefixtures("kernels")
def test_a_parameter_with_a_gradient_moves_whatever_requires_grad_says(name, dtype, options):
    """Frozen between backward and step, each in turn and all at once: the bits of the run that freezes nothing."""
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, twin = start(name, params, **options), start(name, others, **options)
    for t in range(2 * len(params)):
        gradients_at(t, params)
        gradients_at(t, others)
        frozen = params if t == 9 else [params[t % len(params)]] if t else []
        before = clones(params)
        for p in frozen:
            p.requires_grad_(False)
        optimizer.step()
        twin.step()
        assert all(not p.requires_grad for p in frozen)
        for p in params:
            p.requires_grad_(True)
        assert dtype != torch.float32 or all(not same(p, b) for p, b in zip(params, before, strict=True))
        assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@pairwise(name=EVERY_NAME, position=[0, 1, 3])  # the first, one of a batch, alone in its shape
def test_a_parameter_that_was_always_frozen_moves_when_it_has_a_gradient(name, position):
    params, others = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    optimizer, twin = start(name, params), start(name, others)
    params[position].requires_grad_(False)
    for t in range(M + 2):
        gradients_at(t, params)
        gradients_at(t, others)
        optimizer.step()
        twin.step()
    assert all(same(p, q) for p, q in zip(params, others, strict=True))


@METRICS
@EVERY
def test_adapters_that_take_turns(name, metric):
    """Two adapters of one model. The other one's gradient and flag are set before each step: only the active one moves."""
    base = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    adapters = [[Parameter(p.detach().float()) for p in parameters([(4, 12), (10, 4)], seed=i)] for i in (1, 2)]
    optimizer = start(name, [p for adapter in adapters for p in adapter], metric=metric, weight_decay=0.1)
    for t in range(2 * M + 2):
        active, idle = adapters[t % 2], adapters[1 - t % 2]
        for p in active:
            p.requires_grad_(True)
        for p in idle:
            p.requires_grad_(False)
        optimizer.zero_grad()
        (base @ active[0].T @ active[1].T - 1).square().mean().backward()
        for p in (*active, *idle):  # ready for the next turn, before this one's step
            p.requires_grad_(not p.requires_grad)
        moving, still = clones(active), clones(idle)
        optimizer.step()
        assert all(not same(p, b) for p, b in zip(active, moving, strict=True)), t
        assert all(same(p, b) for p, b in zip(idle, still, strict=True)), t


# No gradient in this step ------------------------------------------------------------------------------------------------


@pairwise(name=EVERY_NAME, options=OPTIONS, absent=[[2, 3, 6], [0, 1, 2, 3, 4, 5]], kernels=KERNELS)
@pytest.mark.usefixtures("kernels")
def test_a_parameter_without_a_gradient_stays_and_keeps_its_state(name, absent, options):
    params = parameters(dtype=torch.float32)
    optimizer = start(name, params, **options)
    train(optimizer, params, 0, M + 2)
    before = clones(params)
    kept = [{k: t.clone() for k, t in optimizer.state[p].items() if not k.startswith(GOING_ON)} for p in params]
    rows = {(i, j): row(optimizer, params[i], j) for i in absent for j in range(M)} if info(name).windowed else {}
    train(optimizer, params, 10, 13, absent)
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        assert same(p, b) == (i in absent), i
        assert i not in absent or all(same(optimizer.state[p][k], t) for k, t in kept[i].items()), i
    replaced = {(M + 2 + i) % M for i in range(3)}
    for (i, j), old in rows.items():
        assert torch.equal(row(optimizer, params[i], j), torch.zeros_like(old) if j in replaced else old)
    train(optimizer, params, 20, 21)
    assert all(not same(params[i], before[i]) for i in absent)


@METRICS
@pytest.mark.parametrize("name", WINDOWED)
def test_rows_of_a_parameter_that_stays_count_in_the_gram_matrix(name, metric):
    params = parameters(dtype=torch.float64)
    optimizer = start(name, params, metric=metric)
    train(optimizer, params, 0, M + 2)
    train(optimizer, params, 10, 12, absent=[1, 3])
    g = window(optimizer, params)
    torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


@pairwise(
    name=EVERY_NAME,
    metric=["none", "factored"],
    options=[{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "weight_decay_mode": "l2", "momentum": 0.9}],
)
def test_a_head_of_another_task_does_not_drift(name, metric, options):
    """40 steps of one task, then 40 of the other: each head moves in its own steps only."""
    generator = torch.Generator().manual_seed(0)
    shared_, first, second = [Parameter(p.detach().float()) for p in parameters([(12, 30), (5, 12), (7, 12)])]
    optimizer = start(name, [shared_, first, second], metric=metric, **options)
    for active, idle in ((first, second), (second, first)):
        start_of_idle = idle.detach().clone()
        for _ in range(40):
            optimizer.zero_grad()
            x = torch.randn(16, 30, generator=generator)
            ((x @ shared_.T).tanh() @ active.T - 1).square().mean().backward()
            before = active.detach().clone()
            optimizer.step()
            assert not same(active, before)
        assert same(idle, start_of_idle)


# update_rms counts what has a gradient -----------------------------------------------------------------------------------


def size_of_step(optimizer, params):
    before = clones(params)
    optimizer.step()
    return torch.cat([(b - p).detach().double().flatten() for p, b in zip(params, before, strict=True)])


@pairwise(
    name=WINDOWED,
    metric=["none", "factored", "tensor"],
    scope=["model", "layer"],
    dead=[[(500, 500)], [(2000, 2000), (7,)]],
    frozen=[False, True],
)
def test_dead_parameters_do_not_change_the_step(name, dead, metric, scope, frozen):
    """Beside 22 thousand live parameters. They once made the step 3.5 and 13 times too large."""
    live = [(100, 200), (40, 50), (60,)]
    params, others = parameters([*live, *dead], torch.float32), parameters(live, torch.float32)
    for p in params[len(live) :]:
        p.requires_grad_(not frozen)
    options = {"lr": 1.0, "metric": metric, "scope": scope, "update_rms": 0.1}
    optimizer, twin = start(name, params, **options), start(name, others, **options)
    rest = clones(params[len(live) :])
    for t in range(M + 2):
        gradients_at(t, params[: len(live)], pull=0.0)
        gradients_at(t, others, pull=0.0)
        u, expected = size_of_step(optimizer, params[: len(live)]), size_of_step(twin, others)
        assert relative(u, expected) < 1e-6
        if metric == "none":
            assert u.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
    assert all(same(p, b) for p, b in zip(params[len(live) :], rest, strict=True))


@pytest.mark.parametrize("name", WINDOWED)
def test_only_the_parameters_of_this_step_count(name):
    """Exactly, once the rows of the absent one are out of the window: |u|^2 = c^T K c counts them as long as they are in."""
    params = parameters([(12, 30), (40, 11), (7,)], torch.float64)
    optimizer = start(name, params, lr=1.0)
    train(optimizer, params, 0, M)
    for t in range(2 * M):
        gradients_at(t, params)
        params[1].grad = None
        u = size_of_step(optimizer, params)
        live = params[0].numel() + params[2].numel()
        if t >= M:  # no row of the absent one is left
            assert u.norm().item() == pytest.approx(0.1 * live**0.5, rel=1e-9)
        assert not u[params[0].numel() : -params[2].numel()].any()


# No gradient at all ------------------------------------------------------------------------------------------------------


@pairwise(name=EVERY_NAME, metric=["none", "factored"], steps=[0, M + 2])
def test_steps_without_any_gradient_warn_once_and_move_nothing(name, metric, steps):
    params = parameters(dtype=torch.float32)
    optimizer = start(name, params, metric=metric, weight_decay=0.1, momentum=0.9)
    train(optimizer, params, 0, steps)
    before = clones(params)
    kept = [{k: t.clone() for k, t in optimizer.state[p].items() if not k.startswith(GOING_ON)} for p in params]
    optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            optimizer.step()
    assert len(caught) == 1 and "gradient" in str(caught[0].message)
    assert caught[0].filename == __file__, "the warning names the caller's line"
    assert all(same(p, b) for p, b in zip(params, before, strict=True))
    for p, entry in zip(params, kept, strict=True):
        assert all(torch.equal(bits(optimizer.state[p][k]), bits(t)) for k, t in entry.items())
    train(optimizer, params, 20, 22)
    assert all(not same(p, b) for p, b in zip(params, before, strict=True))


@EVERY
def test_steps_with_gradients_warn_of_nothing(name):
    params = parameters(dtype=torch.float32)
    optimizer = start(name, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 0, M, absent=[1])
        train(optimizer, params, M, 2 * M, absent=[0, 2, 3, 4, 5])
