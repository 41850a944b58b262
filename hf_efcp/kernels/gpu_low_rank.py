"""Products of e + g with r columns on GPUs, by Triton: e + g is formed in registers, from g and from e as it is stored."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Error, Matrices, Scale
from .gpu_tools import Addresses, Errors, accumulated_at, divided, factors, matrix, on, reads

# A tile of e + g, in fp32: 32 numbers for each thread of 4 warps. Triton's products have no side below 16.
_ROWS, _COLS = 64, 64
_SHORTEST = 16
_LARGEST_RANK = 32


@triton.jit
def _times(
    table, like, error, scales, left, right, q, out, n, rows, cols, rank, parts, each,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for some rows of a tensor and a part of the columns: out (parts, n, rank, rows)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(rows, ROWS)
    t = (rest // groups).to(tl.int64)
    row = (rest % groups * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, R).to(tl.int64)
    gradient = matrix(table, t, like)
    total = tl.zeros([ROWS, R], dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, cols), COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        mask = (row < rows) & (col < cols)
        a = accumulated_at(gradient, error, scales, left, right, t, row, col, mask, rows, cols, 1.0, FORMAT, SCALED)
        weights = tl.load(q + (t * rank + k[:, None]) * cols + col, mask=(k[:, None] < rank) & (col < cols), other=0.0)
        total += tl.dot(a, tl.trans(weights), input_precision="ieee")
    place = ((part * n + t) * rank + k[None, :]) * rows + row
    tl.store(out + place, total, mask=(row < rows) & (k[None, :] < rank))


@triton.jit
def _transposed_times(
    table, like, error, scales, left, right, p, out, n, rows, cols, rank, parts, each,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for some columns of a tensor and a part of the rows: out (parts, n, rank, cols)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(cols, COLS)
    t = (rest // groups).to(tl.int64)
    col = (rest % groups * COLS + tl.arange(0, COLS))[None, :]
    k = tl.arange(0, R).to(tl.int64)[:, None]
    gradient = matrix(table, t, like)
    total = tl.zeros([R, COLS], dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, rows), ROWS):
        within = (start + tl.arange(0, ROWS)).to(tl.int64)
        row = within[:, None]
        mask = (row < rows) & (col < cols)
        a = accumulated_at(gradient, error, scales, left, right, t, row, col, mask, rows, cols, 1.0, FORMAT, SCALED)
        weights = tl.load(p + (t * rank + k) * rows + within[None, :], mask=(k < rank) & (within[None, :] < rows), other=0.0)
        total += tl.dot(weights, a, input_precision="ieee")
    tl.store(out + ((part * n + t) * rank + k) * cols + col, total, mask=(k < rank) & (col < cols))


def times(gradients: Matrices, error: Error, q: Tensor, scale: Scale = None) -> Tensor | None:
    """Multiply a = e + g, which is not formed, by q^T; None for fp64, and for more than 32 columns.

    Args:
        gradients: g, n matrices (rows, cols) in fp32.
        error: e.
        q: (n, r, cols) in fp32.
        scale: of g.

    Returns:
        (n, rows, r) in fp32, as a view of (n, r, rows).
    """
    out = _product(_times, gradients, error, q, scale, by_rows=True)
    return None if out is None else out.mT


def transposed_times(gradients: Matrices, error: Error, p: Tensor, scale: Scale = None) -> Tensor | None:
    """Multiply p (n, r, rows) by a = e + g: (n, r, cols) in fp32; otherwise as `times`."""
    return _product(_transposed_times, gradients, error, p, scale, by_rows=False)


def _product(kernel: Any, gradients: Matrices, error: Error, factor: Tensor, scale: Scale, by_rows: bool) -> Tensor | None:
    """Launch `kernel`, whose result has a number for each row, or for each column; add what the parts of the other side give."""
    rank = factor.shape[1]
    if rank > _LARGEST_RANK or not reads(error) or {gradients[0].dtype, factor.dtype} != {torch.float32}:
        return None
    g = Addresses(gradients)
    n, rows, cols = g.shape
    e, (left, right, scaled) = Errors(error, g.like), factors(scale, g.like)
    tile = _side(rows, _ROWS), _side(cols, _COLS)
    kept, summed = ((rows, tile[0]), (cols, tile[1])) if by_rows else ((cols, tile[1]), (rows, tile[0]))
    programs = n * triton.cdiv(*kept)
    parts, each = divided(*summed, programs)
    out = factor.new_empty(parts, n, rank, kept[0])
    with on(factor):
        kernel[(programs * parts,)](
            g.table, g.like, *e.arrays, left, right, factor.contiguous(), out, n, rows, cols, rank, parts, each,
            FORMAT=e.format, SCALED=scaled, R=_side(rank, _LARGEST_RANK), ROWS=tile[0], COLS=tile[1],
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _side(length: int, most: int) -> int:
    """A side of a tile, for a product."""
    return min(most, max(_SHORTEST, triton.next_power_of_2(length)))
