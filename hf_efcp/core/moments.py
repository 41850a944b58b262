"""The numbers of a metric, as functions of tensors: sums of squares of gradients, the factors of D, and roots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from .linalg import row_chunks


def inverse_root(d: Tensor) -> Tensor:
    """Give d^(-1/4), 0 where d is 0, and NaN where d is not finite."""
    return d.rsqrt().sqrt_().nan_to_num_(nan=torch.nan, posinf=0.0).add_(0 * d)


def square_sums(gradients: kernels.Matrices) -> Tensor:
    """Sum the squares of each of n matrices in fp64, (n,)."""
    if isinstance(gradients, Tensor):
        return torch.linalg.vector_norm(gradients, dim=(1, 2), dtype=torch.float64).square()
    sums = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
    for i, g in enumerate(gradients):
        for part in row_chunks([g]):
            sums[i] += torch.linalg.vector_norm(g[part], dtype=torch.float64).square()
    return sums


def divisors(count: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Give 1 - beta^k and 1 - beta^(k + 1) for counts k (n,), in fp64. At k = 0 the first of them is 1."""
    power = beta ** count.double()
    return 1 - power * (count > 0), 1 - power * beta


def measured(
    gradients: Sequence[Tensor], r: Tensor, c: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the factors of S^-1, for D with g in it.

    Args:
        gradients: g, n matrices (rows, cols).
        r, c, count: the state, (n, rows) and (n, cols) in g's dtype and (n,) int64.
        beta, eps: of D.

    Returns:
        In g's dtype: r with g in it, x (n, rows) and y (n, cols) of S^-1. In fp64: the sum of S^2, (n,), and the sums of g^2 over
        each column, (n, cols).
    """
    fast = kernels.measure(gradients, r, c, count, beta, eps)
    if fast is not None:
        return fast
    rows, cols = squares(gradients)
    r = (beta * r.double() + (1 - beta) * (rows / c.shape[1])).to(r.dtype)
    last, now = divisors(count, beta)
    more, d_cols = columns(c, last, eps)
    d_rows = r.double() / now[:, None] + more[:, None]
    x, y = (inverse_root(d).to(r.dtype) for d in (d_rows, d_cols))
    return r, x, y, d_rows.sqrt().sum(1) * d_cols.sqrt().sum(1), cols


def columns(c: Tensor, divisor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give eps mu, (n,), and c / mu + eps, (n, cols), in fp64, for the state's c and the divisor of its means."""
    c = c.double()
    mu = c.mean(1)
    seen = mu > 0
    return eps * mu / divisor, torch.where(seen[:, None], (c / torch.where(seen, mu, 1.0)[:, None]).add_(eps), 1.0)


def squares(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum the squares of n matrices (rows, cols) over each row and each column: (n, rows) and (n, cols), fp64."""
    fast = kernels.squares(gradients)
    if fast is not None:
        return fast
    n, (rows, cols), device = len(gradients), gradients[0].shape, gradients[0].device
    by_row = torch.empty(n, rows, dtype=torch.float64, device=device)
    by_col = torch.zeros(n, cols, dtype=torch.float64, device=device)
    for i, g in enumerate(gradients):
        for part in row_chunks([g]):
            square = g[part].double().square()
            by_row[i, part] = square.sum(1)
            by_col[i] += square.sum(0)
    return by_row, by_col
