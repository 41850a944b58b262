"""What real training throws at an optimizer: broken, missing, sparse and huge gradients, odd parameters, changes mid-run."""

import copy
import gc
import random
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import hf_efcp
from tests.optim.helpers import M, bits, count, differences, gradients_at, same, shared, snapshot, started, train
from tests.reference import (
    NAMES,
    error,
    make,
    parameters,
    row,
    set_gradients,
    update_of,
    window,
)

EVERY = pytest.mark.parametrize("name", NAMES)
COMPRESSED = pytest.mark.parametrize("name", [n for n in NAMES if "dense" not in n])
SCOPES = pytest.mark.parametrize("scope", ["model", "layer"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def step_quietly(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()


def assert_unchanged(before, optimizer, params, **kwargs):
    assert differences(before, snapshot(optimizer, params, **kwargs)) == []


def all_finite(optimizer, params):
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return all(t.isfinite().all() for t in [*params, *state])


# Gradients that are not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"momentum": 0.9, "error_dtype": "bf16", "window_dtype": "bf16"}], ids=str
)
@EVERY
def test_a_gradient_that_is_not_finite_skips_the_step(name, options):
    """In every tensor in turn: state and parameters keep their bits, and training goes on as if nothing had been there."""
    optimizer, params = started(name, weight_decay=0.1, **options)
    twin, others = started(name, weight_decay=0.1, **options)
    for i in range(len(params)):
        gradients_at(99, params)
        params[i].grad.view(-1)[-1] = [float("nan"), float("inf"), float("-inf")][i % 3]
        grads = [p.grad.clone() for p in params]
        before = snapshot(optimizer, params, without=["skipped"])
        step_quietly(optimizer)
        assert_unchanged(before, optimizer, params, without=["skipped"])
        assert count(optimizer, "skipped") == i + 1
        assert all(same(p.grad, g) for p, g in zip(params, grads, strict=True))
    train(optimizer, params, 20, 20 + M + 1)
    train(twin, others, 20, 20 + M + 1)
    after = snapshot(optimizer, params, without=["skipped"])
    assert differences(after, snapshot(twin, others, without=["skipped"])) == []
    assert optimizer.diagnostics()["skipped_steps"] == len(params)


@EVERY
def test_skips_are_warned_about_less_and_less_often(name):
    optimizer, params = started(name)
    gradients_at(99, params)
    params[0].grad.fill_(float("nan"))
    warned = []
    for i in range(1, 10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned += [i for w in caught if issubclass(w.category, RuntimeWarning)]
        assert all("not finite" in str(w.message) and f"{i} skipped" in str(w.message) for w in caught)
    assert warned == [1, 2, 4, 8]


@SCOPES
@EVERY
def test_a_gradient_that_is_not_finite_before_the_first_step(name, scope):
    optimizer, params = started(name, steps=0, scope=scope)
    twin, others = started(name, steps=0, scope=scope)
    gradients_at(0, params)
    params[2].grad[0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert count(optimizer) == 0 and count(optimizer, "skipped") == 1
    train(optimizer, params, 0, M + 2)
    train(twin, others, 0, M + 2)
    after = snapshot(optimizer, params, without=["skipped"])
    assert differences(after, snapshot(twin, others, without=["skipped"])) == []


@EVERY
def test_every_gradient_not_finite(name):
    optimizer, params = started(name)
    before = snapshot(optimizer, params, without=["skipped"])
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert_unchanged(before, optimizer, params, without=["skipped"])


@EVERY
def test_the_closure_of_a_skipped_step_returns_its_loss(name):
    optimizer, params = started(name)

    def closure():
        gradients_at(99, params)
        params[1].grad[0, 0] = float("nan")
        return 7.0

    with pytest.warns(RuntimeWarning):
        assert optimizer.step(closure) == 7.0


@EVERY
def test_a_frozen_parameter_may_have_any_gradient(name):
    params = parameters(dtype=torch.float32)
    params[1].requires_grad_(False)
    optimizer = make(name, params, window_size=M)
    gradients_at(0, params)
    params[1].grad = torch.full_like(params[1], float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert count(optimizer) == 1


@pytest.mark.parametrize("norm", [1e25, 1e30, 1e38])
@EVERY
def test_gradients_whose_squares_overflow_fp32(name, norm):
    """Each step either happens, with everything finite, or changes nothing."""
    optimizer, params = started(name)
    for t in range(3):
        set_gradients(params, torch.Generator().manual_seed(t))
        for p in params:
            p.grad.mul_(norm)
        before, taken = snapshot(optimizer, params, without=["skipped"]), count(optimizer)
        step_quietly(optimizer)
        if count(optimizer) == taken:
            assert_unchanged(before, optimizer, params, without=["skipped"])
        assert all_finite(optimizer, params)
    train(optimizer, params, 10, 10 + 2 * M)
    assert all_finite(optimizer, params)


@EVERY
def test_gradients_whose_squares_overflow_fp64(name):
    optimizer, params = started(name, dtype=torch.float64)
    before = snapshot(optimizer, params, without=["skipped"])
    gradients_at(99, params, norm=1e200)
    with pytest.warns(RuntimeWarning, match="out of range"):
        optimizer.step()
    assert_unchanged(before, optimizer, params, without=["skipped"])


def test_diagnostics_after_a_huge_gradient():
    optimizer, params = started("efcp_lowrank_mfac")
    gradients_at(99, params, norm=1e30)
    optimizer.step()
    assert all(np.isfinite(v) for v in optimizer.diagnostics().values())


@pytest.mark.parametrize("name", ["efcp_dense_mfac", "efcp_dense_ggt"])
def test_one_huge_gradient_does_not_hide_the_others(name):
    """A spike of 1e6 once: the steps after it still follow their gradients (exact answer: cosine 0.99 and more)."""
    params, generator = parameters(dtype=torch.float32), torch.Generator().manual_seed(1)
    extra = {"damping": 1e-4} if name.endswith("mfac") else {}
    optimizer = make(name, params, window_size=6, update_rms=0.1, **extra)
    for t in range(6):
        set_gradients(params, generator, norm=1e6 if t == 2 else 1.0)
        u = update_of(optimizer, params)
        g = window(optimizer, params)[t]
        assert u @ g > 0.9 * u.norm() * g.norm(), f"step {t}"


@EVERY
def test_tiny_gradients(name):
    optimizer, params = started(name, steps=0, dtype=torch.float32, update_rms=0.1)
    for t in range(M + 2):
        gradients_at(t, params, norm=1e-25, pull=0.0)
        u = update_of(optimizer, params)
        assert u.isfinite().all()
    assert count(optimizer) == M + 2 and all_finite(optimizer, params)


@EVERY
def test_a_gradient_scaler_can_drive_it(name):
    optimizer, params = started(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(optimizer, params)
    scaler.scale(params[1].sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_unchanged(before, optimizer, params)
    optimizer.zero_grad()
    scaler.scale(sum((p - 1).square().sum() for p in params)).backward()
    scaler.step(optimizer)
    assert count(optimizer) == M + 3


# Gradients that are absent, zero, sparse, oddly laid out ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "layer", "error_dtype": "bf16", "window_dtype": "bf16"}, {"weight_decay": 0.1, "weight_decay_mode": "l2"}],
    ids=str,
)
@pytest.mark.parametrize("absent", [[0, 1], [2, 3, 6], [0, 1, 2, 3, 4, 5]], ids=str)
@EVERY
def test_an_absent_gradient_is_a_zero_row_and_keeps_its_error(name, absent, options):
    optimizer, params = started(name, **options)
    slot = count(optimizer) % M
    errors = [optimizer.state[p].get("error", torch.zeros(())).clone() for p in params]
    starts = [optimizer.state[p].get("warm_start", torch.zeros(())).clone() for p in params]
    gradients_at(99, params)
    for i in absent:
        params[i].grad = None
    optimizer.step()
    assert count(optimizer) == M + 3
    for i, p in enumerate(params):
        assert row(optimizer, p, slot).any() == (i not in absent)
        if i in absent:
            assert same(optimizer.state[p].get("error", torch.zeros(())), errors[i])
            assert same(optimizer.state[p].get("warm_start", torch.zeros(())), starts[i])
            assert p.grad is None
    if "scope" not in options:
        g = window(optimizer, params)
        torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


@SCOPES
@pytest.mark.parametrize("name", ["efcp_dense_mfac", "efcp_dense_ggt"])
def test_an_absent_gradient_is_a_gradient_of_zeros_where_rows_are_exact(name, scope):
    optimizer, params = started(name, scope=scope, weight_decay=0.1, momentum=0.5)
    twin, others = started(name, scope=scope, weight_decay=0.1, momentum=0.5)
    for t in range(10, 10 + M):
        gradients_at(t, params)
        gradients_at(t, others)
        params[t % 7].grad = None
        others[t % 7].grad.zero_()
        optimizer.step()
        twin.step()
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@EVERY
def test_error_held_through_absent_gradients_is_owed_afterwards(name):
    """Telescoping counts only the gradients that were there."""
    params = parameters(dtype=torch.float64)
    optimizer = make(name, params, window_size=12)
    sums = [torch.zeros(p.numel(), dtype=torch.float64) for p in params]
    for t in range(12):
        gradients_at(t, params)
        for i, p in enumerate(params):
            if (t + i) % 3 == 0:
                p.grad = None
            else:
                sums[i] += p.grad.flatten()
        optimizer.step()
    for p, total in zip(params, sums, strict=True):
        rows = sum(row(optimizer, p, i) for i in range(12))
        torch.testing.assert_close(rows + error(optimizer, p), total, rtol=1e-12, atol=1e-12)


@EVERY
def test_no_gradient_at_all(name):
    optimizer, params = started(name)
    errors = [error(optimizer, p) for p in params]
    slot = count(optimizer) % M
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert all_finite(optimizer, params)
    assert all(torch.equal(error(optimizer, p), e) for p, e in zip(params, errors, strict=True))
    assert not window(optimizer, params)[slot].any() or count(optimizer) == M + 2


def zero_gradients(params):
    for p in params:
        p.grad = torch.zeros_like(p)


def zero_steps_only_allocate(name, absent, **options):
    optimizer, params = started(name, steps=0, **options)
    twin, others = started(name, steps=0, **options)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        zero_gradients(params)
        if absent:
            optimizer.zero_grad(set_to_none=True)
        optimizer.step()
    assert all(same(p, b) for p, b in zip(params, before, strict=True))
    assert count(optimizer) == 0 and count(optimizer, "skipped") == 0
    assert optimizer.state and not any(t.any() for entry in optimizer.state.values() for t in entry.values())
    train(optimizer, params, 0, M + 2)
    train(twin, others, 0, M + 2)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"momentum": 0.9, "window_momentum": 0.5}, {"weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("absent", [False, True], ids=["zeros", "absent"])
@EVERY
def test_zero_gradients_on_empty_state_only_allocate(name, absent, options):
    zero_steps_only_allocate(name, absent, **options)


@EVERY
def test_absent_gradients_on_empty_state_only_allocate_with_l2(name):
    zero_steps_only_allocate(name, True, weight_decay=0.1, weight_decay_mode="l2")


@EVERY
def test_zero_gradients_on_empty_state_only_allocate_with_l2(name):
    zero_steps_only_allocate(name, False, weight_decay=0.1, weight_decay_mode="l2")


@SCOPES
@EVERY
def test_zero_gradients_mid_run(name, scope):
    """A real step: exact tensors get a zero row, and nothing turns into NaN over a whole window of them."""
    optimizer, params = started(name, scope=scope)
    for i in range(M + 1):
        zero_gradients(params)
        optimizer.step()
        assert count(optimizer) == M + 3 + i
        assert all_finite(optimizer, params)


@EVERY
def test_lr_zero_is_a_real_step(name):
    optimizer, params = started(name, steps=0, lr=0.0, weight_decay=0.1)
    twin, others = started(name, steps=0, lr=1.0)
    before = [p.detach().clone() for p in params]
    for t in range(M + 2):
        gradients_at(t, params, pull=0.0)
        gradients_at(t, others, pull=0.0)
        optimizer.step()
        twin.step()
    assert count(optimizer) == M + 2
    assert all(same(p, b) for p, b in zip(params, before, strict=True))
    state = [{k: v for k, v in snapshot(o, p).items() if k.startswith("state")} for o, p in ((optimizer, params), (twin, others))]
    assert differences(*state) == []


@SCOPES
@EVERY
def test_lora_b_of_zeros(name, scope):
    """B = 0 at the start: A's first gradient is all zero, and its compressor has nothing to start from."""
    generator = torch.Generator().manual_seed(0)
    a = Parameter(torch.randn(4, 20, generator=generator) / 4)
    b = Parameter(torch.zeros(16, 4))
    x, y = torch.randn(64, 20, generator=generator), torch.randn(64, 16, generator=generator)
    y += x @ torch.randn(20, 16, generator=generator)
    optimizer = make(name, [a, b], lr=0.05, window_size=M, scope=scope, update_rms=0.5)
    a_start, losses = a.detach().clone(), []
    for _ in range(40):
        loss = (x @ a.T @ b.T - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not torch.equal(a, a_start) and b.any()
    assert losses[-1] < (0.9 if scope == "model" else 0.97) * losses[0] and all_finite(optimizer, [a, b])


@pytest.mark.parametrize("damping_mode", ["absolute", "relative"])
@pytest.mark.parametrize("gradient", [None, 0.0, 1e-18], ids=["absent", "zero", "tiny"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_a_dead_tensor_does_not_stop_the_others(name, gradient, damping_mode):
    """Each tensor has its own K: what happens to one tensor's is nothing to the others."""
    runs = []
    for dead in (False, True):
        params = parameters([(12, 30), (12, 30), (7,)], torch.float32)
        optimizer = make(name, params, lr=1e-3, window_size=M, scope="layer", damping_mode=damping_mode, damping=1e-3)
        for t in range(M + 2):
            gradients_at(t, params, pull=0.0)
            if dead:
                params[1].grad = None if gradient is None else torch.full_like(params[1], gradient)
            optimizer.step()
        assert all_finite(optimizer, params)
        runs.append({f"{i}": params[i].detach().clone() for i in (0, 2)})
    start = parameters([(12, 30), (12, 30), (7,)], torch.float32)
    for i in (0, 2):
        assert not torch.equal(runs[1][f"{i}"], start[i])
        torch.testing.assert_close(runs[1][f"{i}"], runs[0][f"{i}"], rtol=1e-5, atol=1e-6)


@SCOPES
@EVERY
def test_a_tensor_whose_gradient_is_always_zero(name, scope):
    optimizer, params = started(name, steps=0, scope=scope, weight_decay=0.0)
    params[1].data.zero_()
    for t in range(2 * M):
        gradients_at(t, params, pull=0.0)
        params[1].grad.zero_()
        optimizer.step()
    assert not params[1].any() and all_finite(optimizer, params)
    assert not error(optimizer, params[1]).any()
    gradients_at(50, params)  # and then it comes to life
    optimizer.step()
    assert params[1].any() and all_finite(optimizer, params)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "weight_decay_mode": "l2"}], ids=str)
@EVERY
def test_sparse_gradients(name, options):
    """As the same gradients dense; uncoalesced ones too; and they stay sparse."""
    runs = []
    for sparse in (True, False):
        table, weight = parameters([(30, 8), (5, 8)], torch.float32)
        optimizer = make(name, [table, weight], lr=0.1, window_size=M, **options)
        for t in range(M + 2):
            index = torch.tensor([(3 * t) % 30, 7, 7, (t * t) % 30])
            optimizer.zero_grad()
            loss = (torch.nn.functional.embedding(index, table, sparse=sparse) @ weight.T).square().sum()
            loss.backward()
            assert table.grad.is_sparse == sparse
            optimizer.step()
            assert table.grad.is_sparse == sparse
        runs.append(snapshot(optimizer, [table, weight]))
    assert differences(*runs) == []


@EVERY
def test_a_sparse_gradient_that_is_not_finite(name):
    optimizer, params = started(name)
    before = snapshot(optimizer, params, without=["skipped"])
    gradients_at(99, params)
    params[1].grad = torch.sparse_coo_tensor([[2]], torch.full((1, 30), float("nan")), (12, 30), check_invariants=True)
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert_unchanged(before, optimizer, params, without=["skipped"])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@EVERY
def test_memory_layout_does_not_matter(name, momentum):
    """Transposed and channels-last parameters, expanded and strided gradients: bit for bit the contiguous run."""
    runs = []
    for odd in (False, True):
        params = parameters([(12, 30), (8, 3, 3, 3), (9,)], torch.float32)
        if odd:
            params[0] = Parameter(params[0].detach().T.contiguous().T)
            params[1] = Parameter(params[1].detach().contiguous(memory_format=torch.channels_last))
            assert not params[0].is_contiguous() and not params[1].is_contiguous()
        optimizer = make(name, params, lr=0.1, window_size=M, momentum=momentum, weight_decay=0.1)
        for t in range(M + 2):
            gradients_at(t, params)
            if t == 2:
                params[0].grad = torch.full((12, 1), 0.3).expand(12, 30)
            if odd:
                params[1].grad = params[1].grad.contiguous(memory_format=torch.channels_last)
                params[2].grad = params[2].grad.repeat_interleave(2)[::2]
            optimizer.step()
        assert params[0].stride() == ((1, 12) if odd else (30, 1))
        runs.append(snapshot(optimizer, params))
    assert differences(*runs) == []


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "weight_decay_mode": "l2", "momentum": 0.5}], ids=str)
@DTYPES
@EVERY
def test_step_does_not_change_gradients(name, dtype, options):
    optimizer, params = started(name, steps=1, dtype=dtype, **options)
    for t in range(1, M + 2):
        gradients_at(t, params)
        params[3].grad = None
        kept = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
        optimizer.step()
        for p, (grad, copied) in zip(params, kept, strict=True):
            assert p.grad is grad and (grad is None or same(grad, copied))


def test_a_gradient_is_not_kept_alive_by_the_optimizer():
    """zero_grad(set_to_none=True) frees it, for the next forward pass."""
    params = parameters([(50, 40)], torch.float32)
    optimizer = make("efcp_dense_mfac", params, window_size=M)
    memory = np.full((50, 40), 0.5, dtype=np.float32)
    freed = weakref.ref(memory)
    params[0].grad = torch.from_numpy(memory)
    del memory
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert freed() is None


# Parameters of every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [[0], [1], [0, 3, 4]], ids=str)
@EVERY
def test_frozen_parameters_take_no_memory_and_do_not_move(name, frozen):
    params = parameters(dtype=torch.float32)
    for i in frozen:
        params[i].requires_grad_(False)
    live = [p for i, p in enumerate(params) if i not in frozen]
    twin_params = [Parameter(p.detach().clone()) for p in live]
    options = {"lr": 0.1, "window_size": M, "weight_decay": 0.1, "update_rms": 0.1}
    optimizer, twin = make(name, params, **options), make(name, twin_params, **options)
    before = [params[i].detach().clone() for i in frozen]
    for t in range(M + 2):
        gradients_at(t, live)
        gradients_at(t, twin_params)
        optimizer.step()
        twin.step()
    assert all(params[i] not in optimizer.state and same(params[i], b) for i, b in zip(frozen, before, strict=True))
    assert optimizer.memory_footprint() == twin.memory_footprint()
    assert differences(snapshot(optimizer, live), snapshot(twin, twin_params)) == []


@EVERY
def test_everything_frozen(name):
    params = parameters(dtype=torch.float32)
    for p in params:
        p.requires_grad_(False)
    optimizer = make(name, params, window_size=M)
    optimizer.step()
    assert optimizer.memory_footprint() == {} and optimizer.diagnostics() == {}
    params[3].requires_grad_(True)
    gradients_at(0, [params[3]])
    optimizer.step()
    assert count(optimizer) == 1


@SCOPES
@pytest.mark.parametrize("first", [0, 2], ids=["the first", "in the middle"])
@EVERY
def test_unfreezing_mid_run_keeps_window_and_gram_matrix(name, first, scope):
    params = parameters(dtype=torch.float32)
    params[first].requires_grad_(False)
    optimizer = make(name, params, lr=0.01, window_size=M, scope=scope, update_rms=0.1)
    train(optimizer, [p for p in params if p.requires_grad], 0, M + 1)
    old = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params if p in optimizer.state}
    gram, steps = shared(optimizer, "gram").clone(), count(optimizer)
    params[first].requires_grad_(True)
    optimizer.memory_footprint()
    assert count(optimizer) == steps
    assert scope == "layer" or same(shared(optimizer, "gram"), gram)
    for p, entry in old.items():
        for key, value in entry.items():
            if key not in ("step", "skipped") and (key != "gram" or scope == "layer"):
                assert same(optimizer.state[p][key], value), key
    before = params[first].detach().clone()
    train(optimizer, params, 10, 10 + M + 1)
    assert not torch.equal(before, params[first])
    if scope == "model":
        g = window(optimizer, params)
        torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


@SCOPES
@EVERY
def test_freezing_mid_run_keeps_the_others_training(name, scope):
    optimizer, params = started(name, scope=scope)
    params[1].requires_grad_(False)
    for t in range(10, 10 + M + 1):
        gradients_at(t, params)
        params[1].grad = None
        optimizer.step()
    assert count(optimizer) == 2 * M + 3 and all_finite(optimizer, params)
    assert not any(row(optimizer, params[1], i).any() for i in range(M))


@EVERY
def test_a_parameter_frozen_mid_run_does_not_move(name):
    moved = []
    for options in ({}, {"window_momentum": 0.5}, {"momentum": 0.5}, {"weight_decay": 0.1}):
        optimizer, params = started(name, **options)
        params[1].requires_grad_(False)
        before = params[1].detach().clone()
        for t in range(10, 12):
            gradients_at(t, params)
            params[1].grad = None
            optimizer.step()
        if not same(params[1], before):
            moved.append(options)
    assert moved == []


def test_tied_parameters_count_once():
    for name in NAMES:
        model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False))
        model[1].weight = model[0].weight
        lone = hf_efcp.create_optimizer(name, model, lr=0.1, window_size=M)
        twice = hf_efcp.create_optimizer(name, [model[0].weight, model[1].weight], lr=0.1, window_size=M)
        named = [("a", model[0].weight), ("b", model[1].weight)]
        thrice = hf_efcp.create_optimizer(name, named, lr=0.1, window_size=M)
        assert lone.memory_footprint() == twice.memory_footprint() == thrice.memory_footprint()
        runs = []
        for optimizer in (lone, twice, thrice):
            clone, opt = copy.deepcopy((model, optimizer))
            for t in range(M):
                x = torch.arange(5) + t
                opt.zero_grad()
                clone(x).square().sum().backward()
                opt.step()
            runs.append(clone[0].weight.detach())
        assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"momentum": 0.5, "window_dtype": "bf16", "error_dtype": "bf16"}], ids=str
)
@EVERY
def test_shapes_without_elements_or_dimensions(name, options):
    shapes = [(0,), (0, 5), (5, 0), (3, 0, 2), (), (1,), (1, 1), (1, 40), (40, 1), (2, 1, 1, 1), (10, 20)]
    optimizer, params = started(name, shapes=shapes, **options)
    assert count(optimizer) == M + 2 and all_finite(optimizer, params)
    assert [tuple(p.shape) for p in params] == shapes
    assert all(p.numel() == 0 or row(optimizer, p, 0).any() for p in params)


@pytest.mark.parametrize("shapes", [[(0,)], [(0, 3), (2, 0)], [()]], ids=str)
@EVERY
def test_nothing_else_than_a_degenerate_shape(name, shapes):
    optimizer, params = started(name, shapes=shapes)
    assert all_finite(optimizer, params) and count(optimizer) == (0 if params[0].numel() == 0 else M + 2)


@EVERY
def test_integer_and_complex_parameters_that_are_frozen(name):
    params = parameters([(12, 30), (5,)], torch.float32)
    integers = Parameter(torch.arange(6).view(2, 3), requires_grad=False)
    complex_ = Parameter(torch.ones(4, 5, dtype=torch.complex64), requires_grad=False)
    optimizer = make(name, [integers, params[0], complex_, params[1]], lr=0.1, window_size=M, weight_decay=0.1)
    train(optimizer, params, 0, M + 2)
    assert set(optimizer.state) == set(params)
    assert torch.equal(integers, torch.arange(6).view(2, 3)) and (complex_ == 1).all()


def test_a_complex_parameter_unfrozen_mid_run_is_refused():
    params = parameters([(5,)], torch.float32)
    complex_ = Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False)
    optimizer = make("efcp_dense_mfac", [*params, complex_], window_size=M)
    train(optimizer, params, 0, 2)
    complex_.requires_grad_(True)
    complex_.grad = torch.full_like(complex_, 1j)
    with pytest.raises(hf_efcp.OptionError, match="complex"):
        step_quietly(optimizer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_low_precision_parameters_are_rounded_once(name, dtype, weight_decay):
    """State and update are those of an fp32 model with the same gradients; p is computed in fp32 and rounded."""
    low, full = parameters(dtype=dtype), parameters(dtype=torch.float32)
    lr = 0.05
    optimizer = make(name, low, lr=lr, weight_decay=weight_decay, window_size=M, update_rms=0.2)
    reference = make(name, full, window_size=M, update_rms=0.2)
    for t in range(M + 2):
        gradients_at(t, low)
        for p, q in zip(full, low, strict=True):
            p.grad = q.grad.float()
        u = update_of(reference, full).float().split([p.numel() for p in full])
        expected = [
            (p.detach().float() * (1 - lr * weight_decay)).add_(v.view(p.shape), alpha=-lr).to(dtype)
            for p, v in zip(low, u, strict=True)
        ]
        optimizer.step()
        assert all(same(p, e) for p, e in zip(low, expected, strict=True))
        state = [
            {k: v for k, v in snapshot(o, p).items() if k.startswith("state")} for o, p in ((optimizer, low), (reference, full))
        ]
        assert differences(*state) == []


@EVERY
def test_parameters_of_several_dtypes(name):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [p for i, d in enumerate(dtypes) for p in parameters([(12, 30), (6,)], d, seed=i)]
    optimizer = make(name, params, lr=0.01, window_size=M, update_rms=0.1)
    train(optimizer, params, 0, M + 2)
    assert [p.dtype for p in params] == [d for d in dtypes for _ in range(2)]
    assert all_finite(optimizer, params)
    for p in params:
        expected = torch.float64 if p.dtype == torch.float64 else torch.float32
        floats = {v.dtype for k, v in optimizer.state[p].items() if v.is_floating_point() and k != "gram"}
        assert floats == {expected}
    g = window(optimizer, params)
    torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


# Groups, closures, changes mid-run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@SCOPES
@EVERY
def test_groups_have_their_own_lr_and_weight_decay(name, scope, mode):
    """The update does not depend on lr: p <- (1 - lr*wd) p - lr*u with each group's numbers."""
    params, plain = parameters(), parameters()
    settings = [(0.3, 0.0)] * 2 + [(0.1, 0.5)] * 3 + [(0.0, 0.2)] * 2
    groups = [
        {"params": params[:2], "lr": 0.3, "weight_decay": 0.0},
        {"params": params[2:5], "weight_decay": 0.5},
        {"params": params[5:], "lr": 0.0},
    ]
    optimizer = make(name, groups, lr=0.1, weight_decay=0.2, weight_decay_mode=mode, window_size=M, scope=scope, update_rms=0.1)
    parts = [{"params": plain[:2]}, {"params": plain[2:5]}, {"params": plain[5:]}]
    reference = make(name, parts, window_size=M, scope=scope, update_rms=0.1)
    for t in range(M + 2):
        gradients_at(t, params)
        before = [p.detach().clone() for p in params]
        for p, q, (_, wd) in zip(params, plain, settings, strict=True):
            q.grad = p.grad + wd * p.detach() if mode == "l2" else p.grad
        u = update_of(reference, plain).split([p.numel() for p in plain])
        optimizer.step()
        for p, b, v, (lr, wd) in zip(params, before, u, settings, strict=True):
            decay = 0.0 if mode == "l2" else lr * wd
            torch.testing.assert_close(p.detach(), (1 - decay) * b - lr * v.view(p.shape), rtol=1e-9, atol=1e-12)


@EVERY
def test_lr_and_weight_decay_may_change_between_steps(name):
    optimizer, params = started(name, dtype=torch.float64)
    twin, others = started(name, dtype=torch.float64)
    optimizer.param_groups[0].update(lr=torch.tensor(0.5), weight_decay=0.25)
    gradients_at(50, params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in params]
    u = update_of(twin, others)  # at lr 0.01
    optimizer.step()
    for p, b, v in zip(params, before, (u / 0.01).split([p.numel() for p in params]), strict=True):
        torch.testing.assert_close(p.detach(), (1 - 0.125) * b - 0.5 * v.view(p.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"momentum": 0.5, "error_dtype": "bf16"}], ids=str)
@EVERY
def test_adding_a_group_mid_run_keeps_the_window(name, options):
    optimizer, params = started(name, **options)
    before = snapshot(optimizer, params)
    new = parameters([(12, 30), (5,)], torch.float32, seed=5)
    optimizer.add_param_group({"params": new, "lr": 0.5, "weight_decay": 0.3})
    optimizer.memory_footprint()
    after = snapshot(optimizer, params)
    assert differences(before, {k: v for k, v in after.items() if not k.startswith("group 1")}) == []
    assert not any(row(optimizer, p, i).any() for p in new for i in range(M))
    assert optimizer.param_groups[1]["lr"] == 0.5 and optimizer.param_groups[1]["weight_decay"] == 0.3
    starts = [p.detach().clone() for p in new]
    everything = [*params, *new]
    train(optimizer, everything, 10, 12)
    assert count(optimizer) == M + 4 and all_finite(optimizer, everything)
    assert all(not torch.equal(p, s) for p, s in zip(new, starts, strict=True))
    if "scope" not in options:
        g = window(optimizer, everything)
        torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


@EVERY
def test_adding_a_group_before_the_first_step(name):
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    late = make(name, a[:3], lr=0.1, window_size=M)
    late.add_param_group({"params": a[3:]})
    early = make(name, [{"params": b[:3]}, {"params": b[3:]}], lr=0.1, window_size=M)
    train(late, a, 0, M + 2)
    train(early, b, 0, M + 2)
    assert differences(snapshot(late, a), snapshot(early, b)) == []


@SCOPES
def test_diagnostics_after_adding_a_group(scope):
    """Those of the last step, or none; all of them after the next one."""
    optimizer, params = started("efcp_lowrank_mfac", scope=scope)
    before = optimizer.diagnostics()
    new = parameters([(3, 4)], torch.float32)
    optimizer.add_param_group({"params": new})
    assert optimizer.diagnostics() in (before, {})
    optimizer.memory_footprint()
    after = optimizer.diagnostics()
    assert after == {} or {k: v for k, v in after.items() if before[k] != v}.keys() <= {"update_rms"}  # d has grown
    train(optimizer, [*params, *new], 10, 11)
    assert optimizer.diagnostics().keys() == before.keys()


@EVERY
def test_closure(name):
    optimizer, params = started(name)
    twin, others = started(name)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [1] and loss.item() > 0
    twin.zero_grad()
    sum((p - 1).square().sum() for p in others).backward()
    assert twin.step() is None
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@EVERY
def test_a_closure_that_fails_changes_nothing(name):
    optimizer, params = started(name)
    before = snapshot(optimizer, params)

    def closure():
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    assert_unchanged(before, optimizer, params)


@EVERY
def test_step_hooks_run(name):
    optimizer, params = started(name)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, 10, 11)
    assert seen == ["before", "after"]


@EVERY
def test_moving_the_model_to_bf16_mid_run_keeps_the_state(name):
    optimizer, params = started(name)
    before = snapshot(optimizer, params)
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()
    optimizer.memory_footprint()
    after = snapshot(optimizer, params)
    assert [d for d in differences(before, after) if d.startswith("state")] == []
    train(optimizer, params, 10, 10 + M + 1)
    assert all(p.dtype == torch.bfloat16 for p in params) and all_finite(optimizer, params)
    g = window(optimizer, params)
    torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)


def halve(params):
    for p in params:
        p.grad = None
        p.data = p.data.float()


@EVERY
def test_moving_the_model_from_fp64_to_fp32_mid_run(name):
    optimizer, params = started(name, dtype=torch.float64)
    rows = window(optimizer, params)
    halve(params)
    optimizer.memory_footprint()
    torch.testing.assert_close(window(optimizer, params).double(), rows, rtol=0, atol=1e-6 * rows.abs().max().item())
    train(optimizer, params, 10, 10 + M + 1)
    assert count(optimizer) == 2 * M + 3 and all_finite(optimizer, params)


def test_moving_to_fp32_where_that_changes_the_row_format():
    """Sparse in fp64, plain in fp32 at this density: the window cannot be kept, and must not be lost in silence."""
    optimizer, params = started("efcp_sparse_mfac", dtype=torch.float64, shapes=[(10, 20)], density=0.7, block_size=32)
    halve(params)
    gradients_at(10, params)
    with pytest.raises(hf_efcp.OptionError, match="does not fit"):
        optimizer.step()


# Settings of torch, random numbers, repeatability --------------------------------------------------------------------------


@EVERY
def test_autocast_around_the_step_changes_nothing(name):
    runs = []
    for enabled in (False, True):
        optimizer, params = started(name, steps=0)
        for t in range(M + 2):
            gradients_at(t, params)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
                assert torch.is_autocast_enabled("cpu") == enabled
        runs.append(snapshot(optimizer, params))
    assert differences(*runs) == []


def test_matmul_precision_is_ignored_and_restored():
    for name in NAMES:
        runs = []
        for precision in ("highest", "medium"):
            before = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision(precision)
                cuda = torch.backends.cuda.matmul.allow_tf32
                optimizer, params = started(name)
                assert torch.get_float32_matmul_precision() == precision
                assert torch.backends.cuda.matmul.allow_tf32 == cuda
            finally:
                torch.set_float32_matmul_precision(before)
            runs.append(snapshot(optimizer, params))
        assert differences(*runs) == []


def test_settings_are_restored_when_a_step_fails(monkeypatch):
    optimizer, params = started("efcp_lowrank_mfac")
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: 1 / 0)
    gradients_at(50, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == precision and torch.is_grad_enabled()


@EVERY
def test_default_dtype_does_not_matter(name):
    runs = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            optimizer, params = started(name, error_dtype="bf16", momentum=0.5, window_momentum=0.5)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(snapshot(optimizer, params))
    assert differences(runs[0], runs[1]) == [] and differences(runs[0], runs[2]) == []


@EVERY
def test_step_works_under_deterministic_algorithms(name):
    try:
        torch.use_deterministic_algorithms(True)
        optimizer, params = started(name)
    finally:
        torch.use_deterministic_algorithms(False)
    twin, others = started(name)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@EVERY
def test_step_draws_from_no_global_generator(name):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer, params = started(name, error_dtype="bf16")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(4)
    twin, others = started(name, error_dtype="bf16")
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer", "error_dtype": "bf16", "window_dtype": "bf16", "momentum": 0.9}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@EVERY
def test_two_runs_are_bit_equal(name, dtype, options):
    a, b = (snapshot(*started(name, dtype=dtype, **options)) for _ in range(2))
    assert differences(a, b) == []


IMPORT = """
import random, sys, warnings
import numpy, torch

def settings():
    return dict(
        dtype=torch.get_default_dtype(), device=torch.get_default_device(), matmul=torch.get_float32_matmul_precision(),
        grad=torch.is_grad_enabled(), threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        deterministic=torch.are_deterministic_algorithms_enabled(), tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn=(torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        mkldnn=torch.backends.mkldnn.enabled, sharing=torch.multiprocessing.get_sharing_strategy(),
        anomaly=torch.is_anomaly_enabled(), convert=torch.__future__.get_overwrite_module_params_on_conversion(),
        torch_random=torch.get_rng_state().tolist(), random=random.getstate(), numpy_random=numpy.random.get_state()[1].tolist(),
    )

before, filters, loaded = settings(), list(warnings.filters), set(sys.modules)
import hf_efcp
assert settings() == before and warnings.filters == filters
assert not torch.cuda.is_initialized()
assert not {"triton", "numba", "wandb"} & (set(sys.modules) - loaded)
p = torch.nn.Parameter(torch.ones(20, 30))
p.grad = torch.ones(20, 30)
for name in hf_efcp.list_optimizers():
    hf_efcp.create_optimizer(name, [p], lr=0.1, window_size=2).step()
assert settings() == before
"""


def test_importing_and_stepping_change_no_global_setting_and_print_nothing():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# Figures ------------------------------------------------------------------------------------------------------------------


@SCOPES
@EVERY
def test_diagnostics_are_plain_finite_numbers_and_change_nothing(name, scope):
    optimizer, params = started(name, steps=0, scope=scope)
    assert optimizer.diagnostics() == {}
    for t in range(M + 2):
        train(optimizer, params, t, t + 1)
        before = snapshot(optimizer, params)
        figures = optimizer.diagnostics()
        assert all(type(k) is str and type(v) is float and np.isfinite(v) for k, v in figures.items())
        assert figures["step"] == t + 1 and figures["rows"] == min(t + 1, M) and figures["skipped_steps"] == 0
        assert figures["update_rms"] == pytest.approx(0.1)
        assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("scope", ["model", "layer"])
@EVERY
def test_diagnostics_against_the_stored_rows(name, scope):
    params = parameters()
    optimizer = make(name, params, window_size=M, scope=scope)
    for t in range(M + 2):
        gradients_at(t, params)
        u = update_of(optimizer, params)
    figures, g = optimizer.diagnostics(), window(optimizer, params)
    c = g[(M + 1) % M]
    errors = torch.cat([error(optimizer, p) for p in params])
    assert figures["row_norm"] == pytest.approx(c.norm().item())
    assert figures["update_norm"] == pytest.approx(u.norm().item())
    assert figures["update_rms"] == pytest.approx(u.square().mean().sqrt().item())
    assert figures["cosine_update_row"] == pytest.approx((u @ c / u.norm() / c.norm()).item())
    assert figures["error_norm"] == pytest.approx(errors.norm().item())
    share = errors.square().sum() / (errors.square().sum() + c.square().sum())
    assert figures["error_share"] == pytest.approx(share.item())
    assert 0 < figures["weight_newest"] <= 1 + 1e-9 and 0 <= figures["weight_age"] <= M - 1


@EVERY
def test_memory_is_constant_and_known_before_the_first_step(name):
    optimizer, params = started(name, steps=0, momentum=0.5)
    before = optimizer.memory_footprint()
    assert count(optimizer) == 0
    train(optimizer, params, 0, 2 * M)
    assert optimizer.memory_footprint() == before
    assert all(type(k) is str and type(v) is int for k, v in before.items())
    assert sum(before.values()) == sum(bits(t).numel() for entry in optimizer.state.values() for t in entry.values())
