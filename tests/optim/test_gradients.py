"""Gradients that are absent, zero, sparse, oddly laid out."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from tests.optim.helpers import (
    DTYPES,
    EVERY,
    SCOPES,
    WINDOWED,
    M,
    all_finite,
    assert_unchanged,
    count,
    differences,
    gradients_at,
    same,
    shared,
    snapshot,
    started,
    train,
)
from tests.reference import error, make, names, parameters, row, window


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "layer", "error_dtype": "bf16", "window_dtype": "bf16"}, {"weight_decay": 0.1, "weight_decay_mode": "l2"}],
    ids=str,
)
@pytest.mark.parametrize("absent", [[0, 1], [2, 3, 6], [0, 1, 2, 3, 4, 5]], ids=str)
@WINDOWED
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
@pytest.mark.parametrize("name", names(compression="dense", windowed=True))
def test_an_absent_gradient_does_to_the_others_what_zeros_do_where_entries_are_exact(name, scope):
    """The window, K and the other tensors are bit for bit those of a gradient of zeros; the tensor and its momentum stay."""
    options = {"scope": scope, "weight_decay": 0.1, "momentum": 0.5, "update_rms": None, "lr": 1e-6}
    optimizer, params = started(name, **options)
    twin, others = started(name, **options)
    left_behind = set()
    for t in range(10, 10 + M):
        i = t % 7
        gradients_at(t, params, pull=0.0)
        gradients_at(t, others, pull=0.0)
        params[i].grad = None
        others[i].grad.zero_()
        parameter, momentum = params[i].detach().clone(), optimizer.state[params[i]]["momentum"].clone()
        optimizer.step()
        twin.step()
        assert same(params[i], parameter) and same(optimizer.state[params[i]]["momentum"], momentum)
        left_behind |= {f"parameter {i}", f"state {i} momentum"}
        assert set(differences(snapshot(optimizer, params), snapshot(twin, others))) <= left_behind


@WINDOWED
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


@WINDOWED
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


@EVERY
def test_zero_gradients_only_allocate_after_a_skipped_first_step(name):
    optimizer, params = started(name, steps=0)
    gradients_at(0, params)
    params[0].grad.fill_(float("nan"))
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    zero_gradients(params)
    optimizer.step()
    assert count(optimizer) == 0


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
@pytest.mark.parametrize("name", names(family="mfac"))
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
    """Transposed, channels-last and lazily negated parameters, expanded and strided gradients: bit for bit the contiguous run."""
    runs = []
    for odd in (False, True):
        params = parameters([(12, 30), (8, 3, 3, 3), (9,), (5, 7)], torch.float32)
        if odd:
            params[0] = Parameter(params[0].detach().T.contiguous().T)
            params[1] = Parameter(params[1].detach().contiguous(memory_format=torch.channels_last))
            params[3] = Parameter(torch._neg_view(-params[3].detach()))
            assert params[3].is_contiguous() and params[3].is_neg()
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
