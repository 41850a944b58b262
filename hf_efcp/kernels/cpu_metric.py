"""Sums of squares over rows and columns on CPUs, by numba: a gradient is read once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Matrices
from .cpu_threads import PARTS, divide_work
from .cpu_tools import REORDERED, Addresses, array, compiled, matrix_row


@compiled(relaxed=REORDERED)
def _squares(lo, hi, parts, gradients, like, by_row, by_col):
    rows, cols = by_row.shape[1], by_col.shape[2]
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        to = by_col[t, part]
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            g, total = matrix_row(gradients[t], row, cols, like), 0.0
            for k in range(cols):
                square = np.float64(g[k]) * np.float64(g[k])
                total += square
                to[k] += square
            by_row[t, row] = total


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """The sums of g^2 over rows and over columns, (n, rows) and (n, cols) fp64.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
    """
    g = Addresses(gradients)
    n, rows, cols = g.shape
    parts = min(rows, -(-PARTS // n))
    by_row = torch.empty(n, rows, dtype=torch.float64)
    by_col = torch.zeros(n, parts, cols, dtype=torch.float64)
    like = array(torch.empty(0, dtype=g.dtype))
    divide_work(_squares, n * parts, rows * cols // parts, parts, g.array, like, array(by_row), array(by_col))
    return by_row, by_col.sum(1)
