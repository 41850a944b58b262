"""Sparse windows on CPUs, by numba: a row's window is one run of memory. It is read once, against a row in the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Blocks, Entry, Matrices, Scale, Stored
from .constants import EXPONENT_SHIFT, LOWER_16_BITS, VALUE_BITS, VALUE_MASK, VALUE_ZERO
from .cpu_threads import PARTS, divide_work
from .cpu_tools import Addresses, array, compiled, factors, kept_places, matrix_row, real
from .cpu_top_k import flagged
from .devices import is_plain

# Up to this many new numbers in a row, each is compared with the row's whole window; more are marked in a row of flags.
_FEW = 16
# How many met numbers of the window are collected before their values are read, see `dots_parts`.
_MET = 2**12
# A row has this much room on either side: a 16-bit index cannot leave it, whatever a damaged checkpoint holds.
ROOM = 2**16


@compiled
def zeros_row(cols, like):
    """Give a row of zeros with room around it. Only damaged indices reach the room, so it is left unset, which saves time."""
    row = np.empty(cols + 2 * ROOM, like.dtype)
    row[ROOM : ROOM + cols] = 0
    return row


@compiled
def index_of(stored, shift):
    """Give the index of a kept number: a whole int16, or the upper 10 of its 16 bits (`SparseCodec`)."""
    return (np.int32(stored) & np.int32(LOWER_16_BITS)) >> shift


@compiled
def _value(stored):
    """Give the value of a kept number of `SparseCodec`, in units of its block's scale."""
    return np.float32((np.int32(stored) & np.int32(VALUE_MASK)) - np.int32(VALUE_ZERO))


@compiled
def _power(scale):
    """Give 2^e for a scale e + EXPONENT_BIAS; 0 for 0."""
    return np.int32(np.int32(scale) << np.int32(EXPONENT_SHIFT)).view(np.float32)


@compiled
def _flag(index, shift, new_i, columns, marks, flags):
    """Flag the numbers of a row's window that may meet a new number: indices are equal, perhaps in different blocks."""
    length = index.size
    if new_i.size > _FEW:
        for j in range(length):
            flags[j] = marks[np.uint32(columns[j] + index_of(index[j], shift))] & np.uint8(1)  # the room holds any bits
        return
    for j in range(length):
        flags[j] = 0
    for i in range(new_i.size):
        wanted = np.int16(new_i[i] << shift)
        if shift == 0:  # comparisons of 16 bits, 32 at once
            for j in range(length):
                flags[j] |= np.uint8(index[j] == wanted)
        else:  # equal above the bits of the value
            for j in range(length):
                flags[j] |= np.uint8(np.uint16(index[j] ^ wanted) < np.uint16(1 << VALUE_BITS))


@compiled
def dots_parts(lo, hi, parts, shift, indices, values, scales, new_indices, new_values, columns, blocks_of, cols, out):
    """Write the inner products of the new entry with the window to `out` (n, parts, m), for parts of the rows.

    A number of the window is met if the new row has a number in the same column. Few are met. They are found by their indices,
    many at once. Their values are read later, also many at once: the values are scattered over memory, and waiting for each
    alone would take longer than all the rest.
    """
    rows, length = indices.shape[1:]
    kept, (m, blocks) = new_values.shape[2], scales.shape[2:]
    dense, marks = zeros_row(cols, new_values), np.empty(cols + 2 * ROOM, np.uint8)
    marks[ROOM : ROOM + cols] = 0
    columns, slots = tiled(columns, length), np.empty(length, np.int32)
    for j in range(length):
        slots[j] = j // kept
    words, where = np.zeros(-(-length // 8), np.int64), np.empty(length, np.int32)
    room = max(_MET, length)
    met, met_slots, places = np.empty(room, np.float64), np.empty(room, np.int32), np.empty(room, np.int64)
    scale_places, count = np.empty(room, np.int64), 0
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        stop = rows * (part + 1) // parts
        for row in range(rows * part // parts, stop):
            new_i, new_v = new_indices[t, row], new_values[t, row]
            empty = True
            for i in range(kept):
                place = columns[i] + new_i[i]
                dense[place], marks[place] = new_v[i], 1
                empty = empty and real(new_v[i]) == 0
            if not empty:
                index = indices[t, row]
                _flag(index, shift, new_i, columns, marks, words.view(np.uint8))
                for i in range(flagged(words, where)):
                    j = where[i]
                    number = np.float64(real(dense[np.uint32(columns[j] + index_of(index[j], shift))]))
                    met[count], met_slots[count], places[count] = number, slots[j], row * length + j
                    scale_places[count] = (row * m + slots[j]) * blocks + blocks_of[j % kept]
                    count += number != 0
            for i in range(kept):
                place = columns[i] + new_i[i]
                dense[place], marks[place] = 0, 0
            if count + length > room or row == stop - 1:
                products = out[t, part]
                if blocks == 0:
                    value = values[t].reshape(rows * length)
                    for i in range(count):
                        products[met_slots[i]] += met[i] * np.float64(real(value[places[i]]))
                else:
                    stored, scale = indices[t].reshape(rows * length), scales[t].reshape(rows * m * blocks)
                    for i in range(count):
                        power = np.float64(_power(scale[scale_places[i]]))
                        products[met_slots[i]] += met[i] * (np.float64(_value(stored[places[i]])) * power)
                count = 0


@compiled
def _weigh(c, scale, blocks_of, weights):
    """Give the weights of a row's window: the slot's coefficient, times the block's scale if the window has scales."""
    kept = blocks_of.size
    for slot in range(c.size):
        for i in range(kept):
            weights[slot * kept + i] = c[slot] if scale.size == 0 else c[slot] * _power(scale[slot, blocks_of[i]])


@compiled
def _sum_row(shift, index, value, columns, weights, products, places, dense):
    """Add the row's part of G^T c to `dense`, which is zero."""
    for j in range(index.size):  # a loop of its own is vectorized
        products[j] = weights[j] * (_value(index[j]) if shift else real(value[j]))
    for j in range(index.size):
        places[j] = columns[j] + index_of(index[j], shift)
    for j in range(index.size):
        dense[np.uint32(places[j])] += products[j]


@compiled
def update_rows(
    lo, hi, start, shift, indices, values, scales, c, columns, blocks_of, left, right, params, rows, cols, factor, decay
):
    """Compute p <- decay * p + factor * u with u = diag(left) G^T c diag(right), or u = G^T c where left and right are empty.

    p are the matrices at the addresses `params`; u has `rows` rows of the window, from row `start` on.
    """
    length = indices.shape[2]
    dense, columns = zeros_row(cols, c), tiled(columns, length)
    weights, products, places = np.empty(length, c.dtype), np.empty(length, c.dtype), np.empty(length, np.int32)
    u = dense[ROOM : ROOM + cols]
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if task == lo or row == 0 or scales.size:
            _weigh(c[t], scales[t, start + row] if scales.size else scales[0, 0], blocks_of, weights)
        value = values[t, start + row] if values.size else values[0, 0]
        _sum_row(shift, indices[t, start + row], value, columns, weights, products, places, dense)
        p = matrix_row(params[t], row, cols, dense)
        if right.size:
            size, sizes = factor * left[t, row], right[t]
            for x in range(cols):
                p[x] = decay * p[x] + (size * u[x]) * sizes[x]
        else:
            for x in range(cols):
                p[x] = decay * p[x] + factor * u[x]
        for x in range(cols):
            u[x] = 0


@compiled
def tiled(columns, length):
    """Give `columns`, repeated up to `length` numbers."""
    tiled = np.empty(length, np.int32)
    for j in range(length):
        tiled[j] = columns[j % columns.size]
    return tiled


def dots(stored: Stored, entry: Entry, cols: int, blocks: Blocks, j: Tensor | None = None) -> Tensor | None:
    """Give the inner products of an entry, indices and values (n, rows, k), with the window: (n, m) fp64; None if j is given."""
    if j is not None:
        return None
    n, rows, m, k = stored[0].shape
    parts = -(-PARTS // n)
    out = torch.zeros(n, parts, m, dtype=torch.float64)
    new = [array(x) for x in entry]
    arrays = *window_arrays(stored), *new, *places_in_row(cols, blocks), cols, array(out)
    divide_work(dots_parts, n * parts, rows * m * k // parts, parts, *arrays)
    return out.sum(1)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor:
    """Give rows `rows` of G^T c, (n, rows, cols) in c's dtype, for c (n, m) in fp32 or fp64."""
    u = torch.zeros(len(c), rows.stop - rows.start, cols, dtype=c.dtype)
    _updated(stored, c, blocks, rows.start, u, 1.0, 0.0, None)
    return u


def apply(
    stored: Stored,
    c: Tensor,
    cols: int,
    blocks: Blocks,
    params: Matrices,
    scale: float | Tensor,
    decay: float | Tensor,
    sizes: Scale = None,
) -> bool:
    """Compute p <- decay * p + scale * u with u = diag(x) G^T c diag(y), for n matrices p (rows, cols) in c's dtype.

    Only a row of u is formed at a time.

    Returns:
        Whether it was done: the matrices have to be contiguous, and `scale` and `decay` numbers.
    """
    if isinstance(scale, Tensor) or isinstance(decay, Tensor) or not all(map(is_plain, params)):
        return False
    _updated(stored, c, blocks, 0, params, scale, decay, sizes)
    return True


def _updated(
    stored: Stored, c: Tensor, blocks: Blocks, start: int, params: Matrices, factor: float, decay: float, sizes: Scale
) -> None:
    p, weights = Addresses(params), array(c)
    n, rows, cols = p.shape
    shift, indices, values, scales = window_arrays(stored)
    number = weights.dtype.type
    arrays = indices, values, scales, weights, *places_in_row(cols, blocks), *factors(sizes, c.dtype), p.array
    divide_work(update_rows, n * rows, indices.shape[2] + cols, start, shift, *arrays, rows, cols, number(factor), number(decay))


def window_arrays(stored: Stored) -> tuple[np.int32, np.ndarray, np.ndarray, np.ndarray]:
    """Give the bits by which an index is shifted; indices and values (n, rows, m k); scales (n, rows, m, blocks)."""
    indices, values, scales = stored
    n, _, m, _ = indices.shape
    values = indices[:1, :1, :0] if values is None else values
    scales = torch.empty(n, 1, m, 0, dtype=torch.uint8) if scales is None else scales
    shift = np.int32(VALUE_BITS if scales.numel() else 0)
    return shift, array(indices.flatten(2)), array(values.flatten(2)), array(scales)


def places_in_row(cols: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Give `kept_places`, with columns counted in a row that has room around it."""
    starts, numbers = kept_places(cols, blocks)
    return starts + np.int32(ROOM), numbers
