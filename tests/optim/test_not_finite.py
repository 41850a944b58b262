"""Gradients that are not finite: the step is skipped, counted and leaves no trace."""

import copy
import warnings

import numpy as np
import pytest
import torch

from tests.optim.helpers import (
    EVERY,
    SCOPES,
    M,
    all_finite,
    assert_unchanged,
    count,
    differences,
    gradients_at,
    same,
    snapshot,
    started,
    step_quietly,
    train,
)
from tests.reference import info, make, parameters, set_gradients, update_of, window


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


@pytest.mark.parametrize("way", ["load", "copy"])
@EVERY
def test_skips_of_before_are_not_warned_of_again(name, way):
    optimizer, params = started(name)
    for i in range(2):
        gradients_at(i, params)
        params[0].grad.fill_(float("nan"))
        with pytest.warns(RuntimeWarning, match=f"{i + 1} skipped so far"):
            optimizer.step()
    other, others = copy.deepcopy((optimizer, params))
    if way == "load":
        other, others = started(name)
        other.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, others, 2, 4)
    gradients_at(4, others)
    others[0].grad.fill_(float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.step()  # the third: only powers of two are warned of
    assert not caught
    assert count(other, "skipped") == 3


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
def test_a_frozen_parameters_gradient_is_looked_at_like_any_other(name):
    """What has a gradient is updated, whatever requires_grad says: one that is not finite refuses the step."""
    optimizer, params = started(name)
    params[1].requires_grad_(False)
    before = snapshot(optimizer, params, without=["skipped"])
    gradients_at(99, params)
    params[1].grad = torch.full_like(params[1], float("nan"))
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert_unchanged(before, optimizer, params, without=["skipped"])
    params[1].grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert count(optimizer) == M + 3 and same(params[1], before["parameter 1"])


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
    extra = {"damping": 1e-4} if info(name).family == "mfac" else {}
    optimizer = make(name, params, window_size=6, update_rms=0.1, **extra)
    for t in range(6):
        set_gradients(params, generator, norm=1e6 if t == 2 else 1.0)
        u = update_of(optimizer, params)
        g = window(optimizer, params)[t]
        assert u @ g > 0.9 * u.norm() * g.norm(), f"step {t}"


def test_small_gradients_are_not_swamped_by_a_bf16_error():
    """One entry of each row is always kept; the others wait in the error, each step a thousandth of what is there."""
    (p,) = params = parameters([(16, 16)], torch.float32)
    optimizer = make("efcp_sparse_mfac", params, lr=0.0, window_size=2, density=0.01, block_size=16, error_dtype="bf16")
    gradient = torch.full((16, 16), 1e-4)
    gradient[:, 0] = 100.0
    for _ in range(600):
        p.grad = gradient
        optimizer.step()
    waiting = optimizer.state[p]["error"][:, 1:].double()
    assert waiting.mean().item() == pytest.approx(600 * 1e-4, rel=0.05)  # rounding to nearest would stop at half of it


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
