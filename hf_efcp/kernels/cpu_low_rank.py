"""The low-rank family's passes over gradients and windows on CPUs, by numba.

torch has each as several passes, and the products with r columns on one core.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import Error, Rounding
from .cpu_tools import (
    DTYPES,
    PARTS,
    REORDERED,
    Errors,
    Matrices,
    add_error,
    array,
    column_keys,
    compiled,
    marked,
    matrix_row,
    reads,
    real,
    row_key,
    share,
    write_error,
)

# More columns than this are a matter for a library of matrix products.
_SKINNY = 16
# The new row is converted whole, and read from the cache for each row of the window.
_LONG = 2**20
_RUN, _WHOLE = 2048, 4096


@compiled(relaxed=REORDERED)
def _products(x, y, start, out):
    """out[s] += <x, y[s]> with y from the column `start` on, four at a time: x is read and converted once for them."""
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
def _times(lo, hi, gradients, error, scale, q, out):
    rows, cols = out.shape[1], q.shape[2]
    a = np.empty(cols, q.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        add_error(a, matrix_row(gradients[t], row, cols, q), error, scale, t, row, 0)
        _products(a, q[t], 0, out[t, row])


@compiled(relaxed=REORDERED)
def _transposed_times(lo, hi, parts, gradients, error, scale, p, out):
    rows, cols = p.shape[2], out.shape[3]
    a = np.empty(cols, p.dtype)
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            add_error(a, matrix_row(gradients[t], row, cols, p), error, scale, t, row, 0)
            for s in range(p.shape[1]):
                weight, to = p[t, s, row], out[t, part, s]
                for x in range(cols):
                    to[x] += weight * a[x]


@compiled(relaxed=REORDERED)
def _inner(lo, hi, a, b, out):
    many, length = a.shape[1:]
    run = length if length <= _WHOLE else _RUN  # so much of b stays in the cache; measured
    for start in range(0, length, run):
        stop = min(start + run, length)
        for task in range(lo, hi):
            t, i = task // many, task % many
            _products(a[t, i, start:stop], b[t], start, out[t, i])


@compiled(relaxed=REORDERED)
def _keep(lo, hi, error, scale, limit, absent, gradients, p, q, step, salts, first_row, first_col):
    rows, cols = p.shape[2], q.shape[2]
    a, single, keys, key = np.empty(cols, p.dtype), np.empty(cols, np.float32), np.empty(cols, np.int32), np.int64(0)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if absent[t]:
            continue
        if task == lo or row == 0:
            key = column_keys(step, salts[t], first_col, keys)
        add_error(a, matrix_row(gradients[t], row, cols, p), error, scale, t, row, 0)
        for s in range(p.shape[1]):
            weight, y = p[t, s, row], q[t, s]
            for x in range(cols):
                a[x] -= weight * y[x]
        to = scale[t, row] if scale.size else a
        write_error(error[t, row], to, a, row_key(key, first_row + row), keys, single, limit)


def times(gradients: Sequence[Tensor], error: Error, q: Tensor) -> Tensor | None:
    """a q^T for a = e + g, which is not formed: (n, rows, r) in g's dtype.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        error: e, as `Errors` takes it.
        q: (n, r, cols) in g's dtype.
    """
    if not _fits(gradients, error, q):
        return None
    g = Matrices(gradients)
    n, rows, cols = g.shape
    out = torch.zeros(n, rows, q.shape[1], dtype=g.dtype)
    share(_times, n * rows, cols * q.shape[1], g.addresses, *Errors(error, g.dtype).arrays, array(q), array(out))
    return out


def transposed_times(gradients: Sequence[Tensor], error: Error, p: Tensor) -> Tensor | None:
    """p a for a = e + g and p (n, r, rows): (n, r, cols) in g's dtype; otherwise as `times`."""
    if not _fits(gradients, error, p):
        return None
    g = Matrices(gradients)
    n, rows, cols = g.shape
    parts = -(-PARTS // n)
    out = torch.zeros(n, parts, p.shape[1], cols, dtype=g.dtype)
    arrays = g.addresses, *Errors(error, g.dtype).arrays, array(p), array(out)
    share(_transposed_times, n * parts, rows * cols * p.shape[1] // parts, parts, *arrays)
    return out.sum(1)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Inner products of rows, formed and summed in fp64: (n, M, N) of a (n, M, L) and b (n, N, L)."""
    if a.dtype not in DTYPES or b.shape[1] > _SKINNY or b.numel() > _LONG:
        return None
    n, many, length = a.shape
    out = torch.zeros(n, many, b.shape[1], dtype=torch.float64)
    share(_inner, n * many, length * b.shape[1], array(a), array(b.double()), array(out))
    return out


def keep_low_rank(
    error: Error, gradients: Sequence[Tensor], row: tuple[Tensor, Tensor], rounding: Rounding, absent: Sequence[int]
) -> bool:
    """e <- e + g - p^T q in place, for the row p (n, r, rows) and q (n, r, cols); to few bits stochastically.

    Args:
        rounding: the step, a number per tensor, and where the tensors begin: as `core.linalg.counted_bits` takes them.
        absent: tensors whose error stays as it is.

    Returns:
        Whether it was done.
    """
    if not _fits(gradients, error, row[0]):
        return False
    g, kept, (step, salt, first) = Matrices(gradients), Errors(error, gradients[0].dtype), rounding
    n, rows, cols = g.shape
    factors = [array(x.to(g.dtype)) for x in row]
    where = *kept.arrays, kept.limit, marked(absent, n), g.addresses
    share(_keep, n * rows, cols * (2 + row[0].shape[1]), *where, *factors, int(step), array(salt), *first)
    return True


def _fits(gradients: Sequence[Tensor], error: Error, factor: Tensor) -> bool:
    return reads(error) and factor.shape[1] <= _SKINNY and gradients[0].dtype in (torch.float32, torch.float64)
