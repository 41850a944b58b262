"""e <- decay * e + g - c on CPUs, by numba: a row of the sum is formed in the cache, rounded, and written.

Rounding is that of `core.cells`: stochastic where e has few bits, by the random numbers of `core.random`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from . import Blocks, Entry, Error, Matrices, Rounding, Scale
from .constants import (
    BF16_SHIFT,
    BLOCK,
    COUNTER_MASK,
    HASH_MASK,
    HASH_MULTIPLIER,
    INT4_ZERO,
    LARGEST_INT4,
    LARGEST_INT8,
    LOWER_16_BITS,
    SALT_OFFSET,
    UNIFORM_UNIT,
)
from .cpu_min_max import FINITE, pack, write_between_bounds
from .cpu_threads import divide_work
from .cpu_tiles import TILE, subtract_tile
from .cpu_tools import (
    CONTRACTED,
    REORDERED,
    Addresses,
    Errors,
    add_error,
    array,
    compiled,
    factors,
    fits,
    kept_places,
    matrix_row,
    read_row,
    reads,
    real,
)
from .devices import is_plain


@compiled
def _mix(x):
    """Compute `core.random._mix`."""
    x = ((x ^ (x >> 16)) * HASH_MULTIPLIER) & HASH_MASK
    x = ((x ^ (x >> 16)) * HASH_MULTIPLIER) & HASH_MASK
    return x ^ (x >> 16)


@compiled
def column_keys(step, salt, origin, keys):
    """Write the columns' factors of `core.random.counted_bits`, from column `origin` on, to `keys`; return `row_key`'s key."""
    key = _mix(_mix(step & COUNTER_MASK) ^ _mix(salt + SALT_OFFSET))
    mixed = _mix(key)
    for x in range(keys.size):
        keys[x] = np.int32(_mix(mixed ^ (origin + x)) | 1)
    return key


@compiled
def row_key(key, row):
    """Give a row's factor of `core.random.counted_bits`, for the key that `column_keys` returned."""
    return np.int32(_mix(key ^ row) | 1)


@compiled
def _noise(factor, key):
    return (np.int32(factor * key) >> np.int32(16)) & np.int32(LOWER_16_BITS)


def write(e, scale, a, factor, keys, single, limit):
    """Write e <- a for a row, as `core.cells` does it: plain, or rounded by the hashes factor * keys.

    Args:
        e: fp32 or fp64; the bits of bf16; or int8 or packed 4-bit codes.
        scale: the scales or the bounds of the row's blocks, where e is codes.
        a: the row, which may be overwritten.
        factor, keys: the row's and the columns' factors, whose products are the numbers of `counted_bits`.
        single: room for a row of fp32.
        limit: the largest scale that may be stored.
    """
    raise NotImplementedError  # compiled code only


@overload(write)
def _write_compiled(e, scale, a, factor, keys, single, limit):
    if isinstance(e.dtype, types.Float):
        return _write_plain
    if e.dtype == types.int16:
        return _write_bf16
    if e.dtype == types.int8:
        return _write_bytes
    return write_between_bounds if scale.ndim == 2 else _write_halves


def _write_plain(e, scale, a, factor, keys, single, limit):
    for x in range(a.size):
        e[x] = a[x]


def _write_bf16(e, scale, a, factor, keys, single, limit):
    bits = single.view(np.int32)
    for x in range(a.size):
        single[x] = a[x]
    for x in range(a.size):
        e[x] = np.int16(np.int32(bits[x] + _noise(factor, keys[x])) >> np.int32(BF16_SHIFT))


def _write_bytes(e, scale, a, factor, keys, single, limit):
    _encode(scale, a, factor, keys, LARGEST_INT8, limit)
    for x in range(a.size):
        e[x] = np.int8(a[x])


def _write_halves(e, scale, a, factor, keys, single, limit):
    _encode(scale, a, factor, keys, LARGEST_INT4, limit)
    pack(e, a, np.int32(INT4_ZERO))


@compiled
def _encode(scale, a, factor, keys, largest_code, limit):
    """Compute a <- the codes of a, rounded stochastically: `core.codecs.BlockQuantizer.encode`."""
    top, finite = np.finfo(a.dtype).max, True
    for x in range(a.size):
        finite &= abs(a[x]) <= top
    if finite:
        _quantize(scale, a, factor, keys, largest_code, limit)
        return
    for block in range(scale.size):  # the next step notices NaN
        scale[block] = np.nan
    for x in range(a.size):
        a[x] = 0


@compiled(relaxed=FINITE)
def _quantize(scale, a, factor, keys, largest_code, limit):
    """Do `_encode` for finite numbers."""
    tiny, half, unit = np.finfo(a.dtype).tiny, np.float32(0.5), np.float32(UNIFORM_UNIT)
    top = a.dtype.type(largest_code)
    for block in range(scale.size):
        part, key = a[block * BLOCK : (block + 1) * BLOCK], keys[block * BLOCK : (block + 1) * BLOCK]
        largest = a.dtype.type(0)
        for x in range(part.size):
            largest = max(largest, abs(part[x]))
        size = min(largest / top, limit)
        size = a.dtype.type(0) if size < tiny else size
        scale[block], by = size, (a.dtype.type(1) if size == 0 else size)
        for x in range(part.size):
            noise = (np.float32(_noise(factor, key[x])) + half) * unit
            part[x] = min(max(np.floor(part[x] / by + noise), -top), top)


@compiled(relaxed=CONTRACTED)
def _subtract_product(a, p, row, q):
    """Compute a <- a - rows of p^T q. Four terms are subtracted in one pass over a. a is one row, or four."""
    many = len(q)
    tiled = many - many % TILE
    if len(a) == TILE:
        for s in range(0, tiled, TILE):
            subtract_tile(a, p, s, row, q)
    else:
        number = a[0]
        for s in range(0, tiled, TILE):
            p0, p1, p2, p3 = p[s, row], p[s + 1, row], p[s + 2, row], p[s + 3, row]
            q0, q1, q2, q3 = q[s], q[s + 1], q[s + 2], q[s + 3]
            for x in range(number.size):
                number[x] = (((number[x] - p0 * q0[x]) - p1 * q1[x]) - p2 * q2[x]) - p3 * q3[x]
    for i in range(len(a)):
        number = a[i]
        for s in range(tiled, many):
            weight, y = p[s, row + i], q[s]
            for x in range(number.size):
                number[x] -= weight * y[x]


def scales_of(scale, t, row, like):
    """Give the scales or bounds of a row; where there are none, the array `like`, which is not used."""
    raise NotImplementedError  # compiled code only


@overload(scales_of)
def _scales_of_compiled(scale, t, row, like):
    if scale.ndim == 4:
        return lambda scale, t, row, like: scale[t, row]
    return lambda scale, t, row, like: scale[t, row] if scale.size else like


@compiled(relaxed=REORDERED)
def keep_sparse_rows(
    lo, hi, error, scale, limit, absent, gradients, left, right, index, c, starts, cols, decay, step, salts, row_0, col_0, like
):
    """Compute e <- decay * e + g - c for some rows; the numbers of c are in the columns starts + index."""
    rows = error.shape[1]
    a, room = np.empty(cols, like.dtype), np.empty(cols, like.dtype)
    single, keys, key = np.empty(cols, np.float32), np.empty(cols, np.int32), np.int64(0)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if absent[t]:
            continue
        if task == lo or row == 0:
            key = column_keys(step, salts[t], col_0, keys)
        g = matrix_row(gradients[t], row, cols, like)
        read_row(a, room, g, left, right, error, scale, t, row, 0, decay)
        columns, numbers = index[t, row], c[t, row]
        for i in range(numbers.size):
            a[starts[i] + np.int64(columns[i])] -= real(numbers[i])
        write(error[t, row], scales_of(scale, t, row, like), a, row_key(key, row_0 + row), keys, single, limit)


@compiled(relaxed=REORDERED)
def keep_low_rank_rows(
    lo, hi, error, scale, limit, absent, gradients, left, right, p, q, cols, decay, step, salts, row_0, col_0, like
):
    """Compute e <- decay * e + g - p^T q for some rows. Four rows are formed at a time."""
    rows = error.shape[1]
    a, room = np.empty((TILE, cols), like.dtype), np.empty(cols, like.dtype)
    single, keys, key = np.empty(cols, np.float32), np.empty(cols, np.int32), np.int64(0)
    task = lo
    while task < hi:
        t, row = task // rows, task % rows
        many = TILE if row + TILE <= rows and task + TILE <= hi else 1
        if not absent[t]:
            if task == lo or row == 0:
                key = column_keys(step, salts[t], col_0, keys)
            for i in range(many):
                g = matrix_row(gradients[t], row + i, cols, like)
                read_row(a[i], room, g, left, right, error, scale, t, row + i, 0, decay)
            _subtract_product(a[:many], p[t], row, q[t])
            for i in range(row, row + many):
                scales = scales_of(scale, t, i, like)
                write(error[t, i], scales, a[i - row], row_key(key, row_0 + i), keys, single, limit)
        task += many


def keep(
    error: Error,
    gradients: Matrices,
    entry: Entry,
    rounding: Rounding,
    absent: Sequence[int],
    blocks: Blocks | None = None,
    scale: Scale = None,
    decay: float = 1.0,
    accepted: bool | Tensor = True,
    wide: bool = False,
) -> bool:
    """Compute e <- decay * e + g - c in place: see `hf_efcp.kernels.keep`. c is sparse with `blocks`, and low rank without.

    Args:
        error: e, as `Errors` takes it.
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        entry: int16 indices and values (n, rows, k); or p (n, r, rows) and q (n, r, cols).
        rounding: the step, () int64; a salt for each tensor, (n,) int64; their origin: see `core.random.counted_bits`.
        absent: tensors whose error stays as it is.
        blocks: of a sparse entry.
        scale: of g.
        decay: a number.
        accepted: has to be True, since on a CPU the host knows whether the step is accepted.
        wide: whether c may have a larger rank, see `hf_efcp.kernels.times`.

    Returns:
        Whether it was done.
    """
    if error is None or accepted is not True or not (reads(error) if blocks else fits(gradients, error, entry[0], wide)):
        return False
    g, kept, (step, salts, origin) = Addresses(gradients), Errors(error, gradients[0].dtype), rounding
    n, rows, cols = g.shape
    if blocks:
        arrays, starts, numbers = [array(x) for x in entry], kept_places(cols, blocks)[0], cols
    else:
        arrays, starts, numbers = [array(x.to(g.dtype)) for x in entry], np.empty(0, np.int32), cols * (2 + entry[0].shape[1])
    like = array(torch.empty(0, dtype=g.dtype))
    by = like.dtype.type(decay)  # an fp64 number would make every sum fp64
    absent_flags = np.zeros(n, bool)
    absent_flags[list(absent)] = True
    where = *kept.arrays, kept.limit, absent_flags, g.array, *factors(scale, g.dtype)
    compiled_rows, places = (keep_sparse_rows, (starts,)) if blocks else (keep_low_rank_rows, ())
    divide_work(compiled_rows, n * rows, numbers, *where, *arrays, *places, cols, by, int(step), array(salts), *origin, like)
    return True


@compiled(relaxed=REORDERED)
def square_rows(lo, hi, error, scale, cols, like, out):
    """Compute out[t, row] <- the sum of the squares of a row of e, in fp64."""
    rows = error.shape[1]
    e, zeros = np.empty(cols, like.dtype), np.zeros(cols, like.dtype)
    for task in range(lo, hi):
        t, row, total = task // rows, task % rows, 0.0
        add_error(e, zeros, error, scale, t, row, 0)
        for x in range(cols):
            total += np.float64(e[x]) * np.float64(e[x])
        out[t, row] = total


@compiled(relaxed=REORDERED)
def add_kept_rows(lo, hi, error, scale, left, right, params, weights, cols):
    """Compute p <- p + weight * diag(left) e diag(right) for some rows; p <- p + weight * e where left and right are empty."""
    rows = error.shape[1]
    e, zeros = np.empty(cols, weights.dtype), np.zeros(cols, weights.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        p, weight = matrix_row(params[t], row, cols, weights), weights[t]
        if not right.size:
            add_error(p, p, error, scale, t, row, 0, weight)
            continue
        weight, sizes = weight * left[t, row], right[t]
        if not scale.size:
            stored = error[t, row]
            for x in range(cols):
                p[x] += (weight * sizes[x]) * real(stored[x])
            continue
        add_error(e, zeros, error, scale, t, row, 0)
        for x in range(cols):
            p[x] += (weight * sizes[x]) * e[x]


def square(error: Error, cols: int, dtype: torch.dtype) -> Tensor | None:
    """Give the sum of the squares of e, (n,) fp64. A row of e has `cols` numbers, which are read in `dtype`."""
    if error is None or not reads(error):
        return None
    kept, (n, rows) = Errors(error, dtype), error[0].shape[:2]
    out = torch.empty(n, rows, dtype=torch.float64)
    divide_work(square_rows, n * rows, cols, *kept.arrays, cols, array(torch.empty(0, dtype=dtype)), array(out))
    return out.sum(1)


def add_kept(params: Matrices, error: Error, weights: Tensor, scale: Scale) -> bool:
    """Compute p <- p + weight * diag(x) e diag(y) in place, for n contiguous matrices p, and weights (n,) in p's dtype.

    Returns:
        Whether it was done.
    """
    if error is None or not reads(error) or not all(map(is_plain, params)):
        return False
    p = Addresses(params)
    n, rows, cols = p.shape
    arrays = *Errors(error, p.dtype).arrays, *factors(scale, p.dtype), p.array, array(weights), cols
    divide_work(add_kept_rows, n * rows, cols, *arrays)
    return True
