"""Products of e + g with r columns on GPUs, by Triton. e + g is formed in registers, from g and from e as it is stored."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Error, Matrices, Scale
from .gpu_tools import (
    Addresses,
    Errors,
    accumulated_at,
    cdiv,
    divided,
    factors,
    matrix,
    on,
    power_of_2,
    reads,
)

# Rows and columns of a tile of e + g. A few columns of q are multiplied one by one, into a tile of sums with three dimensions,
# which is added up at the end. More columns go to Triton's products, which read the side that is summed over into registers.
_FEW_TILE = 16, 64
_TIMES_TILE, _TRANSPOSED_TILE = (64, 32), (32, 64)
# The shortest side that Triton's products take.
_SHORTEST = tl.constexpr(16)
_LARGEST_RANK = 32


@triton.jit
def _times(
    table, like, error, scales, left, right, q, out, n, rows, cols, rank, parts, each,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program forms some rows of a tensor's product, from a part of the columns of a: out (parts, n, rank, rows)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(rows, ROWS)
    t = (rest // groups).to(tl.int64)
    row = (rest % groups * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, R).to(tl.int64)
    gradient = matrix(table, t, like)
    total = tl.zeros([ROWS, R] if R >= _SHORTEST else [ROWS, R, COLS], dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, cols), COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        mask = (row < rows) & (col < cols)
        a = accumulated_at(gradient, error, scales, left, right, t, row, col, mask, rows, cols, 1.0, FORMAT, SCALED)
        weights = tl.load(q + (t * rank + k[:, None]) * cols + col, mask=(k[:, None] < rank) & (col < cols), other=0.0)
        if R >= _SHORTEST:
            total += tl.dot(a, tl.trans(weights), input_precision="ieee")
        else:
            total += a[:, None, :] * weights[None, :, :]
    if R < _SHORTEST:
        total = tl.sum(total, 2)
    place = ((part * n + t) * rank + k[None, :]) * rows + row
    tl.store(out + place, total, mask=(row < rows) & (k[None, :] < rank))


@triton.jit
def _transposed_times(
    table, like, error, scales, left, right, p, out, n, rows, cols, rank, parts, each,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program forms some columns of a tensor's product, from a part of the rows of a: out (parts, n, rank, cols)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(cols, COLS)
    t = (rest // groups).to(tl.int64)
    col = (rest % groups * COLS + tl.arange(0, COLS))[None, :]
    k = tl.arange(0, R).to(tl.int64)[:, None]
    gradient = matrix(table, t, like)
    total = tl.zeros([R, COLS] if R >= _SHORTEST else [ROWS, R, COLS], dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, rows), ROWS):
        within = (start + tl.arange(0, ROWS)).to(tl.int64)
        row = within[:, None]
        mask = (row < rows) & (col < cols)
        a = accumulated_at(gradient, error, scales, left, right, t, row, col, mask, rows, cols, 1.0, FORMAT, SCALED)
        weights = tl.load(p + (t * rank + k) * rows + within[None, :], mask=(k < rank) & (within[None, :] < rows), other=0.0)
        if R >= _SHORTEST:
            total += tl.dot(weights, a, input_precision="ieee")
        else:
            total += a[:, None, :] * tl.trans(weights)[:, :, None]
    if R < _SHORTEST:
        total = tl.sum(total, 0)
    tl.store(out + ((part * n + t) * rank + k) * cols + col, total, mask=(k < rank) & (col < cols))


def times(gradients: Matrices, error: Error, q: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Multiply a = e + g by q^T; None for fp64, and for r above 32. a is formed in registers only.

    Args:
        gradients: g, n matrices (rows, cols) in fp32.
        error: e.
        q: (n, r, cols) in fp32.
        scale: of g.
        wide: has no effect: a GPU has one order of sums.

    Returns:
        (n, rows, r) in fp32, as a view of (n, r, rows).
    """
    if not _fits(gradients, error, q):
        return None
    g, rank = Addresses(gradients), q.shape[1]
    n, rows, cols = g.shape
    height, width = _tile(rank, _TIMES_TILE)
    programs = n * cdiv(rows, height)
    parts, each = divided(cols, width, programs)
    out = q.new_empty(parts, n, rank, rows)
    _launch(_times, programs * parts, g, error, scale, q, out, parts, each, height, width)
    return (out[0] if parts == 1 else out.sum(0)).mT


def transposed_times(gradients: Matrices, error: Error, p: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Multiply p (n, r, rows) by a = e + g: (n, r, cols) in fp32. The rest is as in `times`."""
    if not _fits(gradients, error, p):
        return None
    g, rank = Addresses(gradients), p.shape[1]
    n, rows, cols = g.shape
    height, width = _tile(rank, _TRANSPOSED_TILE)
    programs = n * cdiv(cols, width)
    parts, each = divided(rows, height, programs)
    out = p.new_empty(parts, n, rank, cols)
    _launch(_transposed_times, programs * parts, g, error, scale, p, out, parts, each, height, width)
    return out[0] if parts == 1 else out.sum(0)


def _fits(gradients: Matrices, error: Error, factor: Tensor) -> bool:
    return factor.shape[1] <= _LARGEST_RANK and reads(error) and {gradients[0].dtype, factor.dtype} == {torch.float32}


def _padded(rank: int) -> int:
    return power_of_2(rank)


def _tile(rank: int, of_products: tuple[int, int]) -> tuple[int, int]:
    """Give rows and columns of a tile."""
    return of_products if _padded(rank) >= _SHORTEST.value else _FEW_TILE


def _launch(
    kernel: Any, programs: int, g: Addresses, error: Error, scale: Scale, factor: Tensor, out: Tensor,
    parts: int, each: int, height: int, width: int,
) -> None:  # fmt: skip
    n, rows, cols = g.shape
    e, (left, right, scaled), rank = Errors(error, g.like), factors(scale, g.like), factor.shape[1]
    with on(factor):
        kernel[(programs,)](
            g.table, g.like, *e.arrays, left, right, factor.contiguous(), out, n, rows, cols, rank, parts, each,
            FORMAT=e.format, SCALED=scaled, R=_padded(rank), ROWS=height, COLS=width, num_stages=1,
        )  # fmt: skip
