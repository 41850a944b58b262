"""Block top-k on CPUs, by numba: the numbers of largest magnitude in each block of a row."""

from __future__ import annotations

import numpy as np
import torch
from numba.cpython.unsafe.numbers import trailing_zeros

from . import Blocks, Entry, Error, Matrices, Scale
from .cpu_threads import divide_work
from .cpu_tools import Addresses, Errors, array, compiled, factors, matrix_row, read_row, reads

# If more numbers are kept in a block, a heap over the whole block selects them.
_MANY = 32
# The most maxima of parts of a block; there are at least as many as kept numbers.
_LANES = 64


@compiled
def flagged(words, where):
    """Write the positions of the bytes of `words`, int64, that are 1 to `where`, in order; return how many there are."""
    count = 0
    for w in range(words.size):
        word = words[w]
        while word != 0:
            where[count] = 8 * w + (trailing_zeros(word) >> 3)
            count += 1
            word &= word - 1
    return count


@compiled
def select(bits, kept, magnitudes, lanes, words, where):
    """Write the indices of the `kept` numbers of largest magnitude to where[:kept]. The numbers are given as their bits.

    Without the sign, the bits have the order of the magnitudes, with NaN above all numbers. The other arrays are room.
    """
    width, top = bits.size, np.iinfo(magnitudes.dtype).max
    for i in range(width):
        magnitudes[i] = bits[i] & top
    if kept > _MANY or width < 4 * kept:
        for i in range(width):
            where[i] = i
        _largest(magnitudes, width, kept, where)
        return
    least = _bound(magnitudes[:width], kept, lanes)
    used = words[: -(-width // 8)]
    flags = used.view(np.uint8)
    for i in range(width):
        flags[i] = np.uint8(magnitudes[i] >= least)
    for i in range(width, flags.size):
        flags[i] = 0
    _largest(magnitudes, flagged(used, where), kept, where)


@compiled
def _bound(bits, kept, lanes):
    """Give a bound that at least `kept` of `bits` reach, but not many more: the kept-th largest maximum of disjoint subsets."""
    many = (bits.size + 1) // 2
    low, high = bits[:many], bits[many:]  # indices of slices start at 0, so that loops are vectorized
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
        if largest < 0:  # equal numbers count once, so there may be fewer than `kept`
            break
        least = largest
    return least


@compiled
def _largest(bits, candidates, kept, where):
    """Move the indices of the `kept` largest of `bits` to the front of where[:candidates], by a heap of the largest so far."""
    if candidates == kept:
        return
    for start in range(kept // 2 - 1, -1, -1):
        _sift(bits, where, start, kept)
    for i in range(kept, candidates):
        if bits[where[i]] > bits[where[0]]:
            where[0] = where[i]
            _sift(bits, where, 0, kept)


@compiled
def _sift(bits, where, start, size):
    """Let the index at `start` sink until no child has a smaller number."""
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
def top_k_rows(lo, hi, gradients, x, y, error, scale, unsigned, block, kept, kept_tail, cols, indices, values):
    """Write indices and values of the largest numbers in the blocks of some rows of a = e + g."""
    rows = values.shape[1]
    a, room = np.empty(block, values.dtype), np.empty(block, values.dtype)
    magnitudes, lanes = np.empty(block, unsigned.dtype), np.empty(block, unsigned.dtype)
    words, where, bits = np.empty(-(-block // 8), np.int64), np.empty(block, np.int32), a.view(unsigned.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        g, index, value = matrix_row(gradients[t], row, cols, values), indices[t, row], values[t, row]
        place = 0
        for start in range(0, cols, block):
            width = min(block, cols - start)
            size = kept if width == block else kept_tail
            read_row(a[:width], room, g[start : start + width], x, y, error, scale, t, row, start)
            select(bits[:width], size, magnitudes, lanes, words, where)
            for i in range(size):
                index[place], value[place] = where[i], a[where[i]]
                place += 1


def unsigned_like(dtype: torch.dtype) -> np.ndarray:
    """Give an empty array of integers as long as numbers of `dtype`."""
    return np.empty(0, np.int32 if dtype.itemsize == 4 else np.int64)


def top_k(gradients: Matrices, error: Error, blocks: Blocks, scale: Scale = None) -> Entry | None:
    """Give the numbers of largest magnitude in every block of a = e + g. Only a block of a is formed at a time.

    Args:
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        error: e, as `Errors` takes it.
        blocks: the length of a block, how many numbers are kept in each block, and how many in a shorter last block.
        scale: of g.

    Returns:
        Indices in the block, int16 (n, rows, k), and values in g's dtype. None: no kernel can do it.
    """
    if not reads(error):
        return None
    g = Addresses(gradients)
    n, rows, cols = g.shape
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    shape = (n, rows, full * kept + (kept_tail if tail else 0))
    indices, values = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=g.dtype)
    arrays = (
        g.array,
        *factors(scale, g.dtype),
        *Errors(error, g.dtype).arrays,
        unsigned_like(g.dtype),
        block,
        kept,
        kept_tail,
        cols,
    )
    divide_work(top_k_rows, n * rows, cols, *arrays, array(indices), array(values))
    return indices, values
