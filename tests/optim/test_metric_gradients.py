"""Gradients that have led other metrics astray: rare rows, spikes, blocks of other sizes, tensors that wake up late."""

import pytest
import torch
from torch.nn import Parameter

from tests.optim.helpers import KERNELS, all_finite, assert_unchanged, clones, count, pairwise, snapshot, started, step_quietly
from tests.optim.metric_runs import LOSSY, M, beside_reference, gradients_at, name_of, step_together
from tests.reference import info, make, names, relative, update_of

EVERY = pytest.mark.parametrize("name", names(windowed=True))
FAMILY_BY_COMPRESSION = pairwise(
    compression=["dense", "sparse", "low rank"], metric=["tensor", "diagonal", "factored"], family=["mfac", "ggt"]
)
# Adam's size with update_rms 1: an update of about 1 per coordinate at most.
OPTIONS = {
    **{"damping_mode": "relative", "damping": 0.1, "eps": 1e-2, "window_momentum": 0.9, "window_nesterov": True},
    **{"update_rms": 1.0, "rms_mode": "adam", "window_size": M, "lr": 1.0},
}


def row_sizes(u):
    """Root mean square of each row."""
    return u.square().mean(1).sqrt()


@pairwise(family=["mfac", "ggt"], compression=["dense", "sparse", "low rank"], metric=["factored", "diagonal"])
def test_rows_that_are_rarely_seen(family, compression, metric):
    """Token rows with Zipf's frequencies. A row that was not seen for long must not enter with the size of its old mean."""
    name = name_of(family, compression)
    fast, params, slow = beside_reference(name, [(100, 8), (6, 8), (6,)], metric=metric, metric_beta=0.9, **OPTIONS)
    generator, largest = torch.Generator().manual_seed(0), 0.0
    frequency = 1 / torch.arange(1, 101, dtype=torch.float64)
    for _ in range(50):
        tokens = torch.multinomial(frequency, 16, replacement=True, generator=generator)
        noise = torch.randn(16, 8, generator=generator, dtype=torch.float64)
        params[0].grad = torch.zeros(100, 8, dtype=torch.float64).index_add(0, tokens, noise)
        for p in params[1:]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        table, *_ = step_together(fast, params, slow, bound=1e-8)
        largest = max(largest, row_sizes(table).max())
    assert 0.5 < largest < 6  # 15 to 20 where row means are those of the step before


@FAMILY_BY_COMPRESSION
def test_a_spike(family, compression, metric):
    """One gradient of 10,000 times the usual size: the update stays of the usual size, and the others are not lost."""
    name = name_of(family, compression)
    fast, params, slow = beside_reference(name, metric=metric, metric_beta=0.9, **OPTIONS)
    # D of the step before: the spike enters 1e4 times as large, what follows 56 times smaller. GGT takes eigenvalues of K, whose
    # rounding errors are 1e-16 of the largest: the square of 5.6e5 times the others' norms.
    bound = 1e-3 if metric == "tensor" and info(name).family == "ggt" else 1e-7
    for t in range(4 * M):
        gradients_at(t, params)
        for p in params:
            p.grad *= 1e4 if t == M + 1 else 1
        moves = step_together(fast, params, slow, bound)
        assert max(move.abs().max() for move in moves) < 20  # 24 to 50 where row means are those of the step before
    assert sum(move.norm() for move in moves) > 0.1


@EVERY
def test_a_small_block_beside_a_large_one(name):
    """Row and column means do not see which row meets which column: D of the small block is too small by 1e6."""
    fast, params, slow = beside_reference(name, [(8, 8)], metric="factored", metric_beta=0.9, **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3 * M):
        g = torch.zeros(8, 8, dtype=torch.float64)
        g[:4, :4] = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        g[4:, 4:] = 1000 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
        params[0].grad = g
        (u,) = step_together(fast, params, slow, bound=1e-7)
        assert u.abs().max() < 10


@pairwise(metric=["tensor", "diagonal", "factored"], compression=["dense", "low rank"], family=["mfac", "ggt"])
def test_a_tensor_whose_first_hundred_gradients_are_zero(family, compression, metric):
    """The tensor stays, and the others train as if it did not exist; then it moves like any other."""
    name = name_of(family, compression)
    # At full rank: power iteration carries rounding errors above 1e-9 within 100 steps.
    options = {"metric": metric, "metric_beta": 0.9, **OPTIONS, "lr": 0.01, "rank": 10_000}
    fast, params, slow = beside_reference(name, [(6, 10), (12, 5), (7,), (5, 8), (3,)], **options)
    alone, others, _ = beside_reference(name, [(6, 10), (12, 5), (7,)], **options)
    late, start = params[3:], clones(params[3:])
    for t in range(100):
        gradients_at(t, others)
        gradients_at(t, params)
        for p in late:
            p.grad.zero_()
        step_together(fast, params, slow)
        alone.step()
    assert all(torch.equal(p, q) for p, q in zip(late, start, strict=True))
    assert all(relative(p.detach(), q.detach()) < 1e-9 for p, q in zip(params[:3], others, strict=True))
    for t in range(100, 100 + M):
        gradients_at(t, params)
        moves = step_together(fast, params, slow)
        assert all(0 < move.abs().max() < 0.1 for move in moves)
    assert all_finite(fast, params)


@pairwise(name=names(windowed=True), metric=["tensor", "diagonal", "factored"], scope=["model", "layer"])
def test_the_first_three_steps_of_lora(name, scope, metric):
    """B is zero: A's first gradient is zero. Real gradients of a product x A^T B^T."""
    fast, params, slow = beside_reference(name, [(4, 20), (16, 4)], metric=metric, scope=scope, **{**OPTIONS, "lr": 0.01})
    generator = torch.Generator().manual_seed(0)
    for q in (params[1], slow.params[1]):
        q.data.zero_()
    a, b = params
    start = a.detach().clone()
    x, y = torch.randn(64, 20, generator=generator, dtype=a.dtype), torch.randn(64, 16, generator=generator, dtype=a.dtype)
    # With one matrix for each tensor, M-FAC gives the tensor of small gradients nearly all of the update.
    losses, largest = [], 0.1 if scope == "model" else 0.3
    for t in range(3):
        fast.zero_grad()
        loss = (x @ a.T @ b.T - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert a.grad.any() == (t > 0)
        moves = step_together(fast, params, slow)
        assert torch.equal(a, start) == (t == 0)
        assert moves[1].any() and all(move.abs().max() < largest for move in moves)
    assert losses[2] < losses[0] and all_finite(fast, params)


@FAMILY_BY_COMPRESSION
def test_lora_trains(family, compression, metric):
    name = name_of(family, compression)
    generator = torch.Generator().manual_seed(0)
    a, b = Parameter(torch.randn(4, 20, generator=generator) / 4), Parameter(torch.zeros(16, 4))
    x = torch.randn(64, 20, generator=generator)
    y = x @ torch.randn(20, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    given = {key: value for key, value in {**OPTIONS, "lr": 0.02, "metric": metric}.items() if key in info(name).options()}
    optimizer = make(name, [a, b], **{**LOSSY[info(name).compression], **given})
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (x @ a.T @ b.T - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pairwise(name=names(windowed=True), metric=["tensor", "diagonal", "factored"], scope=["model", "layer"], kernels=KERNELS)
@pytest.mark.usefixtures("kernels")
def test_a_gradient_that_is_not_finite_leaves_the_metric(name, metric, scope):
    optimizer, params = started(name, metric=metric, scope=scope, weight_decay=0.1)
    for i in range(len(params)):
        gradients_at(99, params)
        params[i].grad.view(-1)[-1] = [float("nan"), float("inf"), float("-inf")][i % 3]
        before = snapshot(optimizer, params, without=["skipped"])
        step_quietly(optimizer)
        assert_unchanged(before, optimizer, params, without=["skipped"])
        assert count(optimizer, "skipped") == i + 1


@FAMILY_BY_COMPRESSION
def test_tiny_and_zero_gradients(family, compression, metric):
    """Squares below the smallest fp32 number; a whole window of zeros; then gradients again: everything stays finite."""
    name = name_of(family, compression)
    optimizer, params = started(name, steps=0, metric=metric, update_rms=1.0)
    for t, factor in enumerate([1e-25] * (M + 1) + [0.0] * (M + 1) + [1.0] * M):
        gradients_at(t, params)
        for p in params:
            p.grad.mul_(factor)
        u = update_of(optimizer, params)
        assert u.isfinite().all() and all_finite(optimizer, params)
    assert u.norm() > 0.1
