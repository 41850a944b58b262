"""The sparse family on CPUs, by numba: a row's window is one run of memory, which is streamed once, past a row in the cache.

Work is cut by rows of the tensors and given to plain Python threads, as many as torch uses: the compiled functions hold no
lock. numba's own thread pools would abort where two threads step at once (workqueue) or in a process forked after a step
(OpenMP), and choosing one is a global setting. Every row is one thread's, and sums over rows are cut by the shape alone: the
result does not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

# Less than this many entries are not worth a second thread.
_SMALL = 2**14
# Into how many parts the sum over a single tensor's rows is cut.
_PARTS = 16
# Running maxima in `_select`: two vectors of fp32.
_LANES = 32
# int16 indices cannot leave a row with so much room around it, whatever a damaged checkpoint holds.
_ROOM = 2**15
# dtypes that the kernels read and write; bf16, which numpy does not know, as its bits.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _jit(function):
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        return numba.njit(nogil=True)(function)


def _real(x):
    raise NotImplementedError  # compiled code only


@overload(_real)
def _real_compiled(x):
    if isinstance(x, types.Integer):  # the bits of a bf16
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@_jit
def _select(bits, width, lanes, kept, heap, where):
    """Indices of the `kept` largest of bits[:width] into where[:kept].

    The numbers are dealt out to `lanes` lanes. The kept-th largest of the lanes' maxima is passed by `kept` numbers, so that
    only lanes whose maximum reaches it have to be looked at: about `kept` of them.
    """
    if lanes.size < 2 * kept or width < 4 * lanes.size:
        _largest(bits, width, kept, heap, where)
        return
    many = lanes.size
    for lane in range(many):
        lanes[lane] = bits[lane]
    for start in range(many, width - many + 1, many):
        piece = bits[start : start + many]  # a slice starts at 0, which lets the loop be vectorized; so below
        for lane in range(many):
            lanes[lane] = max(lanes[lane], piece[lane])
    for i in range(width - width % many, width):
        lanes[i % many] = max(lanes[i % many], bits[i])
    for i in range(kept):
        heap[i], where[i] = lanes[i], i
    _order(heap, where, kept)
    for lane in range(kept, many):
        if lanes[lane] > heap[0]:
            heap[0], where[0] = lanes[lane], lane
            _sift(heap, where, 0, kept)
    # `where` now names the lanes; no number in another lane is larger than heap[0].
    least, found = heap[0], 0
    for n in range(kept):
        lanes[n] = where[n]
    for n in range(kept):
        for i in range(lanes[n], width, many):
            if bits[i] >= least:
                if found < kept:
                    heap[found], where[found] = bits[i], i
                    found += 1
                    if found == kept:
                        _order(heap, where, kept)
                elif bits[i] > heap[0]:
                    heap[0], where[0] = bits[i], i
                    _sift(heap, where, 0, kept)


@_jit
def _largest(bits, width, kept, heap, where):
    """`_select` by a heap of the largest so far: for short rows, and where much is kept."""
    for i in range(kept):
        heap[i], where[i] = bits[i], i
    _order(heap, where, kept)
    for i in range(kept, width):
        if bits[i] > heap[0]:
            heap[0], where[0] = bits[i], i
            _sift(heap, where, 0, kept)


@_jit
def _order(heap, where, size):
    for start in range(size // 2 - 1, -1, -1):
        _sift(heap, where, start, size)


@_jit
def _sift(heap, where, start, size):
    """Let the entry at `start` sink until no child is smaller."""
    value, index = heap[start], where[start]
    while True:
        child = 2 * start + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[start], where[start] = heap[child], where[child]
        start = child
    heap[start], where[start] = value, index


@_jit
def _top_k(lo, hi, gradient, error, bits, lanes, block, kept, kept_tail, indices, values):
    cols = gradient.shape[1]
    a = np.empty(block, gradient.dtype)
    bits = a.view(bits.dtype)
    top = np.iinfo(bits.dtype).max
    magnitudes, lanes = np.empty(block, bits.dtype), np.empty(lanes, bits.dtype)
    heap, where = np.empty(max(kept, kept_tail), bits.dtype), np.empty(max(kept, kept_tail), np.int64)
    for row in range(lo, hi):
        entry = 0
        for start in range(0, cols, block):
            width = min(block, cols - start)
            size = kept if width == block else kept_tail
            g = gradient[row, start : start + width]
            if error.size == 0:
                for i in range(width):
                    a[i] = g[i]
            else:
                e = error[row, start : start + width]
                for i in range(width):
                    a[i] = g[i] + _real(e[i])
            # Without the sign, the bits of numbers are ordered as their magnitudes are, with NaN above all.
            for i in range(width):
                magnitudes[i] = bits[i] & top
            _select(magnitudes, width, lanes, size, heap, where)
            for i in range(size):
                indices[row, entry], values[row, entry] = where[i], a[where[i]]
                entry += 1


@_jit
def _dots(lo, hi, parts, indices, values, row_indices, row_values, columns, dense, out):
    rows, length = values.shape[1:]
    kept = row_values.shape[2]
    dense = np.zeros(dense.size, dense.dtype)
    columns = _tiled(columns, length)
    products = np.empty(length, np.float64)
    for task in range(lo, hi):
        t, part = task // parts, task % parts
        products[:] = 0
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            new_i, new_v = row_indices[t, row], row_values[t, row]
            empty = True
            for e in range(kept):
                value = _real(new_v[e])
                dense[columns[e] + new_i[e]] = value
                empty = empty and value == 0
            if not empty:
                index, value = indices[t, row], values[t, row]
                for j in range(length):
                    met = dense[np.uint32(columns[j] + np.int32(index[j]))]
                    products[j] += np.float64(met) * np.float64(_real(value[j]))
            for e in range(kept):
                dense[columns[e] + new_i[e]] = 0
        for j in range(length):
            out[t, part, j // kept] += products[j]


@_jit
def _combine(lo, hi, first, indices, values, c, columns, dense, out):
    rows, cols = out.shape[1:]
    length = values.shape[2]
    kept = length // c.shape[1]
    dense = np.zeros(dense.size, dense.dtype)
    columns = _tiled(columns, length)
    weights = np.empty(length, c.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if task == lo or row == 0:
            for j in range(length):
                weights[j] = c[t, j // kept]
        index, value = indices[t, first + row], values[t, first + row]
        for j in range(length):
            dense[np.uint32(columns[j] + np.int32(index[j]))] += weights[j] * _real(value[j])
        to, u = out[t, row], dense[_ROOM : _ROOM + cols]
        for col in range(cols):
            to[col] = u[col]
        for col in range(cols):
            u[col] = 0


@_jit
def _tiled(columns, length):
    tiled = np.empty(length, np.int32)
    for j in range(length):
        tiled[j] = columns[j % columns.size]
    return tiled


def top_k(gradient: Tensor, error: Tensor | None, blocks: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of every block of a = e + g; a is not formed.

    Args:
        gradient: g, (n, rows, cols) fp32 or fp64.
        error: e, the same shape, fp32, fp64 or bf16; or None.
        blocks: length of a block, how many numbers are kept in each, and how many in a shorter last one.

    Returns:
        (n, rows, k) int16 indices in the block, and values in g's dtype.
    """
    n, rows, cols = gradient.shape
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    shape = (n * rows, full * kept + (kept_tail if tail else 0))
    indices, values = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=gradient.dtype)
    bits = np.empty(0, np.int32 if gradient.itemsize == 4 else np.int64)
    error = gradient.new_empty(0, cols) if error is None else error.reshape(n * rows, cols)
    g, e = _array(gradient.reshape(n * rows, cols)), _array(error)
    _share(_top_k, n * rows, cols, g, e, bits, _LANES, block, kept, kept_tail, _array(indices), _array(values))
    return indices.view(n, rows, -1), values.view(n, rows, -1)


def dots(indices: Tensor, values: Tensor, row: tuple[Tensor, Tensor], cols: int, blocks: tuple[int, int, int]) -> Tensor:
    """(n, m) fp64: inner products of `row`, indices and values (n, rows, k), with the window (n, rows, m, k).

    A row of which nothing was kept is not looked up.
    """
    n, rows, m, k = values.shape
    parts = -(-_PARTS // n)
    out = torch.zeros(n, parts, m, dtype=torch.float64)
    window, new = [_array(x.flatten(2)) for x in (indices, values)], [_array(x) for x in row]
    columns, dense = _columns(cols, blocks), _dense(cols, torch.float64)
    _share(_dots, n * parts, rows * m * k // parts, parts, *window, *new, columns, dense, _array(out))
    return out.sum(1)


def combine(indices: Tensor, values: Tensor, c: Tensor, cols: int, blocks: tuple[int, int, int], rows: slice) -> Tensor:
    """Rows `rows` of G^T c, (n, rows, cols) in c's dtype, fp32 or fp64; c is (n, m)."""
    n, _, m, k = values.shape
    out = torch.empty(n, rows.stop - rows.start, cols, dtype=c.dtype)
    window = [_array(x.flatten(2)) for x in (indices, values)]
    columns, dense = _columns(cols, blocks), _dense(cols, c.dtype)
    _share(_combine, n * out.shape[1], m * k, rows.start, *window, _array(c), columns, dense, _array(out))
    return out


def _array(x: Tensor) -> np.ndarray:
    x = x.contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _columns(cols: int, blocks: tuple[int, int, int]) -> np.ndarray:
    """Where the block of each entry of a row starts in the row with room around it."""
    block, kept, kept_tail = blocks
    full = np.repeat(np.arange(cols // block, dtype=np.int32), kept)
    return (np.append(full, np.full(kept_tail, cols // block, np.int32)) * np.int32(block)) + np.int32(_ROOM)


def _dense(cols: int, dtype: torch.dtype) -> np.ndarray:
    """Stands for a row with room around it: every thread makes its own."""
    return torch.empty(cols + 2 * _ROOM, dtype=dtype).numpy()


def _share(function, total: int, work: int, *args) -> None:
    """function(lo, hi, *args) over range(total), each item of `work` entries, by as many threads as torch uses."""
    threads = min(torch.get_num_threads(), total, 1 + total * work // _SMALL)
    bounds = [total * i // max(1, threads) for i in range(threads + 1)]
    first, *rest = itertools.pairwise(bounds) if threads else [(0, 0)]
    others = [_pool(os.getpid()).submit(function, lo, hi, *args) for lo, hi in rest]
    try:
        function(*first, *args)
    finally:
        for other in others:
            other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork. A thread is started when none is idle."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hf_efcp")
