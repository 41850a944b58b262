"""What the metric reads of a gradient on CPUs, by numba: sums of squares over rows and columns, and roots, in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Matrices
from .cpu_threads import PARTS, divide_work
from .cpu_tools import REORDERED, Addresses, array, compiled, matrix_row


@compiled(relaxed=REORDERED)
def _square_sum(g, by_col):
    """The sum of g^2 over a row, in fp64; g^2 is added to by_col."""
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
def _measure(lo, hi, parts, gradients, old, beta, divisor, more, new, x, roots, by_col):
    rows, cols = old.shape[1], by_col.shape[2]
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        start, stop, total = rows * part // parts, rows * (part + 1) // parts, 0.0
        for row in range(start, stop):
            mean = _square_sum(matrix_row(gradients[t], row, cols, old), by_col[t, part]) / cols
            new[t, row] = beta * np.float64(old[t, row]) + (1 - beta) * mean
        r, to = new[t, start:stop], x[t, start:stop]
        for i in range(r.size):  # in a loop of their own roots are vectorized
            d = np.float64(r[i]) / divisor[t] + more[t]
            root = np.sqrt(d)
            total += root
            to[i] = 1 / np.sqrt(root) if 0 < d < np.inf else 0 * d  # 0 or NaN
        roots[t, part] = total


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """The sums of g^2 over rows and over columns, (n, rows) and (n, cols) fp64.

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
    gradients: Matrices, old: Tensor, beta: float, divisor: Tensor, more: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """r <- beta r + (1 - beta) mean(g^2) for each row, rounded to its dtype;  d = r / divisor + more;  x = d^(-1/4).

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        old: r, (n, rows) in g's dtype.
        beta: a number.
        divisor, more: (n,) fp64.

    Returns:
        r and x, (n, rows) in g's dtype; the sum of d^(1/2) over the rows, (n,) fp64; the sums of g^2 over columns, (n, cols) fp64.
    """
    g = Addresses(gradients)
    if old.dtype != g.dtype:
        return None
    parts, by_col = _by_col(g)
    new, x, roots = torch.empty_like(old), torch.empty_like(old), torch.empty(by_col.shape[:2], dtype=torch.float64)
    arrays = array(old), np.float64(beta), *map(array, (divisor, more, new, x, roots, by_col))
    divide_work(_measure, len(old) * parts, _numbers(g, parts), parts, g.array, *arrays)
    return new, x, roots.sum(1), by_col.sum(1)


def _by_col(g: Addresses) -> tuple[int, Tensor]:
    """Into how many parts the rows of a matrix are cut, and room for the sums of each."""
    n, rows, cols = g.shape
    parts = min(rows, -(-PARTS // n))
    return parts, torch.zeros(n, parts, cols, dtype=torch.float64)


def _numbers(g: Addresses, parts: int) -> int:
    _, rows, cols = g.shape
    return rows * cols // parts
