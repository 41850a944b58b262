"""Block top-k and the new error on CPUs, by numba: a row of a = e + g is formed once, for c and for e <- a - c."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import Blocks, Entry, Error, Matrices, Rounding
from .cpu_keep import column_keys, row_key, scales_of, write
from .cpu_threads import divide_work
from .cpu_tools import REORDERED, Addresses, Errors, add_error, array, compiled, matrix_row, reads
from .cpu_top_k import select, unsigned_like


@compiled(relaxed=REORDERED)
def extract_rows(
    lo,
    hi,
    error,
    scale,
    limit,
    absent,
    gradients,
    unsigned,
    block,
    kept,
    kept_tail,
    cols,
    step,
    salts,
    row_0,
    col_0,
    indices,
    values,
):
    """Write indices and values of the largest numbers in the blocks of some rows of a = e + g; then e <- a without them."""
    rows = values.shape[1]
    a, magnitudes, lanes = np.empty(cols, values.dtype), np.empty(block, unsigned.dtype), np.empty(block, unsigned.dtype)
    words, where, bits = np.empty(-(-block // 8), np.int64), np.empty(block, np.int32), a.view(unsigned.dtype)
    single, keys, key = np.empty(cols, np.float32), np.empty(cols, np.int32), np.int64(0)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if absent[t]:
            continue
        if task == lo or row == 0:
            key = column_keys(step, salts[t], col_0, keys)
        add_error(a, matrix_row(gradients[t], row, cols, values), error, scale, t, row, 0)
        index, value, place = indices[t, row], values[t, row], 0
        for start in range(0, cols, block):
            width = min(block, cols - start)
            size = kept if width == block else kept_tail
            select(bits[start : start + width], size, magnitudes, lanes, words, where)
            for i in range(size):
                largest = a[start + where[i]]
                index[place], value[place] = where[i], largest
                a[start + where[i]] -= largest
                place += 1
        write(error[t, row], scales_of(scale, t, row, a), a, row_key(key, row_0 + row), keys, single, limit)


def extract(error: Error, gradients: Matrices, blocks: Blocks, rounding: Rounding, absent: Sequence[int]) -> Entry | None:
    """Give the numbers of largest magnitude in every block of a = e + g; e <- a without them, in place.

    Args:
        error: e, as `Errors` takes it.
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        blocks: as `cpu_top_k.top_k` takes them.
        rounding: as `cpu_keep.keep` takes it.
        absent: tensors whose error stays as it is; their values are 0.

    Returns:
        Indices in the block, int16 (n, rows, k), and values in g's dtype. None: no kernel can do it, and nothing has changed.
    """
    if error is None or not reads(error):
        return None
    g, stored, (step, salts, origin) = Addresses(gradients), Errors(error, gradients[0].dtype), rounding
    n, rows, cols = g.shape
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    shape = (n, rows, full * kept + (kept_tail if tail else 0))
    indices, values = torch.zeros(shape, dtype=torch.int16), torch.zeros(shape, dtype=g.dtype)
    absent_flags = np.zeros(n, bool)
    absent_flags[list(absent)] = True
    where = *stored.arrays, stored.limit, absent_flags, g.array, unsigned_like(g.dtype), block, kept, kept_tail, cols
    divide_work(extract_rows, n * rows, cols, *where, int(step), array(salts), *origin, array(indices), array(values))
    return indices, values
