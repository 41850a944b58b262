"""Parameters of every kind: frozen, tied, empty, 0-D, integer, complex, half precision."""

import copy

import pytest
import torch
from torch.nn import Parameter

import hf_efcp
from tests.optim.helpers import (
    EVERY,
    SCOPES,
    WINDOWED,
    M,
    all_finite,
    count,
    differences,
    gradients_at,
    same,
    shared,
    snapshot,
    started,
    step_quietly,
    train,
)
from tests.reference import (
    NAMES,
    info,
    known_to,
    make,
    parameters,
    row,
    update_of,
    window,
)


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
@WINDOWED
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
@WINDOWED
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
        given = {"lr": 0.1, **known_to(name, {"window_size": M})}
        lone = hf_efcp.create_optimizer(name, model, **given)
        twice = hf_efcp.create_optimizer(name, [model[0].weight, model[1].weight], **given)
        named = [("a", model[0].weight), ("b", model[1].weight)]
        thrice = hf_efcp.create_optimizer(name, named, **given)
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
    assert not info(name).windowed or all(p.numel() == 0 or row(optimizer, p, 0).any() for p in params)


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


@WINDOWED
def test_parameters_of_several_dtypes(name):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [p for i, d in enumerate(dtypes) for p in parameters([(12, 30), (6,)], d, seed=i)]
    optimizer = make(name, params, lr=0.01, window_size=M, update_rms=0.1)
    train(optimizer, params, 0, M + 2)
    assert [p.dtype for p in params] == [d for d in dtypes for _ in range(2)]
    assert all_finite(optimizer, params)
    for p in params:
        expected = torch.float64 if p.dtype == torch.float64 else torch.float32
        floats = {v.dtype for k, v in optimizer.state[p].items() if v.is_floating_point() and k not in ("gram", "step")}
        assert floats == {expected}
    if info(name).windowed:
        g = window(optimizer, params)
        torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-14)
