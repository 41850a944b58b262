"""Orthonormal bases, and the start of a power iteration, on GPUs, by Triton.

The basis of A's columns comes from their Gram matrix G = A^T A in fp64. With G = L L^T, the columns of A L^-T are orthonormal:
those of QR, up to signs. The condition number of A, squared, amplifies a rounding error of G. So a second pass follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_tools import (
    cdiv,
    col_factors,
    divided,
    on,
    power_of_2,
    row_factors,
    tensor_key,
)

_UNIT = tl.constexpr(2.0**-15)  # takes 16 bits with a sign to (-1, 1)
# The most columns of which a program forms a Gram matrix.
_LARGEST_RANK = 32
# Squared length that is left of a unit column without its part along the columns before: rounding errors if below this.
_DEPENDENT = tl.constexpr(1e-14)
# Sums in a tile: 32 fp64 numbers for each thread of 8 warps.
_SUMS, _WARPS = 8192, 8
_LONGEST_BLOCK = 1024
# Numbers of partial sums that one program adds at once. A sum is cut as if there were at least _FEW tensors, so that there are
# not too many partial sums.
_ADDED, _FEW = 1024, 8
# Numbers of Q that a program writes. If Q has at most _READ numbers, each program computes the columns' lengths for itself.
_WRITTEN, _READ = 2048, 2**17


# Starts -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _column_squares(last, t, begin, end, cols, rank, R: tl.constexpr, BLOCK: tl.constexpr):
    """Give the sums of the squares of columns, rows begin ... end, (R,) fp64."""
    k = tl.arange(0, R)[None, :]
    total = tl.zeros([BLOCK, R], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        x = tl.load(last + (t * cols + row) * rank + k, mask=(row < end) & (k < rank), other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _partial_squares(last, out, cols, rank, parts, each, R: tl.constexpr, BLOCK: tl.constexpr):
    """A program sums the squares of some rows of a tensor's last Q: out (n, parts, R)."""
    t, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * each
    sums = _column_squares(last, t, begin, tl.minimum(begin + each, cols), cols, rank, R, BLOCK)
    tl.store(out + tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), sums)


@triton.jit
def _start(
    last, sums, step, salts, out, cols, rank, parts,
    DEAD: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes a block of rows of a tensor's Q: out (n, rank, cols)."""
    blocks = tl.cdiv(cols, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.arange(0, R)
    if WHOLE:
        square = _column_squares(last, t, 0, cols, cols, rank, R, BLOCK)
    else:
        part = tl.arange(0, PARTS)[:, None]
        square = tl.sum(tl.load(sums + (t * parts + part) * R + k[None, :], mask=part < parts, other=0.0), 0)
    norm = tl.sqrt(square)
    known = norm == norm
    longest = tl.max(tl.where(known, norm, 0.0), 0)
    limit = tl.where(tl.min(known.to(tl.int32), 0) == 1, longest * tl.full([], DEAD, tl.float64), -1.0)
    dead = (norm <= limit)[None, :]
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (row[:, None] < cols) & (k[None, :] < rank)
    x = tl.load(last + (t * cols + row[:, None]) * rank + k[None, :], mask=mask, other=0.0).to(tl.float64)
    unit = x / tl.where(norm > 0, norm, 1.0)[None, :]
    key = tensor_key(step, salts + t)
    bits = row_factors(key, k.to(tl.int64))[None, :] * col_factors(key, row.to(tl.int64))[:, None]
    fresh = ((bits >> 16).to(tl.float32) + 0.5) * _UNIT
    q = tl.where(dead, fresh.to(tl.float64), unit)
    tl.store(out + (t * rank + k[None, :]) * cols + row[:, None], q.to(out.dtype.element_ty), mask=mask)


def start(last: Tensor, step: Tensor, salts: Tensor, dead: float) -> Tensor | None:
    """Make the Q that a power iteration starts from: unit columns of the last one, dead ones redrawn.

    Args:
        last: (n, cols, r) in fp32 or fp64.
        step, salts: () and (n,) int64, which count the random numbers.
        dead: a column is dead if it is at most this times as long as the longest column.

    Returns:
        (n, cols, r), as a view of (n, r, cols).
    """
    if last.dtype not in (torch.float32, torch.float64):
        return None
    last = last.contiguous()
    n, cols, rank = last.shape
    padded = power_of_2(rank)
    block = max(1, min(_WRITTEN // padded, power_of_2(cols)))
    out = last.new_empty(n, rank, cols)
    whole = cols * rank <= _READ
    parts, each = (1, cols) if whole else divided(cols, block, max(n, _FEW))
    sums = torch.empty(0 if whole else n, parts, padded, dtype=torch.float64, device=last.device)
    with on(last):
        if not whole:
            _partial_squares[(n * parts,)](last, sums, cols, rank, parts, each, R=padded, BLOCK=block)
        _start[(n * cdiv(cols, block),)](
            last, sums, step.to(last.device), salts.contiguous(), out, cols, rank, parts,
            DEAD=dead, WHOLE=whole, PARTS=power_of_2(parts), R=padded, BLOCK=block,
        )  # fmt: skip
    return out.mT


# Bases --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gram(a, out, length, rank, parts, each, R: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes a part of the rows of A, stored as (n, rank, length): out has partial Gram matrices (n, parts, R, R)."""
    t, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * each
    k = tl.arange(0, R).to(tl.int64)
    left, right, within = k[:, None, None], k[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    total = tl.zeros([R, R, BLOCK], dtype=tl.float64)
    for start in range(begin, tl.minimum(begin + each, length), BLOCK):
        col = start + within
        x = tl.load(a + (t * rank + left) * length + col, mask=(left < rank) & (col < length), other=0.0)
        y = tl.load(a + (t * rank + right) * length + col, mask=(right < rank) & (col < length), other=0.0)
        total += x.to(tl.float64) * y.to(tl.float64)
    place = (tl.program_id(0).to(tl.int64) * R + k[:, None]) * R + k[None, :]
    tl.store(out + place, tl.sum(total, 2))


@triton.jit
def _factor(gram, out, parts, rank, R: tl.constexpr, PARTS: tl.constexpr):
    """A program for each tensor: out is B (n, R, R), upper triangular, such that A B has orthonormal columns.

    It goes column by column, as Gram-Schmidt does. A column of B holds a basis vector's coefficients in the columns of A.
    """
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, R)
    row, col, part = k[:, None], k[None, :], tl.arange(0, PARTS)[:, None, None]
    g = tl.zeros([R, R], dtype=tl.float64)
    for start in range(0, parts, PARTS):
        place = ((t * parts + start + part) * R + k[None, :, None]) * R + k[None, None, :]
        g += tl.sum(tl.load(gram + place, mask=start + part < parts, other=0.0), 0)
    square = tl.sum(tl.where(row == col, g, 0.0), 1)
    size = tl.where(square > 0, 1 / tl.sqrt(square), 0 * square)
    b = tl.where(row == col, size[:, None], 0.0)
    # Columns get length 1, so that their sizes do not matter. What is not finite stays so: 0 * infinity is NaN.
    g = (g * size[:, None]) * tl.sum(b, 0)[None, :]
    floor = tl.full([], _DEPENDENT, tl.float64)
    for i in range(rank):
        line = tl.sum(tl.where(row == i, g, 0.0), 0)
        pivot = tl.sum(tl.where(k == i, line, 0.0), 0)
        inverse = tl.where(pivot <= floor, 0.0, 1 / tl.sqrt(tl.where(pivot <= floor, 1.0, pivot)))
        line *= inverse
        column = tl.sum(tl.where(col == i, g, 0.0), 1) * inverse
        own = tl.sum(tl.where(col == i, b, 0.0), 1) * inverse
        g -= column[:, None] * line[None, :]
        b = tl.where(col > i, b - own[:, None] * line[None, :], tl.where(col == i, own[:, None], b))
    tl.store(out + (t * R + row) * R + col, b)


@triton.jit
def _multiply(a, b, out, gram, length, rank, parts, each, GRAM: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """A program forms a part of the rows of A B, and where GRAM, its partial Gram matrix. A and A B lie as (n, rank, length)."""
    t, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * each
    k = tl.arange(0, R).to(tl.int64)
    total = tl.zeros([R, R, BLOCK if GRAM else 1], dtype=tl.float64)
    for start in range(begin, tl.minimum(begin + each, length), BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        p = tl.zeros([R, BLOCK], dtype=tl.float64)
        for i in range(rank):
            x = tl.load(a + (t * rank + i) * length + col, mask=col < length, other=0.0)
            p += tl.load(b + (t * R + i) * R + k)[:, None] * x.to(tl.float64)
        tl.store(
            out + (t * rank + k[:, None]) * length + col, p.to(out.dtype.element_ty), mask=(k[:, None] < rank) & (col < length)
        )
        if GRAM:
            total += p[:, None, :] * p[None, :, :]
    if GRAM:
        place = (tl.program_id(0).to(tl.int64) * R + k[:, None]) * R + k[None, :]
        tl.store(gram + place, tl.sum(total, 2))


def orthonormal(a: Tensor) -> Tensor | None:
    """Make an orthonormal basis of the columns of each matrix: that of QR up to signs. None for more than 32 columns.

    Args:
        a: (n, rows, r) in fp32 or fp64.

    Returns:
        (n, rows, r) in a's dtype, as a view of (n, r, rows). A column that depends on the columns before it becomes 0. Where a
        number of a is not finite, the result has NaN.
    """
    n, length, rank = a.shape
    if rank > _LARGEST_RANK or a.dtype not in (torch.float32, torch.float64):
        return None
    a, padded = a.mT.contiguous(), power_of_2(rank)
    block = min(_SUMS // padded**2, _LONGEST_BLOCK, power_of_2(length))
    parts, each = divided(length, block, max(n, _FEW))
    gram = torch.empty(n, parts, padded, padded, dtype=torch.float64, device=a.device)
    b = torch.empty(n, padded, padded, dtype=torch.float64, device=a.device)
    p, out = torch.empty_like(a, dtype=torch.float64), torch.empty_like(a)
    sizes, grid = (length, rank, parts, each), (n * parts,)
    added = max(1, min(_ADDED // padded**2, power_of_2(parts)))
    small = {"R": padded, "PARTS": added, "num_warps": 1 if padded < _LARGEST_RANK else 4}
    tile = {"R": padded, "BLOCK": block, "num_warps": _WARPS}
    with on(a):
        _gram[grid](a, gram, *sizes, **tile)
        _factor[(n,)](gram, b, parts, rank, **small)
        _multiply[grid](a, b, p, gram, *sizes, GRAM=True, **tile)
        _factor[(n,)](gram, b, parts, rank, **small)
        _multiply[grid](p, b, out, gram, *sizes, GRAM=False, **tile)
    return out.mT
