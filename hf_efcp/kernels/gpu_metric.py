"""The metric's sums on GPUs, by Triton: the squares of a gradient over rows and columns in fp64, and roots of the sums.

A first kernel reads g once and writes partial sums: over rows for each part of the columns, over columns for each block of rows.
A second kernel adds them. Its programs each take a run of rows and a run of columns, so that a matrix with one long side keeps
the device busy too.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Matrices
from .gpu_tools import (
    Addresses,
    cdiv,
    divided,
    matrix,
    on,
    power_of_2,
)

# Numbers of a tile of g, and its rows: 16 sums in fp64 for each thread of 4 warps.
_TILE, _ROWS = 2048, 16
# Rows, and columns, whose roots a program takes; partial sums that it adds at once.
_RUN, _ADDED = 64, 32
# Takes the place of beta = 0 in a logarithm.
_NO_BETA = 1e-300
# Partial sums of c that a program reads at once.
_MEANS = 1024


# In kernels ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _squares(
    table, like, by_row, by_col, c, c_sums, rows, cols, parts, each, MEAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """A program reads a block of rows and a part of the columns: by_row (n, parts, rows), by_col (n, blocks of rows, cols).

    Where MEAN, the programs of the first block of rows also add up c: c_sums (n, parts).
    """
    part, rest, blocks = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(rows, ROWS)
    t = (rest // blocks).to(tl.int64)
    block = rest % blocks
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gradient = matrix(table, t, like) + row[:, None] * cols
    begin = part * each
    end = tl.minimum(begin + each, cols)
    sums = tl.zeros([ROWS, COLS], dtype=tl.float64)
    for start in range(begin, end, COLS):
        col = start + tl.arange(0, COLS)
        g = tl.load(gradient + col[None, :], mask=(row[:, None] < rows) & (col[None, :] < cols), other=0.0).to(tl.float64)
        square = g * g
        sums += square
        tl.store(by_col + (t * blocks + block) * cols + col, tl.sum(square, 0), mask=col < cols)
    tl.store(by_row + (t * parts + part) * rows + row, tl.sum(sums, 1), mask=row < rows)
    if MEAN:  # noqa: SIM102  known when the kernel is compiled; the other is not
        if block == 0:
            total = tl.zeros([COLS], dtype=tl.float64)
            for start in range(begin, end, COLS):
                col = start + tl.arange(0, COLS)
                total += tl.load(c + t * cols + col, mask=col < cols, other=0.0).to(tl.float64)
            tl.store(c_sums + t * parts + part, tl.sum(total, 0))


@triton.jit
def _added(partial, t, many, place, length, RUN: tl.constexpr, ADDED: tl.constexpr):
    """Give the sums of partial (n, many, length) over its `many` parts, at some places of tensor t: (RUN,)."""
    total = tl.zeros([ADDED, RUN], dtype=tl.float64)
    for start in range(0, many, ADDED):
        i = start + tl.arange(0, ADDED)[:, None]
        total += tl.load(
            partial + (t * many + i) * length + place[None, :], mask=(i < many) & (place[None, :] < length), other=0.0
        )
    return tl.sum(total, 0)


@triton.jit
def _root(d):
    """Give d^(1/2), and d^(-1/4): 0 where d is 0, NaN where d is not finite."""
    root = tl.sqrt(d)
    return root, tl.where(d == 0, 0.0, 1 / tl.sqrt(tl.where(d == 0, 1.0, root)) + 0 * d)


@triton.jit
def _measure(
    by_row, by_col, c_sums, r, c, count, new, x, y, roots, sums, rows, cols, parts, blocks, runs,
    BETA: tl.constexpr, LOG_BETA: tl.constexpr, EPS: tl.constexpr,
    RUN: tl.constexpr, ADDED: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """A program takes a run of a tensor's rows, and the run of its columns at the same places: roots (n, 2, runs)."""
    t = (tl.program_id(0) // runs).to(tl.int64)
    run = tl.program_id(0) % runs
    place = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    beta, eps = tl.full([], BETA, tl.float64), tl.full([], EPS, tl.float64)
    total = tl.zeros([MEANS], dtype=tl.float64)
    for start in range(0, parts, MEANS):
        i = start + tl.arange(0, MEANS)
        total += tl.load(c_sums + t * parts + i, mask=i < parts, other=0.0)
    mean = tl.sum(total, 0) / cols
    k = tl.load(count + t)
    power = tl.where(k > 0, tl.exp(k.to(tl.float64) * tl.full([], LOG_BETA, tl.float64)), 1.0)
    if run * RUN < cols:
        inside = place < cols
        tl.store(sums + t * cols + place, _added(by_col, t, blocks, place, cols, RUN, ADDED), mask=inside)
        old = tl.load(c + t * cols + place, mask=inside, other=0.0).to(tl.float64)
        d = tl.where(mean > 0, old / tl.where(mean > 0, mean, 1.0) + eps, 1.0)
        root, inverse = _root(d)
        tl.store(y + t * cols + place, inverse.to(y.dtype.element_ty), mask=inside)
        tl.store(roots + (t * 2 + 1) * runs + run, tl.sum(tl.where(inside, root, 0.0), 0))
    else:
        tl.store(roots + (t * 2 + 1) * runs + run, 0.0)
    if run * RUN < rows:
        inside = place < rows
        old = tl.load(r + t * rows + place, mask=inside, other=0.0).to(tl.float64)
        now = (beta * old + (1 - beta) * (_added(by_row, t, parts, place, rows, RUN, ADDED) / cols)).to(new.dtype.element_ty)
        tl.store(new + t * rows + place, now, mask=inside)
        d = now.to(tl.float64) / (1 - power * beta) + eps * mean / tl.where(k > 0, 1 - power, 1.0)
        root, inverse = _root(d)
        tl.store(x + t * rows + place, inverse.to(x.dtype.element_ty), mask=inside)
        tl.store(roots + t * 2 * runs + run, tl.sum(tl.where(inside, root, 0.0), 0))
    else:
        tl.store(roots + t * 2 * runs + run, 0.0)


# Around them --------------------------------------------------------------------------------------------------------------


class _Sums:
    """Partial sums of g^2, as `_squares` writes them.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        c: (n, cols), whose partial sums are formed too; None: they are not.

    Attributes:
        by_row, by_col: (n, parts, rows) and (n, blocks, cols) fp64.
        c: (n, parts) fp64.
    """

    def __init__(self, gradients: Matrices, c: Tensor | None = None):
        g = Addresses(gradients)
        self.shape = n, rows, cols = g.shape
        height = min(_ROWS, power_of_2(rows))
        width = min(_TILE // height, power_of_2(cols))
        blocks = cdiv(rows, height)
        parts, each = divided(cols, width, n * blocks)
        self.by_row, self.by_col, self.c = (
            torch.empty(shape, dtype=torch.float64, device=g.like.device)
            for shape in ((n, parts, rows), (n, blocks, cols), (n, parts))
        )
        with on(g.like):
            _squares[(n * blocks * parts,)](
                g.table, g.like, self.by_row, self.by_col, g.like if c is None else c, self.c, rows, cols, parts, each,
                MEAN=c is not None, ROWS=height, COLS=width,
            )  # fmt: skip


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """Sum g^2 over rows and over columns, (n, rows) and (n, cols) fp64.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
    """
    sums = _Sums(gradients)
    by_row, by_col = (x[:, 0] if x.shape[1] == 1 else x.sum(1) for x in (sums.by_row, sums.by_col))
    return by_row, by_col


def measure(
    gradients: Matrices, r: Tensor, c: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Make the factors of a metric that contains g: see `core.moments.measured`, which has the same arguments and results.

    None where the state's dtype is not g's.
    """
    if {r.dtype, c.dtype} != {gradients[0].dtype}:
        return None
    r, c, count = r.contiguous(), c.contiguous(), count.contiguous()
    partial = _Sums(gradients, c)
    n, rows, cols = partial.shape
    runs, (parts, blocks) = cdiv(max(rows, cols), _RUN), (partial.by_row.shape[1], partial.by_col.shape[1])
    new, x, y = torch.empty_like(r), torch.empty_like(r), torch.empty_like(c)
    sums, roots = torch.empty_like(c, dtype=torch.float64), torch.empty(n, 2, runs, dtype=torch.float64, device=c.device)
    with on(c):
        _measure[(n * runs,)](
            partial.by_row, partial.by_col, partial.c, r, c, count, new, x, y, roots, sums, rows, cols, parts, blocks, runs,
            BETA=beta, LOG_BETA=math.log(max(beta, _NO_BETA)), EPS=eps, RUN=_RUN,
            ADDED=min(_ADDED, power_of_2(max(parts, blocks))), MEANS=min(_MEANS, power_of_2(parts)),
        )  # fmt: skip
    return new, x, y, (roots[:, :, 0] if runs == 1 else roots.sum(2)).prod(1), sums
