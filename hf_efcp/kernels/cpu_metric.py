"""The metric's sums on CPUs, by numba: the squares of a gradient over rows and columns, and roots, in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Matrices
from .cpu_threads import PARTS, divide_work
from .cpu_tools import REORDERED, Addresses, array, compiled, matrix_row


@compiled(relaxed=REORDERED)
def _square_sum(g, by_col):
    """Give the sum of g^2 over a row g, in fp64; add g^2 to by_col."""
    total = 0.0
    for k in range(g.size):
        square = np.float64(g[k]) * np.float64(g[k])
        total += square
        by_col[k] += square
    return total


@compiled(relaxed=REORDERED)
def _squares(lo, hi, parts, gradients, like, by_row, by_col):
    rows, cols = by_row.shape[1], by_col.shape[2]
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            by_row[t, row] = _square_sum(matrix_row(gradients[t], row, cols, like), by_col[t, part])


@compiled(relaxed=REORDERED)
def _root(d, x):
    """Compute x <- d^(-1/4): 0 where d is 0, NaN where d is not finite; return the sum of d^(1/2)."""
    total = 0.0
    for i in range(d.size):
        root = np.sqrt(d[i])
        total += root
        x[i] = 1 / np.sqrt(root) if 0 < d[i] < np.inf else 0 * d[i]
    return total


@compiled(relaxed=REORDERED)
def measure_columns(c, count, beta, eps, y, numbers):
    """Write y, and each tensor's numbers for `measure_parts`: 1 - beta^(k + 1), the term eps mu, the sum of y^-2 over columns."""
    d = np.empty(c.shape[1])
    for t in range(len(c)):
        mean = 0.0
        for j in range(d.size):
            d[j] = c[t, j]
            mean += d[j]
        mean /= d.size
        if mean > 0:
            for j in range(d.size):
                d[j] = d[j] / mean + eps
        else:
            d[:] = 1.0
        power = beta ** np.float64(count[t])
        numbers[t, 0], numbers[t, 1] = 1 - power * beta, eps * (mean / (1 - power) if count[t] > 0 else mean)
        numbers[t, 2] = _root(d, y[t])


@compiled(relaxed=REORDERED)
def measure_parts(lo, hi, parts, gradients, old, beta, numbers, new, x, roots, by_col):
    """Write, for parts of matrices' rows, the means over rows with g in them, x, sums of x^-2, and sums of g^2 over columns."""
    rows, cols = old.shape[1], by_col.shape[2]
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        start, stop, (divisor, more, _) = rows * part // parts, rows * (part + 1) // parts, numbers[t]
        d = np.empty(stop - start)
        for row in range(start, stop):
            mean = _square_sum(matrix_row(gradients[t], row, cols, old), by_col[t, part]) / cols
            new[t, row] = beta * np.float64(old[t, row]) + (1 - beta) * mean
        for i in range(d.size):
            d[i] = np.float64(new[t, start + i]) / divisor + more
        roots[t, part] = _root(d, x[t, start:stop])


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """Give the sums of g^2 over rows and over columns, (n, rows) and (n, cols) fp64.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
    """
    g = Addresses(gradients)
    parts, by_col = _by_col(g)
    by_row = torch.empty(g.shape[:2], dtype=torch.float64)
    like = array(torch.empty(0, dtype=g.dtype))
    divide_work(_squares, len(by_row) * parts, _numbers(g, parts), parts, g.array, like, array(by_row), array(by_col))
    return by_row, by_col.sum(1)


def measure(
    gradients: Matrices, r: Tensor, c: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """See `core.moments.measured`, which has the same arguments and results. None where the state's dtype is not g's."""
    g = Addresses(gradients)
    if (r.dtype, c.dtype) != (g.dtype, g.dtype):
        return None
    parts, by_col = _by_col(g)
    numbers, new, x, y = (
        torch.empty(len(r), 3, dtype=torch.float64),
        torch.empty_like(r),
        torch.empty_like(r),
        torch.empty_like(c),
    )
    roots = torch.empty(by_col.shape[:2], dtype=torch.float64)
    measure_columns(array(c), array(count), beta, eps, array(y), array(numbers))
    arrays = array(r), beta, *map(array, (numbers, new, x, roots, by_col))
    divide_work(measure_parts, len(r) * parts, _numbers(g, parts), parts, g.array, *arrays)
    return new, x, y, roots.sum(1).mul_(numbers[:, 2]), by_col.sum(1)


def _by_col(g: Addresses) -> tuple[int, Tensor]:
    """Give the number of parts that the rows of a matrix are cut into, and room for each part's sums over columns."""
    n, rows, cols = g.shape
    parts = min(rows, -(-PARTS // n))
    return parts, torch.zeros(n, parts, cols, dtype=torch.float64)


def _numbers(g: Addresses, parts: int) -> int:
    _, rows, cols = g.shape
    return rows * cols // parts
