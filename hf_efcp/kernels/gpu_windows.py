"""Windows on GPUs, by Triton: inner products in fp64, also of low-rank entries; writing an entry; scaling factors.

Tensor cores have no fp64 on most devices. So products are formed one by one in tiles of three dimensions, and summed at the end.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Entry, constants
from .gpu_tools import FLOAT8, INT8, PLAIN, RUN, cdiv, divided, on, power_of_2, stored

# The most rows of b, and the largest rank of factors: a tile of sums then fits in registers.
_SKINNY = 16
# Sums in a tile: 32 fp64 numbers for each thread of 8 warps.
_SUMS, _WARPS = 8192, 8
_LONGEST_BLOCK = 1024
# Rows of a that a program takes at once.
_ROWS = 16
# Numbers that a program moves or scales.
_MOVED = 2048
# Half of bf16's last bit, less one, in the bits of fp32.
_SHIFT = tl.constexpr(constants.BF16_SHIFT)
_HALF = tl.constexpr(2 ** (constants.BF16_SHIFT - 1) - 1)
# The integer type for each number of bytes: stored numbers are moved as integers.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _inner(
    a, b, out, many, length, stride_t, stride_row, parts, each, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums over a part of the length, for some rows of a: out (n, parts, many, N)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(many, ROWS)
    t = (rest // groups).to(tl.int64)
    row = (rest % groups * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    other = tl.arange(0, COLS).to(tl.int64)
    row_a, row_b = row[:, None, None], other[None, :, None]
    start_a, start_b = t * stride_t + row_a * stride_row, (t * N + row_b) * length
    within = tl.arange(0, BLOCK)[None, None, :]
    total = tl.zeros([ROWS, COLS, BLOCK], dtype=tl.float64)
    begin = part.to(tl.int64) * each
    for start in range(begin, tl.minimum(begin + each, length), BLOCK):
        col = start + within
        x = tl.load(a + start_a + col, mask=(row_a < many) & (col < length), other=0.0)
        y = tl.load(b + start_b + col, mask=(row_b < N) & (col < length), other=0.0)
        total += x.to(tl.float64) * y.to(tl.float64)
    place = ((t * parts + part) * many + row[:, None]) * N + other[None, :]
    tl.store(out + place, tl.sum(total, 2), mask=(row[:, None] < many) & (other[None, :] < N))


@triton.jit
def _factor_gram(
    factors, scales, entry, place, t, own, rank, length, FORMAT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Give the inner products of a factor's columns with the entry's columns, (R, R).

    The first `own` columns of the factor are those of the entry itself; the window has the rest.
    """
    k = tl.arange(0, R).to(tl.int64)
    left, right, within = k[:, None, None], k[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    total = tl.zeros([R, R, BLOCK], dtype=tl.float64)
    for start in range(0, length, BLOCK):
        col = start + within
        column = place * rank + left
        run, inside = column * tl.cdiv(length, RUN) + col // RUN, (left < rank - own) & (col < length)
        x = stored(factors, scales, column * length + col, run, inside, entry, FORMAT)
        x += tl.load(entry + (t * rank + left) * length + col, mask=(left < own) & (col < length), other=0.0)
        y = tl.load(entry + (t * rank + right) * length + col, mask=(right < rank) & (col < length), other=0.0)
        total += x.to(tl.float64) * y.to(tl.float64)
    return tl.sum(total, 2)


@triton.jit
def _factor_dots(
    window_p, window_q, scales, p, q, j, out, m, rank, rows, cols,
    FORMAT_P: tl.constexpr, FORMAT_Q: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for each slot."""
    place = tl.program_id(0).to(tl.int64)
    t = place // m
    own = tl.where(place % m == tl.load(j), rank, 0)
    gram = _factor_gram(window_p, scales, p, place, t, own, rank, rows, FORMAT_P, R, ROWS)
    gram *= _factor_gram(window_q, scales, q, place, t, own, rank, cols, FORMAT_Q, R, COLS)
    tl.store(out + place, tl.sum(tl.sum(gram, 1), 0))


@triton.jit
def _store(buffer, entry, j, accepted, outer, m, length, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program copies some rows of the entry (outer, length), or a block of a row, to the buffer (outer, m, length)."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < outer) & (col < length)
    if MASKED:
        mask = mask & (row < tl.load(accepted).to(tl.int64) * outer)
    numbers = tl.load(entry + row * length + col, mask=mask)
    tl.store(buffer + (row * m + tl.load(j)) * length + col, numbers, mask=mask)


@triton.jit
def _scaled(
    factor, scales, c, sizes, compute, out, many, m, rank, length, stride_t, stride_slot, stride_row,
    FORMAT: tl.constexpr, WEIGHTED: tl.constexpr, SIZED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program scales some rows of all factors, or a block of a row. `compute` points to the dtype of the arithmetic."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < many) & (col < length)
    slot = row // rank
    t = slot // m
    at = t * stride_t + slot % m * stride_slot + row % rank * stride_row
    x = stored(factor, scales, at + col, at // length * tl.cdiv(length, RUN) + col // RUN, mask, compute, FORMAT)
    if WEIGHTED:
        x *= tl.load(c + slot, mask=row < many, other=0.0)
    if SIZED:
        x *= tl.load(sizes + t * length + col, mask=mask, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + (_HALF + ((bits >> _SHIFT) & 1)), bits)  # Triton's interpreter would cut
        tl.store(out + row * length + col, (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)
    else:
        tl.store(out + row * length + col, x, mask=mask)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Form and sum inner products of rows in fp64: (n, M, N) for a (n, M, L) and b (n, N, L) in any float dtypes.

    None for N above 16, for which a library of matrix products is faster.
    """
    n, many, length = a.shape
    skinny = b.shape[1]
    if skinny > _SKINNY:
        return None
    a, b = a if a.stride(2) == 1 else a.contiguous(), b.contiguous()
    cols, rows = power_of_2(skinny), min(_ROWS, power_of_2(many))
    block = _block(length, rows * cols)
    programs = n * cdiv(many, rows)
    parts, each = divided(length, block, programs)
    out = torch.empty(n, parts, many, skinny, dtype=torch.float64, device=a.device)
    with on(a):
        _inner[(programs * parts,)](
            a, b, out, many, length, a.stride(0), a.stride(1), parts, each, N=skinny, ROWS=rows, COLS=cols, BLOCK=block,
            num_warps=_WARPS,
        )  # fmt: skip
    return out[:, 0] if parts == 1 else out.sum(1)


def factor_dots(window: Entry, entry: Entry, j: Tensor) -> Tensor | None:
    """Form the inner products of a low-rank entry with a window in fp64, (n, m); None for a rank above 16.

    Args:
        window: P (n, m, r, rows) and Q (n, m, r, cols); or P in E4M3, Q in int8, and Q's scales (n, m, r, runs).
        entry: p (n, r, rows) and q (n, r, cols), in the window's dtypes; for a window of codes, in the dtype of the scales.
        j: the slot that counts as the entry itself, (1,) int64 on the device.
    """
    n, m, rank, rows = window[0].shape
    coded = len(window) > 2
    dtypes = [window[2].dtype] * 2 if coded else [x.dtype for x in window]
    if rank > _SKINNY or dtypes != [x.dtype for x in entry]:
        return None
    cols, padded = window[1].shape[3], power_of_2(rank)
    out = torch.empty(n, m, dtype=torch.float64, device=j.device)
    with on(out):
        _factor_dots[(n * m,)](
            *(x.contiguous() for x in (window[0], window[1], window[-1], *entry)), j, out, m, rank, rows, cols,
            FORMAT_P=FLOAT8 if coded else PLAIN, FORMAT_Q=INT8 if coded else PLAIN,
            R=padded, ROWS=_block(rows, padded**2), COLS=_block(cols, padded**2), num_warps=_WARPS,
        )  # fmt: skip
    return out


def store(buffer: Tensor, entry: Tensor, dim: int, j: Tensor, accepted: bool | Tensor) -> bool:
    """Write an entry into a slot of a buffer, if `accepted`; tell whether it was done: not for another dtype or shape.

    Args:
        buffer: contiguous, in any dtype; dimension `dim` counts the slots.
        entry: like the buffer, without dimension `dim`.
        j: the slot, (1,) int64 on the device.
        accepted: a flag, or a 0-D bool tensor on the device.
    """
    if entry.dtype != buffer.dtype or not buffer.is_contiguous() or entry.shape != buffer.shape[:dim] + buffer.shape[dim + 1 :]:
        return False
    if accepted is False:
        return True
    integers, m = _INTEGERS[buffer.element_size()], buffer.shape[dim]
    length = math.prod(buffer.shape[dim + 1 :])
    outer = entry.numel() // length
    rows, block = _moved(outer, length)
    flag = accepted.to(buffer.device).view(torch.uint8) if isinstance(accepted, Tensor) else j
    with on(buffer):
        _store[(cdiv(outer, rows) * cdiv(length, block),)](
            buffer.view(integers), entry.contiguous().view(integers), j, flag,
            outer, m, length, MASKED=flag is not j, ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return True


def scaled(factor: Tensor, c: Tensor | None, sizes: Tensor | None = None) -> Tensor | None:
    """Form c_i * factor_i diag(sizes), rounded once, to the nearest bf16, ties to even; None for other dtypes.

    Args:
        factor: (n, m, r, L) in fp32 or bf16; of a view, the last dimension has to be contiguous, or it is copied.
        c: (n, m) in fp32; None: ones.
        sizes: (n, L) in fp32; None: ones.
    """
    if factor.dtype not in (torch.float32, torch.bfloat16) or any(x is not None and x.dtype != torch.float32 for x in (c, sizes)):
        return None
    factor = factor if factor.stride(3) == 1 else factor.contiguous()
    return _launch_scaled(factor, None, (torch.float32, torch.bfloat16), c, sizes)


def decode(
    codes: Tensor, scales: Tensor | None, out: tuple[torch.dtype, torch.dtype], c: Tensor | None, sizes: Tensor | None
) -> Tensor | None:
    """Give c_i * factor_i diag(sizes) for factors stored as codes.

    Args:
        codes: (n, m, r, L), E4M3 in uint8, or int8. The last dimension has to be contiguous, for int8 also the last but one.
        scales: (n, m, r, runs) of int8 codes, with strides that match those of the codes; None for E4M3.
        out: two dtypes. The first is that of the arithmetic, the scales, c and sizes: fp32 or fp64. The second is that of the
            result: the same, or bf16 where the first is fp32.
        c, sizes: see `scaled`.
    """
    compute, rounded = out
    if rounded not in (compute, torch.bfloat16) or any(x is not None and x.dtype != compute for x in (scales, c, sizes)):
        return None
    length = codes.shape[3]
    if codes.stride(3) != 1 or (rounded != compute and compute != torch.float32):
        return None
    runs = cdiv(length, constants.BLOCK)
    if scales is not None and any(s * length != t * runs for s, t in zip(scales.stride()[:3], codes.stride()[:3], strict=True)):
        return None
    return _launch_scaled(codes, scales, out, c, sizes)


def _launch_scaled(
    factor: Tensor, scales: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype], c: Tensor | None, sizes: Tensor | None
) -> Tensor:
    n, m, rank, length = factor.shape
    compute = torch.empty(1, dtype=dtypes[0], device=factor.device)
    out = torch.empty(factor.shape, dtype=dtypes[1], device=factor.device)
    many = n * m * rank
    rows, block = _moved(many, length)
    with on(factor):
        _scaled[(cdiv(many, rows) * cdiv(length, block),)](
            factor, factor if scales is None else scales, factor if c is None else c.contiguous(),
            factor if sizes is None else sizes.contiguous(), compute, out, many, m, rank, length, *factor.stride()[:3],
            FORMAT=PLAIN if factor.is_floating_point() else FLOAT8 if scales is None else INT8,
            WEIGHTED=c is not None, SIZED=sizes is not None, ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return out


def _block(length: int, sums: int) -> int:
    """Give how many numbers of a row to read at once, if each number takes part in `sums` sums."""
    return min(_SUMS // sums, _LONGEST_BLOCK, power_of_2(length))


def _moved(rows: int, length: int) -> tuple[int, int]:
    """Give the sides of a tile for (rows, length): powers of two, so that the tile is not much larger."""
    block = min(_MOVED, power_of_2(length))
    return min(_MOVED // block, power_of_2(rows)), block
