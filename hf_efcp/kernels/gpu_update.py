"""Additions to the parameters in place, and the error's sum of squares, on GPUs, by Triton.

Nothing is added atomically: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Error, Kept, Matrices, Rounding, Scale
from .devices import is_plain
from .gpu_tools import (
    Addresses,
    Errors,
    col_factors,
    error_tile,
    factors,
    matrix,
    on,
    reads,
    row_factors,
    tensor_key,
    tile,
    tiling,
    to_bf16,
)

# Numbers of a program's tile.
_NUMBERS = 2048
_DTYPES = torch.float32, torch.float64
_HALVES = torch.bfloat16, torch.float16


@triton.jit
def _square(error, scales, like, out, rows, cols, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program for each tile, whose sum it writes."""
    t, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    e = error_tile(error, scales, t, row, col, mask, rows, cols, like, FORMAT).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(e * e, 1), 0))


@triton.jit
def _add_kept(
    table, like, error, scales, weights, left, right, rows, cols,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for each tile."""
    t, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    e = error_tile(error, scales, t, row, col, mask, rows, cols, like, FORMAT) * tl.load(weights + t)
    if SCALED:
        e *= tl.load(left + t * rows + row, mask=row < rows, other=0.0)
        e *= tl.load(right + t * cols + col, mask=col < cols, other=0.0)
    p = matrix(table, t, like) + row * cols + col
    tl.store(p, tl.load(p, mask=mask, other=0.0) + e, mask=mask)


@triton.jit(do_not_specialize=["row_0", "col_0", "first_row"])
def _add(
    table, like, update, scale, decay, left, right, error, scales, weights, compute, step, salts, rows, cols, row_0, col_0,
    first_row, whole,
    SCALE_AT: tl.constexpr, DECAY_AT: tl.constexpr, SCALED: tl.constexpr, FORMAT: tl.constexpr, COUNTED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for each tile. `scale` and `decay` are fp32 numbers or addresses; `compute` points to the dtype of the sum."""
    t, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    if SCALE_AT:
        scale = tl.load(scale).to(compute.dtype.element_ty)
    if DECAY_AT:
        decay = tl.load(decay).to(compute.dtype.element_ty)
    u = tl.load(update + (t * rows + row) * cols + col, mask=mask, other=0.0).to(compute.dtype.element_ty)
    p = matrix(table, t, like) + row * cols + col
    if FORMAT != 0:
        e = error_tile(error, scales, t, row + first_row, col, mask, whole, cols, compute, FORMAT)
        u += e * tl.load(weights + t).to(compute.dtype.element_ty)
    if SCALED:
        u *= tl.load(left + t * whole + row + first_row, mask=row < rows, other=0.0).to(compute.dtype.element_ty)
        u *= tl.load(right + t * cols + col, mask=col < cols, other=0.0).to(compute.dtype.element_ty)
    new = tl.load(p, mask=mask, other=0.0).to(compute.dtype.element_ty) * decay + u * scale
    if COUNTED:
        key = tensor_key(step, salts + t)
        new = to_bf16(new, row_factors(key, row + row_0), col_factors(key, col.to(tl.int64) + col_0))
    tl.store(p, new.to(like.dtype.element_ty), mask=mask)


def square(error: Error, cols: int, dtype: torch.dtype) -> Tensor | None:
    """Sum the squares of e for each tensor, (n,) fp64.

    Args:
        error: as `Errors` takes it, of n matrices.
        cols: numbers in a row.
        dtype: of the numbers, fp32 or fp64.
    """
    if error is None or not reads(error) or error[0].ndim != 3:
        return None
    like = torch.empty(1, dtype=dtype, device=error[0].device)
    e, (n, rows) = Errors(error, like), error[0].shape[:2]
    grid, height, width = tiling((n, rows, cols), _NUMBERS)
    out = torch.empty(n, grid[0] // n, dtype=torch.float64, device=like.device)
    with on(like):
        _square[grid](*e.arrays, like, out, rows, cols, FORMAT=e.format, ROWS=height, COLS=width)
    return out.sum(1)


def add_kept(params: Matrices, error: Error, weights: Tensor, scale: Scale) -> bool:
    """Compute p <- p + weight * diag(x) e diag(y) in place.

    Args:
        params: p, n contiguous matrices (rows, cols) in fp32 or fp64.
        error: e, as `Errors` takes it.
        weights: (n,) in p's dtype.
        scale: x (n, rows) and y (n, cols) in p's dtype; None: ones.

    Returns:
        Whether it was done.
    """
    if error is None or not reads(error) or not all(map(is_plain, params)):
        return False
    if weights.dtype not in _DTYPES or weights.dtype != params[0].dtype:
        return False
    p = Addresses(params)
    e, (x, y, scaled), (_, rows, cols) = Errors(error, p.like), factors(scale, p.like), p.shape
    grid, height, width = tiling(p.shape, _NUMBERS)
    with on(p.like):
        _add_kept[grid](
            p.table, p.like, *e.arrays, weights.contiguous(), x, y, rows, cols,
            FORMAT=e.format, SCALED=scaled, ROWS=height, COLS=width,
        )  # fmt: skip
    return True


def add(
    params: Matrices,
    update: Tensor,
    scale: float | Tensor,
    decay: float | Tensor,
    rounding: Rounding | None = None,
    sizes: Scale = None,
    kept: Kept | None = None,
    first: int = 0,
) -> bool:
    """Compute p <- decay * p + scale * diag(x) (u + weight * e) diag(y) in place.

    The arithmetic is in fp64 where p or u is fp64, else in fp32. The result is rounded once.

    Args:
        params: p, n contiguous matrices (rows, cols) in a float dtype.
        update: u, (n, rows, cols) in a float dtype.
        scale, decay: numbers, which may differ at each step, or 0-D tensors on the device.
        rounding: counts the random numbers by which bf16 parameters are rounded stochastically; None: round to nearest.
        sizes: x (n, rows) and y (n, cols); None: ones.
        kept: e, as `Errors` takes it, and the weights (n,); None: there is no e.
        first: the first row, where p and u are some rows of n matrices. x and e are always those of the whole matrices.

    Returns:
        Whether it was done.
    """
    dtypes = params[0].dtype, update.dtype
    double = torch.float64 in dtypes
    known = all(x in (*_DTYPES, *_HALVES) for x in dtypes) and not (double and dtypes[0] in _HALVES)
    error, weights = (None, None) if kept is None else kept
    if not known or not all(map(is_plain, params)) or not reads(error):
        return False
    p = Addresses(params)
    (_, rows, cols), device = p.shape, p.like.device
    compute = torch.empty(1, dtype=torch.float64 if double else torch.float32, device=device)
    scale, decay = (_number(x, double, device) for x in (scale, decay))
    (x, y, scaled), e = factors(sizes, p.like), Errors(error, compute)
    whole = x.shape[1] if scaled else rows if error is None else error[0].shape[1]
    weights = p.table if weights is None else weights.contiguous()
    counted = rounding is not None and dtypes[0] == torch.bfloat16
    step, salts, origin = rounding if rounding is not None and counted else (p.table, p.table, (0, 0))
    grid, height, width = tiling(p.shape, _NUMBERS)
    with on(p.like):
        _add[grid](
            p.table, p.like, update.contiguous(), scale, decay, x, y, *e.arrays, weights, compute, step.to(device),
            salts.contiguous(), rows, cols, *origin, first, whole,
            SCALE_AT=isinstance(scale, Tensor), DECAY_AT=isinstance(decay, Tensor), SCALED=scaled, FORMAT=e.format,
            COUNTED=counted, ROWS=height, COLS=width,
        )  # fmt: skip
    return True


def _number(x: float | Tensor, double: bool, device: torch.device) -> float | Tensor:
    """Give a number for a kernel, whose arguments have 32 bits: an fp64 number is filled in on the device, and nothing waits."""
    if isinstance(x, Tensor):
        return x.to(device)
    return torch.full((), x, dtype=torch.float64, device=device) if double else float(x)
