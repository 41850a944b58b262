"""Optimal Brain Surgeon on the rows of a matrix: what removing weights costs, and what the others then become.

Symbols: rows z (rows, d); H (d, d), the Hessian that all rows share, positive definite; H^-1 its inverse; keep (rows, d) bool, Q
where it is true and S where it is false. A row has the model m(w) = (w - z)^T H (w - z) / 2, and S has to become zero.
Everything is computed in the dtype that is given: fp64 for anything that is inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.linalg import chunks

# Bytes of the systems that are solved together.
ROOM = 128 * 2**20


def top_k(z: Tensor, k: int) -> Tensor:
    """Tell which k entries of each row have the largest magnitude, (rows, d) bool; among equal ones the first count."""
    order = z.abs().sort(dim=-1, descending=True, stable=True).indices[..., : max(0, k)]
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order, True)


def model_value(w: Tensor, z: Tensor, hessian: Tensor) -> Tensor:
    """Give (w - z)^T H (w - z) / 2 of each row, (rows,)."""
    difference = w - z
    return ((difference @ hessian) * difference).sum(-1) / 2


def obs_projection(z: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
    """Give z - H^-1[:, S] (H^-1[S, S])^-1 z_S: the minimiser of m with zeros on S (Optimal Brain Surgeon).

    Args:
        z: (rows, d).
        inverse: H^-1, (d, d).
        keep: Q, (rows, d) bool.

    Returns:
        (rows, d), exactly zero outside of Q.
    """
    result = torch.zeros_like(z)
    for rows, columns, valid in _systems(~keep):
        multipliers = _solved(inverse, columns, valid, z[rows].gather(1, columns))
        full = torch.zeros_like(z[rows]).scatter_(1, columns, multipliers)
        result[rows] = z[rows] - full @ inverse
    return torch.where(keep, result, 0.0)


def removal_cost(z: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
    """Give z_S^T (H^-1[S, S])^-1 z_S / 2 of each row, (rows,): the value of m at `obs_projection`."""
    cost = z.new_zeros(len(z))
    for rows, columns, valid in _systems(~keep):
        removed = torch.where(valid, z[rows].gather(1, columns), 0.0)
        cost[rows] = (removed * _solved(inverse, columns, valid, removed)).sum(1) / 2
    return cost


def restricted_least_squares(hessian: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Give H[Q, Q]^-1 b_Q: the minimiser of w^T H w / 2 - b^T w with zeros outside of Q. With b = H z it is `obs_projection`.

    Args:
        hessian: H, (d, d).
        target: b, (rows, d).
        keep: Q, (rows, d) bool.

    Returns:
        (rows, d), exactly zero outside of Q.
    """
    result = torch.zeros_like(target)
    for rows, columns, valid in _systems(keep):
        values = _solved(hessian, columns, valid, target[rows].gather(1, columns))
        result[rows] = torch.zeros_like(target[rows]).scatter_(1, columns, values)
    return result


def _systems(chosen: Tensor):
    """Give (rows, columns, valid) a few rows at a time: the columns that a row has chosen, filled up to one number of columns.

    Rows of like counts come together, so that little is filled up. `columns` is (some rows, k) int64, `valid` bool.
    """
    counts = chosen.sum(1)
    order = counts.argsort()
    start = 0
    while start < len(order):
        # The last row of a chunk has the most columns: two rounds find a size that fits.
        size = len(order) - start
        for _ in range(2):
            most = int(counts[order[min(start + size, len(order)) - 1]])
            size = max(1, min(size, ROOM // (8 * max(1, most) ** 2)))
        rows = order[start : start + size]
        most = int(counts[rows[-1]])
        columns = chosen[rows].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        yield rows, columns, chosen[rows].gather(1, columns)
        start += size


def _solved(matrix: Tensor, columns: Tensor, valid: Tensor, right: Tensor) -> Tensor:
    """Solve matrix[Q, Q] x = right of each row; x is zero where a column is not valid."""
    if not columns.shape[1]:
        return right
    systems = matrix[columns[:, :, None], columns[:, None, :]]
    systems *= valid[:, :, None] & valid[:, None, :]
    systems.diagonal(dim1=1, dim2=2).add_((~valid).to(matrix.dtype))
    right = torch.where(valid, right, 0.0)[:, :, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky(systems))[:, :, 0]


def pieces_of(rows: int, d: int) -> list[slice]:
    """Give rows whose own d x d matrices in fp64 fit in the room."""
    return list(chunks(rows, 8 * d * d, ROOM))
