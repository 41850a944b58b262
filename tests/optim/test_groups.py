"""Groups, closures, and what changes in mid-run."""

import pytest
import torch

import hf_efcp
from tests.optim.helpers import (
    EVERY,
    SCOPES,
    WINDOWED,
    M,
    all_finite,
    assert_unchanged,
    count,
    differences,
    gradients_at,
    shared,
    snapshot,
    started,
    train,
)
from tests.reference import (
    make,
    parameters,
    row,
    update_of,
    window,
)


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
@WINDOWED
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


@WINDOWED
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


@WINDOWED
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
