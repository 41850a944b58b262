"""Products of low-rank methods with gradients and windows on CPUs, by numba.

torch takes several passes for each product, and forms products with r columns on one core.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Error, Kept, Matrices, Rounding, Scale
from .cpu_threads import PARTS, divide_work
from .cpu_tiles import TILE, add_tile, multiply_tile
from .cpu_tools import (
    CONTRACTED,
    DTYPES,
    REORDERED,
    SKINNY,
    Addresses,
    Errors,
    array,
    bf16_bits,
    compiled,
    factors,
    fits,
    matrix_row,
    read_row,
    real,
)
from .devices import is_plain

# Most numbers of the new entry's factor b. It is converted to fp64 whole, and then read from the cache for each row of a.
_LONG = 2**20
# A row longer than _LONGEST_RUN is read in runs of _RUN numbers, so that b's run stays in the cache. Both were measured.
_RUN, _LONGEST_RUN = 2048, 4096


@compiled(relaxed=REORDERED)
def products(x, y, start, out):
    """Compute out[s] += <x, y[s]> with y from column `start` on. x is read and converted once for four rows of y."""
    many, stop = len(out), start + x.size
    for s in range(0, many - 3, 4):
        y0, y1, y2, y3 = y[s, start:stop], y[s + 1, start:stop], y[s + 2, start:stop], y[s + 3, start:stop]
        t0, t1, t2, t3 = out[s], out[s + 1], out[s + 2], out[s + 3]
        for k in range(x.size):
            number = real(x[k])
            t0 += number * y0[k]
            t1 += number * y1[k]
            t2 += number * y2[k]
            t3 += number * y3[k]
        out[s], out[s + 1], out[s + 2], out[s + 3] = t0, t1, t2, t3
    for s in range(many - many % 4, many):
        y0, t0 = y[s, start:stop], out[s]
        for k in range(x.size):
            t0 += real(x[k]) * y0[k]
        out[s] = t0


@compiled(relaxed=REORDERED)
def _times(lo, hi, gradients, x, y, error, scale, q, out):
    rows, cols = out.shape[1], q.shape[2]
    a, room = np.empty(cols, q.dtype), np.empty(cols, q.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        read_row(a, room, matrix_row(gradients[t], row, cols, q), x, y, error, scale, t, row, 0)
        products(a, q[t], 0, out[t, row])


@compiled(relaxed=REORDERED)
def _times_wide(lo, hi, blocks, gradients, x, y, error, scale, q, out):
    """Compute `_times` for blocks of four rows, whose sums have another order. The blocks depend on the shape alone."""
    rows, (many, cols) = out.shape[1], q.shape[1:]
    a, room = np.empty((TILE, cols), q.dtype), np.empty(cols, q.dtype)
    for task in range(lo, hi):
        t, row = task // blocks, task % blocks * TILE
        height = min(TILE, rows - row)
        for i in range(height):
            read_row(a[i], room, matrix_row(gradients[t], row + i, cols, q), x, y, error, scale, t, row + i, 0)
        tiled = many - many % TILE if height == TILE else 0
        for s in range(0, tiled, TILE):
            multiply_tile(out[t, row : row + TILE], a, q[t], s)
        for i in range(height):
            products(a[i], q[t, tiled:], 0, out[t, row + i, tiled:])


@compiled(relaxed=CONTRACTED)
def _add_rows(a, weights, first, out):
    """Compute out[s] += the sum of weights[s, first + i] * a[i] over the four rows i of a, in their order."""
    many = len(out)
    for s in range(0, many - many % TILE, TILE):
        add_tile(out, weights, s, first, a)
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for s in range(many - many % TILE, many):
        w0, w1, w2, w3, to = weights[s, first], weights[s, first + 1], weights[s, first + 2], weights[s, first + 3], out[s]
        for x in range(a0.size):
            to[x] = (((to[x] + w0 * a0[x]) + w1 * a1[x]) + w2 * a2[x]) + w3 * a3[x]


@compiled(relaxed=REORDERED)
def _transposed_times(lo, hi, parts, gradients, x, y, error, scale, p, out):
    rows, cols = p.shape[2], out.shape[3]
    a, room = np.empty((TILE, cols), p.dtype), np.empty(cols, p.dtype)
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        row, stop = rows * part // parts, rows * (part + 1) // parts
        while row < stop:
            many = TILE if row + TILE <= stop else 1
            for i in range(many):
                read_row(a[i], room, matrix_row(gradients[t], row + i, cols, p), x, y, error, scale, t, row + i, 0)
            if many == TILE:
                _add_rows(a, p[t], row, out[t, part])
            else:
                for s in range(p.shape[1]):
                    weight, to, number = p[t, s, row], out[t, part, s], a[0]
                    for k in range(cols):
                        to[k] += weight * number[k]
            row += many


@compiled(relaxed=REORDERED)
def _inner(lo, hi, a, b, out):
    many, length = a.shape[1:]
    run = length if length <= _LONGEST_RUN else _RUN
    for start in range(0, length, run):
        stop = min(start + run, length)
        for task in range(lo, hi):
            t, i = task // many, task % many
            products(a[t, i, start:stop], b[t], start, out[t, i])


@compiled
def _scaled(lo, hi, factor, c, sizes, out):
    """Compute out <- the bf16 bits of c * factor * sizes, or of c * factor where sizes are empty: nearest, ties to even."""
    rank, length = factor.shape[1:]
    slots = len(c) // max(1, len(sizes))
    single = np.empty(length, np.float32)
    bits = single.view(np.int32)
    for task in range(lo, hi):
        i, s = task // rank, task % rank
        x, to, size = factor[i, s], out[i, s], c[i]
        for k in range(length):
            single[k] = size * real(x[k])
        if sizes.size:
            factors = sizes[i // slots]
            for k in range(length):
                single[k] *= factors[k]
        for k in range(length):
            to[k] = bf16_bits(bits[k])


@compiled(relaxed=REORDERED)
def _add(lo, hi, params, update, scale, decay):
    rows, cols = update.shape[1:]
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        p, u = matrix_row(params[t], row, cols, scale), update[t, row]
        for x in range(cols):
            p[x] = decay[0] * p[x] + scale[0] * real(u[x])


def times(gradients: Matrices, error: Error, q: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Give a q^T, (n, rows, r) in g's dtype, for a = e + g. Only a few rows of a are formed at a time.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        error: e, as `Errors` takes it.
        q: (n, r, cols) in g's dtype.
        scale: of g.
        wide: whether r may be larger, see `hf_efcp.kernels.times`.
    """
    if not fits(gradients, error, q, wide):
        return None
    g = Addresses(gradients)
    n, rows, cols = g.shape
    out = torch.zeros(n, rows, q.shape[1], dtype=g.dtype)
    arrays = g.array, *factors(scale, g.dtype), *Errors(error, g.dtype).arrays, array(q), array(out)
    if wide:
        blocks = -(-rows // TILE)
        divide_work(_times_wide, n * blocks, TILE * cols * q.shape[1], blocks, *arrays)
    else:
        divide_work(_times, n * rows, cols * q.shape[1], *arrays)
    return out


def transposed_times(gradients: Matrices, error: Error, p: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Give p a, (n, r, cols) in g's dtype, for a = e + g and p (n, r, rows). The other arguments are those of `times`."""
    if not fits(gradients, error, p, wide):
        return None
    g = Addresses(gradients)
    n, rows, cols = g.shape
    parts = -(-PARTS // n)
    out = torch.zeros(n, parts, p.shape[1], cols, dtype=g.dtype)
    arrays = g.array, *factors(scale, g.dtype), *Errors(error, g.dtype).arrays, array(p), array(out)
    divide_work(_transposed_times, n * parts, rows * cols * p.shape[1] // parts, parts, *arrays)
    return out.sum(1)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Give the inner products of the rows of a (n, M, L) with those of b (n, N, L), formed and summed in fp64: (n, M, N)."""
    if a.dtype not in DTYPES or b.shape[1] > SKINNY or b.numel() > _LONG:
        return None
    n, many, length = a.shape
    out = torch.zeros(n, many, b.shape[1], dtype=torch.float64)
    divide_work(_inner, n * many, length * b.shape[1], array(a), array(b.double()), array(out))
    return out


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
    """Compute p <- decay * p + scale * u in place; tell whether it was done.

    Args:
        params: p, n contiguous matrices (rows, cols) in fp32.
        update: u, (n, rows, cols) in bf16.
        scale, decay: numbers.
        rounding: not used, since p is in fp32.
        sizes, kept: have to be None.
        first: not used.
    """
    if isinstance(scale, Tensor) or isinstance(decay, Tensor) or sizes is not None or kept is not None:
        return False
    if update.dtype != torch.bfloat16 or any(p.dtype != torch.float32 or not is_plain(p) for p in params):
        return False
    p = Addresses(params)
    n, rows, cols = p.shape
    numbers = np.array([scale], np.float32), np.array([decay], np.float32)
    divide_work(_add, n * rows, cols, p.array, array(update), *numbers)
    return True


def scaled(factor: Tensor, c: Tensor | None, sizes: Tensor | None = None) -> Tensor | None:
    """Give c_i * factor_i diag(sizes) in bf16, rounded once.

    Args:
        factor: (n, m, r, L) in fp32 or bf16.
        c: (n, m) in fp32; None: ones.
        sizes: (n, L) in fp32; None: ones.
    """
    n, m, rank, length = factor.shape
    c = torch.ones(n, m) if c is None else c
    sizes = torch.empty(0, length) if sizes is None else sizes
    if factor.dtype not in (torch.float32, torch.bfloat16) or (c.dtype, sizes.dtype) != (torch.float32,) * 2:
        return None
    out = torch.empty(factor.shape, dtype=torch.bfloat16)
    arrays = array(factor.flatten(0, 1)), array(c.flatten()), array(sizes), array(out.flatten(0, 1))
    divide_work(_scaled, n * m * rank, length, *arrays)
    return out
