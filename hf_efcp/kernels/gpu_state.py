"""A step's small state on GPUs, by Triton: the metric of vectors, and writes that depend on whether the step is accepted.

In torch, each of these small tensors would take launches of its own: those of rows and columns, of vectors, of counts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Matrices
from .gpu_tools import (
    Addresses,
    cdiv,
    matrix,
    on,
    power_of_2,
)

# Numbers that a program handles at once.
_RUN = 1024
# A longer vector is left to torch: here one program handles a vector, which would take long.
_LONGEST = 2**20


@triton.jit
def _accepted(flag, MASKED: tl.constexpr):
    """Tell whether the step is accepted: 1 or 0."""
    accepted = 1
    if MASKED:
        accepted = tl.load(flag).to(tl.int32)
    return accepted


@triton.jit
def _mixed(old, new, LARGEST: tl.constexpr, BETA: tl.constexpr):
    """Give beta old + (1 - beta) new in fp64, cut to the largest number that the state can hold."""
    beta, largest = tl.full([], BETA, tl.float64), tl.full([], LARGEST, tl.float64)
    mean = old.to(tl.float64) + (1 - beta) * (new - old.to(tl.float64))
    return tl.where(mean > largest, largest, mean)


@triton.jit
def _remember_factored(
    rows_state, rows_new, cols_state, means, count, x, y, flag, rows, cols, runs,
    BETA: tl.constexpr, LARGEST: tl.constexpr, MASKED: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A program for a run of a tensor's rows and its columns at the same places. A tensor's first program updates the count."""
    t, run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    place = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    row, col = place < rows, place < cols
    if _accepted(flag, MASKED) != 0:
        tl.store(rows_state + t * rows + place, tl.load(rows_new + t * rows + place, mask=row), mask=row)
        old = tl.load(cols_state + t * cols + place, mask=col, other=0.0)
        new = _mixed(old, tl.load(means + t * cols + place, mask=col, other=0.0), LARGEST, BETA)
        tl.store(cols_state + t * cols + place, new.to(old.dtype), mask=col)
        if run == 0:
            seen = tl.load(count + t)
            most = tl.zeros([RUN], dtype=tl.float64)
            for start in range(0, cols, RUN):
                at = start + tl.arange(0, RUN)
                most = tl.maximum(most, tl.load(means + t * cols + at, mask=at < cols, other=0.0))
            tl.store(count + t, seen + tl.where((seen > 0) | (tl.max(most, 0) > 0), 1, 0).to(seen.dtype))
    else:  # a refused step has u = 0, which has to stay 0: 0 * NaN would not
        tl.store(x + t * rows + place, tl.zeros([RUN], dtype=tl.float32).to(x.dtype.element_ty), mask=row)
        tl.store(y + t * cols + place, tl.zeros([RUN], dtype=tl.float32).to(y.dtype.element_ty), mask=col)


@triton.jit
def _remember_diagonal(
    state, values, mean_state, means, count, inverse, flag, cols, runs,
    BETA: tl.constexpr, LARGEST: tl.constexpr, MASKED: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A program for a run of a vector. A vector's first program updates the mean and the count."""
    t, run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    place = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = place < cols
    if _accepted(flag, MASKED) != 0:
        tl.store(state + t * cols + place, tl.load(values + t * cols + place, mask=inside), mask=inside)
        if run == 0:
            old, new, seen = tl.load(mean_state + t), tl.load(means + t), tl.load(count + t)
            tl.store(mean_state + t, _mixed(old, new, LARGEST, BETA).to(old.dtype))
            tl.store(count + t, seen + tl.where((seen > 0) | (new > 0), 1, 0).to(seen.dtype))
    else:
        tl.store(inverse + t * cols + place, tl.zeros([RUN], dtype=tl.float32).to(inverse.dtype.element_ty), mask=inside)


@triton.jit
def _remember(state, new, alive, flag, length, runs, MASKED: tl.constexpr, RUN: tl.constexpr):
    """A program for a run of a tensor's state."""
    t, run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    place = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = place < length * (tl.load(alive + t) != 0).to(tl.int32) * _accepted(flag, MASKED)
    tl.store(state + t * length + place, tl.load(new + t * length + place, mask=inside), mask=inside)


@triton.jit
def _measure_vectors(
    table, like, state, mean_state, count, values, inverse, white, square, means, cols,
    BETA: tl.constexpr, LOG_BETA: tl.constexpr, EPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A program for each vector."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.load(count + t)
    beta, eps = tl.full([], BETA, tl.float64), tl.full([], EPS, tl.float64)
    power = tl.where(k > 0, tl.exp(k.to(tl.float64) * tl.full([], LOG_BETA, tl.float64)), 1.0)
    more = eps * tl.load(mean_state + t).to(tl.float64) / tl.where(k > 0, 1 - power, 1.0)
    roots, squares = tl.zeros([RUN], dtype=tl.float64), tl.zeros([RUN], dtype=tl.float64)
    for start in range(0, cols, RUN):
        at = start + tl.arange(0, RUN)
        inside = at < cols
        g = tl.load(matrix(table, t, like) + at, mask=inside, other=0.0)
        old = tl.load(state + t * cols + at, mask=inside, other=0.0)
        exact = g.to(tl.float64)
        v = (beta * old.to(tl.float64) + (1 - beta) * exact * exact).to(old.dtype)
        d = tl.where(inside, v.to(tl.float64) / (1 - power * beta) + more, 0.0)
        root = tl.sqrt(d)
        small = tl.where(d == 0, 0.0, 1 / tl.sqrt(tl.where(d == 0, 1.0, root)) + 0 * d).to(old.dtype)
        tl.store(values + t * cols + at, v, mask=inside)
        tl.store(inverse + t * cols + at, small, mask=inside)
        tl.store(white + t * cols + at, g * small, mask=inside)
        roots += root
        squares += exact * exact
    tl.store(square + t, tl.sum(roots, 0))
    tl.store(means + t, tl.sum(squares, 0) / cols)


def measure_vectors(
    gradients: Matrices, v: Tensor, mean: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Measure the metric D of vectors: see `core.metric.Diagonal`.

    Args:
        gradients: g, n matrices (1, cols) in fp32 or fp64.
        v, mean, count: the state, (n, 1, cols) and (n,) in g's dtype and (n,) int64.
        beta, eps: of D.

    Returns:
        v with g in it, S^-1, S^-1 g, each (n, 1, cols) in g's dtype; the sum of S^2 and the mean of g^2, each (n,) fp64. None
        where the state's dtype is not g's, and for vectors of more than 2^20 numbers.
    """
    g = Addresses(gradients)
    n, _, cols = g.shape
    if (v.dtype, mean.dtype) != (g.like.dtype, g.like.dtype) or cols > _LONGEST:
        return None
    values, inverse, white = (torch.empty_like(v) for _ in range(3))
    square, means = (torch.empty(n, dtype=torch.float64, device=v.device) for _ in range(2))
    with on(v):
        _measure_vectors[(n,)](
            g.table, g.like, v, mean, count, values, inverse, white, square, means, cols,
            BETA=beta, LOG_BETA=math.log(beta) if beta else -1e300, EPS=eps, RUN=min(_RUN, power_of_2(cols)),
        )  # fmt: skip
    return values, inverse, white, square, means


def remember_factored(
    state: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    means: Tensor,
    scale: tuple[Tensor, Tensor],
    beta: float,
    accepted: Tensor | bool,
) -> bool:
    """Put a gradient into the running means of D if the step is accepted; else set x and y of S^-1 to zero.

    Args:
        state: r (n, rows) and c (n, cols) in one dtype, and the count (n,) int64.
        rows: r with the gradient in it.
        means: of the gradient's squares over each column, (n, cols) fp64.
        scale: x (n, rows) and y (n, cols).
        beta: of the running means.
        accepted: a 0-D flag, or True.
    """
    r, c, count = state
    n, longest = len(r), max(r.shape[1], c.shape[1])
    run = min(_RUN, power_of_2(longest))
    runs = cdiv(longest, run)
    with on(r):
        _remember_factored[(n * runs,)](
            r, rows.contiguous(), c, means.contiguous(), count, *scale, _flag(accepted, count), r.shape[1], c.shape[1], runs,
            BETA=beta, LARGEST=torch.finfo(c.dtype).max, MASKED=accepted is not True, RUN=run,
        )  # fmt: skip
    return True


def remember_diagonal(
    state: tuple[Tensor, Tensor, Tensor], values: Tensor, means: Tensor, inverse: Tensor, beta: float, accepted: Tensor | bool
) -> bool:
    """Put a gradient into the running means of vectors if the step is accepted; else set S^-1 to zero.

    Args:
        state: v (n, 1, cols) and mean (n,) in one dtype, and the count (n,) int64.
        values: v with the gradient in it.
        means: of the gradient's squares, (n,) fp64.
        inverse: S^-1, (n, 1, cols).
        beta, accepted: as above.
    """
    v, mean, count = state
    n, _, cols = v.shape
    run = min(_RUN, power_of_2(cols))
    runs = cdiv(cols, run)
    with on(v):
        _remember_diagonal[(n * runs,)](
            v, values, mean, means.contiguous(), count, inverse, _flag(accepted, count), cols, runs,
            BETA=beta, LARGEST=torch.finfo(v.dtype).max, MASKED=accepted is not True, RUN=run,
        )  # fmt: skip
    return True


def remember(state: Tensor, new: Tensor, alive: Tensor, accepted: Tensor | bool) -> bool:
    """Copy `new` into the state (n, ...) of the same dtype, if the step is accepted, for tensors whose `alive` (n,) is not 0."""
    if state.dtype != new.dtype or not state.is_contiguous():
        return False
    length = state[0].numel()
    run = min(_RUN, power_of_2(length))
    runs = cdiv(length, run)
    with on(state):
        _remember[(len(state) * runs,)](
            state, new.contiguous(), alive, _flag(accepted, alive), length, runs, MASKED=accepted is not True, RUN=run
        )
    return True


def _flag(accepted: Tensor | bool, other: Tensor) -> Tensor:
    """Give the flag, on the device of `other`. Without a flag, `other`: the kernel does not read it."""
    return accepted.to(other.device) if isinstance(accepted, Tensor) else other
