"""The low-rank family's passes over gradients and windows on CPUs, by numba; threads and rules as in cpu.py.

torch has each as several passes, and the products with r columns on one core.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from .cpu import DTYPES, _array, _real, _share

# Into how many parts a sum over rows is cut, whatever the number of threads.
_PARTS = 16
# More columns than this are a matter for a library of matrix products.
_SKINNY = 16
# The new row is converted whole, and read from the cache for each row of the window.
_LONG = 2**20
_RUN, _WHOLE = 256, 4096
# Sums may be taken in any order, so that loops are vectorized; NaN and infinity stay what they are.
_FAST = {"reassoc", "contract", "nsz"}


def _jit(function):
    try:
        return numba.njit(nogil=True, cache=True, fastmath=_FAST)(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        return numba.njit(nogil=True, fastmath=_FAST)(function)


@_jit
def _sum_into(a, g, error, t, row):
    if error.size == 0:
        for x in range(a.size):
            a[x] = g[x]
    else:
        e = error[t, row]
        for x in range(a.size):
            a[x] = g[x] + _real(e[x])


@_jit
def _times(lo, hi, gradient, error, q, out):
    rows, cols = gradient.shape[1:]
    a = np.empty(cols, gradient.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        _sum_into(a, gradient[t, row], error, t, row)
        for s in range(q.shape[1]):
            y, total = q[t, s], a[0] * q[t, s, 0]
            for x in range(1, cols):
                total += a[x] * y[x]
            out[t, row, s] = total


@_jit
def _transposed_times(lo, hi, parts, gradient, error, p, out):
    rows, cols = gradient.shape[1:]
    a = np.empty(cols, gradient.dtype)
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            _sum_into(a, gradient[t, row], error, t, row)
            for s in range(p.shape[1]):
                weight, to = p[t, s, row], out[t, part, s]
                for x in range(cols):
                    to[x] += weight * a[x]


@_jit
def _inner(lo, hi, a, b, out):
    many, length = a.shape[1:]
    run = length if length <= _WHOLE else _RUN  # so much of b stays in the cache; measured
    for start in range(0, length, run):
        stop = min(start + run, length)
        for task in range(lo, hi):
            t, i = task // many, task % many
            x = a[t, i, start:stop]
            for s in range(b.shape[1]):
                y, total = b[t, s, start:stop], 0.0
                for k in range(stop - start):
                    total += np.float64(_real(x[k])) * y[k]
                out[t, i, s] += total


@_jit
def _keep(lo, hi, rounded, error, gradient, p, q, row_bits, col_bits):
    rows, cols = gradient.shape[1:]
    a, single = np.empty(cols, gradient.dtype), np.empty(cols, np.float32)
    bits = single.view(np.int32)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        _sum_into(a, gradient[t, row], error, t, row)
        for s in range(p.shape[1]):
            weight, y = p[t, s, row], q[t, s]
            for x in range(cols):
                a[x] -= weight * y[x]
        e = error[t, row]
        if rounded:  # to bf16, see core.linalg.stochastic_round
            key, keys = row_bits[t, row], col_bits[t]
            for x in range(cols):
                single[x] = a[x]
            for x in range(cols):
                noise = (np.int32(key * keys[x]) >> np.int32(16)) & np.int32(0xFFFF)
                e[x] = np.int16(np.int32(bits[x] + noise) >> np.int32(16))
        else:
            for x in range(cols):
                e[x] = a[x]


def times(gradient: Tensor, error: Tensor | None, q: Tensor) -> Tensor | None:
    """a q^T for a = e + g, which is not formed: (n, rows, r) in g's dtype.

    Args:
        gradient: g, (n, rows, cols) fp32 or fp64.
        error: e, the same shape, fp32, fp64 or bf16; or None.
        q: (n, r, cols) in g's dtype.
    """
    if not _fits(gradient, error, q):
        return None
    n, rows, cols = gradient.shape
    out = gradient.new_empty(n, rows, q.shape[1])
    _share(_times, n * rows, cols * q.shape[1], _array(gradient), _errors(gradient, error), _array(q), _array(out))
    return out


def transposed_times(gradient: Tensor, error: Tensor | None, p: Tensor) -> Tensor | None:
    """p a for a = e + g and p (n, r, rows): (n, r, cols) in g's dtype; otherwise as `times`."""
    if not _fits(gradient, error, p):
        return None
    n, rows, cols = gradient.shape
    parts = -(-_PARTS // n)
    out = gradient.new_zeros(n, parts, p.shape[1], cols)
    arrays = _array(gradient), _errors(gradient, error), _array(p), _array(out)
    _share(_transposed_times, n * parts, rows * cols * p.shape[1] // parts, parts, *arrays)
    return out.sum(1)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Inner products of rows, formed and summed in fp64: (n, M, N) of a (n, M, L) and b (n, N, L)."""
    if a.dtype not in DTYPES or b.shape[1] > _SKINNY or b.numel() > _LONG:
        return None
    n, many, length = a.shape
    out = torch.zeros(n, many, b.shape[1], dtype=torch.float64)
    _share(_inner, n * many, length * b.shape[1], _array(a), _array(b.double()), _array(out))
    return out


def keep(error: Tensor, gradient: Tensor, p: Tensor, q: Tensor, bits: Callable[[], tuple[Tensor, Tensor]]) -> bool | None:
    """e <- e + g - p^T q in place, for p (n, r, rows) and q (n, r, cols); to bf16 stochastically, by `counted_factors`, `bits()`.

    Returns:
        Whether it was done; None: it cannot be.
    """
    if not _fits(gradient, error, p) or not error.is_contiguous():
        return None
    n, rows, cols = gradient.shape
    rounded = error.dtype == torch.bfloat16
    hashes = bits() if rounded else [torch.empty(0, 0, dtype=torch.int32)] * 2
    arrays = [_array(x) for x in (error, gradient, p.to(gradient.dtype), q.to(gradient.dtype), *hashes)]
    _share(_keep, n * rows, cols * (2 + p.shape[1]), rounded, *arrays)
    return True


def _fits(gradient: Tensor, error: Tensor | None, factor: Tensor) -> bool:
    known = error is None or error.dtype in DTYPES
    return known and factor.shape[1] <= _SKINNY and gradient.dtype in (torch.float32, torch.float64)


def _errors(gradient: Tensor, error: Tensor | None) -> np.ndarray:
    return _array(gradient.new_empty(0, 0, 0) if error is None else error)
