"""The sparse family on CPUs, by numba: a row's window is one run of memory, which is streamed once, past a row in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba.cpython.unsafe.numbers import trailing_zeros
from torch import Tensor

from . import Blocks, Error, Rounding, Stored
from .cpu_tools import (
    PARTS,
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

# Where more is kept, a heap over the whole block.
_MANY = 32
# Maxima of parts of a block: at most this many, at least what is kept.
_LANES = 64
# Up to this many new entries in a row, each is compared with all of the window; else they are marked in a row of flags.
_FEW = 16
# Entries that meet the new row, to be read at once.
_MET = 2**12
# 16-bit indices cannot leave a row with so much room around it, whatever a damaged checkpoint holds.
_ROOM = 2**16


@compiled
def _flagged(words, where):
    """Where the bytes of `words` are 1, in order, into `where`; returns how many."""
    found = 0
    for w in range(words.size):
        word = words[w]
        while word != 0:
            where[found] = 8 * w + (trailing_zeros(word) >> 3)
            found += 1
            word &= word - 1
    return found


@compiled
def _select(bits, kept, lanes, words, where):
    """Indices of the `kept` largest of `bits` into where[:kept]."""
    width = bits.size
    if kept > _MANY or width < 4 * kept:
        for i in range(width):
            where[i] = i
        _largest(bits, width, kept, where)
        return
    least = _bound(bits, kept, lanes)
    flags = words.view(np.uint8)
    for i in range(width):
        flags[i] = np.uint8(bits[i] >= least)
    for i in range(width, flags.size):
        flags[i] = 0
    _largest(bits, _flagged(words, where), kept, where)


@compiled
def _bound(bits, kept, lanes):
    """A number that `kept` of `bits` reach, and not many more: the kept-th largest maximum of disjoint subsets."""
    many = (bits.size + 1) // 2
    low, high = bits[:many], bits[many:]  # slices start at 0, which lets loops be vectorized
    for i in range(high.size):
        lanes[i] = max(low[i], high[i])
    if high.size < many:
        lanes[many - 1] = bits[many - 1]
    while many > _LANES:
        before, many = many, (many + 1) // 2
        low, high = lanes[:many], lanes[many:before]
        for i in range(high.size):
            low[i] = max(low[i], high[i])
    left, least = lanes[:many], bits.dtype.type(np.iinfo(bits.dtype).max)
    for _ in range(kept):
        largest = bits.dtype.type(-1)
        for i in range(many):
            largest = max(largest, left[i] if left[i] < least else bits.dtype.type(-1))
        if largest < 0:  # equal numbers count once
            break
        least = largest
    return least


@compiled
def _largest(bits, found, kept, where):
    """Move those of where[:found] with the `kept` largest of `bits` to the front: a heap of the largest so far."""
    if found == kept:
        return
    for start in range(kept // 2 - 1, -1, -1):
        _sift(bits, where, start, kept)
    for i in range(kept, found):
        if bits[where[i]] > bits[where[0]]:
            where[0] = where[i]
            _sift(bits, where, 0, kept)


@compiled
def _sift(bits, where, start, size):
    """Let the entry at `start` sink until no child is smaller."""
    index = where[start]
    value = bits[index]
    while True:
        child = 2 * start + 1
        if child >= size:
            break
        if child + 1 < size and bits[where[child + 1]] < bits[where[child]]:
            child += 1
        if bits[where[child]] >= value:
            break
        where[start] = where[child]
        start = child
    where[start] = index


@compiled
def _top_k(lo, hi, gradients, error, scale, unsigned, block, kept, kept_tail, cols, indices, values):
    rows = values.shape[1]
    a, magnitudes, lanes = np.empty(block, values.dtype), np.empty(block, unsigned.dtype), np.empty(block, unsigned.dtype)
    words, where = np.empty(-(-block // 8), np.int64), np.empty(block, np.int32)
    bits, top = a.view(unsigned.dtype), np.iinfo(unsigned.dtype).max
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        g, index, value = matrix_row(gradients[t], row, cols, values), indices[t, row], values[t, row]
        entry = 0
        for start in range(0, cols, block):
            width = min(block, cols - start)
            size = kept if width == block else kept_tail
            add_error(a[:width], g[start : start + width], error, scale, t, row, start)
            # Without the sign, the bits of numbers are ordered as their magnitudes are, with NaN above all.
            for i in range(width):
                magnitudes[i] = bits[i] & top
            _select(magnitudes[:width], size, lanes, words[: -(-width // 8)], where)
            for i in range(size):
                index[entry], value[entry] = where[i], a[where[i]]
                entry += 1


@compiled
def _index(stored, shift):
    """The index of an entry: int16, or the upper 10 bits of a low-bit one (`SparseCodec`)."""
    return (np.int32(stored) & np.int32(0xFFFF)) >> shift


@compiled
def _value(stored):
    """The value of a low-bit entry, in units of its block's scale."""
    return np.float32((np.int32(stored) & np.int32(63)) - np.int32(32))


@compiled
def _power(scale):
    """2^e for a scale e + 127; 0 for 0."""
    return np.int32(np.int32(scale) << np.int32(23)).view(np.float32)


@compiled
def _flag(index, shift, new_i, columns, marks, flags):
    """Flag the entries of a row's window that may meet the new row: the indices are equal, if in another block."""
    length = index.size
    if new_i.size > _FEW:
        for j in range(length):
            flags[j] = marks[np.uint32(columns[j] + _index(index[j], shift))]
        return
    for j in range(length):
        flags[j] = 0
    for e in range(new_i.size):
        wanted = np.int16(new_i[e] << shift)
        if shift == 0:  # comparisons of 16 bits, 32 at once
            for j in range(length):
                flags[j] |= np.uint8(index[j] == wanted)
        else:  # equal above the bits of the value
            for j in range(length):
                flags[j] |= np.uint8(np.uint16(index[j] ^ wanted) < np.uint16(64))


@compiled
def _dots(lo, hi, parts, shift, indices, values, scales, row_indices, row_values, columns, blocks_of, cols, out):
    """Of a row's window few entries lie where the new row has one: these are found by their indices, in bulk.

    Their values are read later, many at a time: they are scattered over memory, and to wait for each would take longer than
    all the rest.
    """
    rows, length = indices.shape[1:]
    kept, (m, blocks) = row_values.shape[2], scales.shape[2:]
    dense, marks = np.zeros(cols + 2 * _ROOM, row_values.dtype), np.zeros(cols + 2 * _ROOM, np.uint8)
    columns, slots = _tiled(columns, length), np.empty(length, np.int32)
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
            new_i, new_v = row_indices[t, row], row_values[t, row]
            empty = True
            for e in range(kept):
                place = columns[e] + new_i[e]
                dense[place], marks[place] = new_v[e], 1
                empty = empty and real(new_v[e]) == 0
            if not empty:
                index = indices[t, row]
                _flag(index, shift, new_i, columns, marks, words.view(np.uint8))
                for i in range(_flagged(words, where)):
                    j = where[i]
                    number = np.float64(real(dense[np.uint32(columns[j] + _index(index[j], shift))]))
                    met[count], met_slots[count], places[count] = number, slots[j], row * length + j
                    scale_places[count] = (row * m + slots[j]) * blocks + blocks_of[j % kept]
                    count += number != 0
            for e in range(kept):
                place = columns[e] + new_i[e]
                dense[place], marks[place] = 0, 0
            if count + length > room or row == stop - 1:
                products = out[t, part]
                if blocks == 0:
                    value = values[t].reshape(rows * length)
                    for i in range(count):
                        products[met_slots[i]] += met[i] * np.float64(real(value[places[i]]))
                else:
                    entry, scale = indices[t].reshape(rows * length), scales[t].reshape(rows * m * blocks)
                    for i in range(count):
                        power = np.float64(_power(scale[scale_places[i]]))
                        products[met_slots[i]] += met[i] * (np.float64(_value(entry[places[i]])) * power)
                count = 0


@compiled
def _weigh(c, scale, blocks_of, weights):
    """Weights of a row's entries: of a slot its coefficient, times the scale of the block where there are scales."""
    kept = blocks_of.size
    for slot in range(c.size):
        for e in range(kept):
            weights[slot * kept + e] = c[slot] if scale.size == 0 else c[slot] * _power(scale[slot, blocks_of[e]])


@compiled
def _sum_row(shift, index, value, columns, weights, products, places, dense):
    """The row's part of G^T c is added to `dense`, which is zero."""
    for j in range(index.size):  # in loops of their own, these are vectorized
        products[j] = weights[j] * (_value(index[j]) if shift else real(value[j]))
    for j in range(index.size):
        places[j] = columns[j] + _index(index[j], shift)
    for j in range(index.size):
        dense[np.uint32(places[j])] += products[j]


@compiled
def _update(lo, hi, first, shift, indices, values, scales, c, columns, blocks_of, params, rows, cols, factor, decay):
    """p <- decay * p + factor * u with u = G^T c, of `rows` rows from `first` on, for the matrices at `params`."""
    length = indices.shape[2]
    dense, columns = np.zeros(cols + 2 * _ROOM, c.dtype), _tiled(columns, length)
    weights, products, places = np.empty(length, c.dtype), np.empty(length, c.dtype), np.empty(length, np.int32)
    u = dense[_ROOM : _ROOM + cols]
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if task == lo or row == 0 or scales.size:
            _weigh(c[t], scales[t, first + row] if scales.size else scales[0, 0], blocks_of, weights)
        value = values[t, first + row] if values.size else values[0, 0]
        _sum_row(shift, indices[t, first + row], value, columns, weights, products, places, dense)
        p = matrix_row(params[t], row, cols, dense)
        for x in range(cols):
            p[x] = decay * p[x] + factor * u[x]
        for x in range(cols):
            u[x] = 0


@compiled
def _keep(
    lo, hi, error, scale, limit, absent, gradients, cols, indices, values, columns, step, salts, first_row, first_col, like
):
    rows = indices.shape[1]
    a, single, keys, key = np.empty(cols, like.dtype), np.empty(cols, np.float32), np.empty(cols, np.int32), np.int64(0)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if absent[t]:
            continue
        if task == lo or row == 0:
            key = column_keys(step, salts[t], first_col, keys)
        add_error(a, matrix_row(gradients[t], row, cols, like), error, scale, t, row, 0)
        index, value = indices[t, row], values[t, row]
        for e in range(value.size):
            a[columns[e] - _ROOM + index[e]] -= real(value[e])
        to = scale[t, row] if scale.size else like
        write_error(error[t, row], to, a, row_key(key, first_row + row), keys, single, limit)


@compiled
def _tiled(columns, length):
    tiled = np.empty(length, np.int32)
    for j in range(length):
        tiled[j] = columns[j % columns.size]
    return tiled


def top_k(gradients: Sequence[Tensor], error: Error, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of every block of a = e + g; a is not formed.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        error: e, as `Errors` takes it.
        blocks: length of a block, how many numbers are kept in each, and how many in a shorter last one.

    Returns:
        (n, rows, k) int16 indices in the block, and values in g's dtype; None: it cannot be done.
    """
    if not reads(error):
        return None
    g = Matrices(gradients)
    n, rows, cols = g.shape
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    shape = (n, rows, full * kept + (kept_tail if tail else 0))
    indices, values = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=g.dtype)
    unsigned = np.empty(0, np.int32 if g.dtype.itemsize == 4 else np.int64)
    arrays = g.addresses, *Errors(error, g.dtype).arrays, unsigned, block, kept, kept_tail, cols, array(indices), array(values)
    share(_top_k, n * rows, cols, *arrays)
    return indices, values


def dots(stored: Stored, row: tuple[Tensor, Tensor], cols: int, blocks: Blocks) -> Tensor:
    """(n, m) fp64: inner products of `row`, indices and values (n, rows, k), with the window `stored`."""
    n, rows, m, k = stored[0].shape
    parts = -(-PARTS // n)
    out = torch.zeros(n, parts, m, dtype=torch.float64)
    shift, *window = _window(stored)
    new = [array(x) for x in row]
    share(_dots, n * parts, rows * m * k // parts, parts, shift, *window, *new, *_columns(cols, blocks), cols, array(out))
    return out.sum(1)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor:
    """Rows `rows` of G^T c, (n, rows, cols) in c's dtype, fp32 or fp64; c is (n, m)."""
    u = torch.zeros(len(c), rows.stop - rows.start, cols, dtype=c.dtype)
    _update_rows(stored, c, blocks, rows.start, u, 1.0, 0.0)
    return u


def apply(stored: Stored, c: Tensor, cols: int, blocks: Blocks, params: Sequence[Tensor], scale: float, decay: float) -> bool:
    """p <- decay * p + scale * u with u = G^T c, which is not formed, for n matrices (rows, cols) in c's dtype.

    Returns:
        Whether it was done: matrices have to be contiguous.
    """
    if not all(p.is_contiguous() for p in params):
        return False
    _update_rows(stored, c, blocks, 0, params, scale, decay)
    return True


def _update_rows(stored, c, blocks, first, params, factor, decay) -> None:
    p, weights = Matrices(params), array(c)
    n, rows, cols = p.shape
    shift, *window = _window(stored)
    number = weights.dtype.type
    arrays = *window, weights, *_columns(cols, blocks), p.addresses, rows, cols, number(factor), number(decay)
    share(_update, n * rows, window[0].shape[2] + cols, first, shift, *arrays)


def _window(stored: Stored) -> tuple[np.int32, np.ndarray, np.ndarray, np.ndarray]:
    """By how much an entry's index is shifted; indices and values (n, rows, m k), scales (n, rows, m, blocks)."""
    indices, values, scales = stored
    n, _, m, _ = indices.shape
    values = indices[:1, :1, :0] if values is None else values
    scales = torch.empty(n, 1, m, 0, dtype=torch.uint8) if scales is None else scales
    return np.int32(6 if scales.numel() else 0), *(array(x.flatten(2)) for x in (indices, values)), array(scales)


def keep_sparse(
    error: Error,
    gradients: Sequence[Tensor],
    row: tuple[Tensor, Tensor],
    blocks: Blocks,
    rounding: Rounding,
    absent: Sequence[int],
) -> bool:
    """e <- e + g - c in place, with c the row of indices and values (n, rows, k); to few bits stochastically.

    Args:
        rounding: the step, a number per tensor, and where the tensors begin: as `core.linalg.counted_bits` takes them.
        absent: tensors whose error stays as it is.

    Returns:
        Whether it was done.
    """
    if not reads(error):
        return False
    g, kept, (step, salt, first) = Matrices(gradients), Errors(error, gradients[0].dtype), rounding
    n, rows, cols = g.shape
    noise = int(step), array(salt), *first, array(torch.empty(0, dtype=g.dtype))
    where = *kept.arrays, kept.limit, marked(absent, n), g.addresses, cols, *(array(x) for x in row)
    share(_keep, n * rows, cols, *where, _columns(cols, blocks)[0], *noise)
    return True


def _columns(cols: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Of each entry of a row: where its block starts in the row with room around it, and the block."""
    block, kept, kept_tail = blocks
    full = np.repeat(np.arange(cols // block, dtype=np.int32), kept)
    number = np.append(full, np.full(kept_tail if cols % block else 0, cols // block, np.int32))
    return number * np.int32(block) + np.int32(_ROOM), number
