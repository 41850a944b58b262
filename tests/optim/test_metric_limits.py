"""Where the metric must agree with something simpler: no metric, a gradient step, Adam, gradients in another unit."""

import pytest
import torch

from tests.optim.helpers import KERNELS, differences, pairwise, snapshot, started
from tests.optim.metric_runs import LOSSY, METRICS, SHAPES, M, beside_reference, gradients_at, step_together
from tests.reference import exact_options, info, make, names, parameters, relative, update_of
from tests.reference_metric import inverse

MFAC = pytest.mark.parametrize("name", names(family="mfac"))
RELATIVE = {"damping_mode": "relative", "damping": 0.1}
OFF = {
    **{"metric": "none", "metric_beta": 0.5, "metric_eps": 0.1},
    **{"window_nesterov": False, "centered": False, "rms_mode": "constant"},
}


OPTIONS = [
    {},
    {"update_rms": None, "window_momentum": 0.5},
    {"scope": "layer", "momentum": 0.9, "weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decay_mode": "l2", "error_dtype": "bf16", "window_dtype": "bf16"},
]


@pairwise(name=names(windowed=True), options=OPTIONS, dtype=[torch.float64, torch.float32, torch.bfloat16], kernels=KERNELS)
@pytest.mark.usefixtures("kernels")
def test_switched_off_it_changes_no_bit(name, dtype, options):
    runs = [snapshot(*started(name, dtype=dtype, **options, **off)) for off in ({}, OFF)]
    assert differences(*runs) == []


@METRICS
@MFAC
def test_huge_damping_is_the_averaged_gradient_in_the_metric(name, metric):
    """u is parallel to S^-1 G^T w."""
    options = {"damping_mode": "relative", "damping": 1e6, "window_momentum": 0.8, "update_rms": 0.3, "lr": 1.0}
    fast, params, slow = beside_reference(name, window_size=M, metric=metric, **options)
    for t in range(2 * M):
        gradients_at(t, params)
        u = torch.cat([move.flatten() for move in step_together(fast, params, slow)])
        averaged = sum(0.8**age * entry for age, entry in enumerate(reversed(slow.entries)))
        expected = torch.cat([inverse(S).flatten() for S in slow.S]) * averaged
        assert relative(u / u.norm(), expected / expected.norm()) < 1e-5


@pytest.mark.parametrize("rms_mode", ["constant", "adam"])
@MFAC
def test_a_diagonal_metric_with_huge_damping_is_adam(name, rms_mode):
    """Gradients of constant magnitude and random sign: v is their square, and each entry is whitened as the newest one.

    u = m / sqrt(v), where m weighs the entries of the window; rms_mode=adam has Adam's size too.
    """
    params, beta = parameters(SHAPES), 0.9
    options = {"metric": "diagonal", "metric_eps": 1e-14, "damping_mode": "relative", "damping": 1e12, "update_rms": 1.0}
    options |= {"window_momentum": beta, "window_size": M, "rms_mode": rms_mode}
    optimizer = make(name, params, **exact_options(name), **options)
    generator, gradients = torch.Generator().manual_seed(0), []
    sizes = [0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in params]
    for t in range(3 * M):
        for p, size in zip(params, sizes, strict=True):
            p.grad = size * (torch.randint(2, p.shape, generator=generator) * 2 - 1)
        gradients = [*gradients, torch.cat([p.grad.flatten() for p in params])][-M:]
        u = update_of(optimizer, params)
        w = [beta**age for age in range(len(gradients) - 1, -1, -1)]
        m = sum(x * g for x, g in zip(w, gradients, strict=True)) / sum(w)
        expected = m / torch.cat([size.flatten() for size in sizes])
        if rms_mode == "constant":
            u, expected = u / u.norm(), expected / expected.norm()
        assert relative(u, expected) < 1e-9, t


@pairwise(name=names(family="mfac"), metric=["none", "factored", "diagonal"], scope=["model", "layer"])
def test_equal_weights_make_centring_a_number(name, metric, scope):
    """Sherman and Morrison: with w = 1/n the mean of the entries is preconditioned. With recent ones heavier it is not."""
    for beta, alike in ((1 - 1e-12, True), (0.5, False)):
        directions = []
        for centered in (False, True):
            params = parameters([(6, 10)] if scope == "layer" else SHAPES)
            options = {"window_momentum": beta, "window_size": M, "divisor": "filled", "metric": metric, "scope": scope}
            options |= {**RELATIVE, "update_rms": 0.3, "centered": centered}
            optimizer = make(name, params, **LOSSY[info(name).compression], **options)
            for t in range(2 * M):
                gradients_at(t, params)
                u = update_of(optimizer, params)
            directions.append(u / u.norm())
        assert relative(*directions) < 1e-9 if alike else relative(*directions) > 1e-2


@pairwise(
    name=names(family="mfac"),
    metric=["none", "tensor", "diagonal", "factored"],
    scope=["model", "layer"],
    rms_mode=["constant", "adam"],
    power=[-20, 20],
)
def test_the_unit_of_the_gradient_does_not_matter(name, metric, scope, rms_mode, power):
    """All gradients times 2^20 or 2^-20, in fp32 with relative damping: the same update."""
    updates = []
    for factor in (1.0, 2.0**power):
        params = parameters(SHAPES, torch.float32)
        options = {**RELATIVE, "window_momentum": 0.8, "window_nesterov": True, "update_rms": 1.0, "window_size": M}
        options |= {"metric": metric, "rms_mode": rms_mode, "scope": scope}
        optimizer = make(name, params, **LOSSY[info(name).compression], **options)
        for t in range(M + 3):
            gradients_at(t, params)
            for p in params:
                p.grad.mul_(factor)
            u = update_of(optimizer, params)
        updates.append(u)
    assert relative(*updates) < 1e-6


@MFAC
def test_only_the_product_of_learning_rate_and_update_rms_counts(name):
    """So one of them is enough to tune."""
    options = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, **RELATIVE}
    runs = []
    for lr, rms in ((0.5, 0.25), (0.125, 1.0)):
        params = parameters(SHAPES)
        optimizer = make(name, params, window_size=M, lr=lr, update_rms=rms, **options)
        for t in range(M + 2):
            gradients_at(t, params)
            optimizer.step()
        runs.append(params)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*runs, strict=True))
