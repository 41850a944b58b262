"""A step of many small matrices of different shapes on CPUs, by numba. One call handles all: a call for each would take too long.

A table has a row for each matrix. The names of its columns are below. An address is in bytes; a place in a room counts numbers. A
matrix is a view of the memory at its address, and the kernels for n matrices of one shape handle it with n = 1.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from .constants import BF16_SHIFT, HALF_BF16
from .cpu_keep import add_kept_rows, square_rows
from .cpu_metric import measure_columns, measure_parts
from .cpu_tools import compiled, pointer

# The columns of the table: the shape; the rank, or the numbers kept in a row; addresses of the gradient, the parameter, the error
# or residual, the warm start, both parts of the window, and the metric's state; the parameter's number; places in the rooms of
# numbers, means and indices; the length of a block, and how many numbers are kept in it and in a shorter last block.
ROWS, COLS, KEPT, GRADIENT, PARAM, ERROR, WARM, FIRST, SECOND, BY_ROW, BY_COL, COUNT, NUMBER = range(13)
IN_ROOM, IN_MEANS, IN_INDICES, BLOCK, IN_BLOCK, IN_TAIL, WIDTH = range(13, 20)
# The bits of a NaN in bf16.
_NAN = np.int16(0x7FC0)


@compiled
def view_at(address, shape, like):
    """Give the array of this shape at an address, in the dtype of `like`."""
    return numba.carray(pointer(address, like), shape)


@compiled
def one_number(number):
    """Give an array of one number, for kernels that take an array of n numbers for n matrices."""
    one = np.empty(1, np.int64)
    one[0] = number
    return one


def store(x, out):
    """Compute out <- x, both of one dimension. Where out is bf16's bits, x is rounded to nearest."""
    raise NotImplementedError  # compiled code only


@overload(store)
def _store_compiled(x, out):
    return _store_bf16 if isinstance(out.dtype, types.Integer) else _store_plain


def _store_plain(x, out):
    for i in range(x.size):
        out[i] = x[i]


def _store_bf16(x, out):
    single = np.empty(x.size, np.float32)
    bits = single.view(np.int32)
    for i in range(x.size):
        single[i] = x[i]
    for i in range(x.size):
        half = np.int32(HALF_BF16) + ((bits[i] >> np.int32(BF16_SHIFT)) & np.int32(1))
        out[i] = np.int16((bits[i] + half) >> np.int32(BF16_SHIFT)) if single[i] == single[i] else _NAN


@compiled
def error_of(row, far, like):
    """Give e of a matrix, (1, rows, cols). Empty where `far`: a residual is stored at the address then, and does not enter a."""
    return view_at(row[ERROR], (0, 0, 0) if far else (1, row[ROWS], row[COLS]), like)


@compiled
def factors_of(row, metric, room):
    """Give x (1, rows) and y (1, cols) of the metric; both empty without a metric."""
    at, rows, cols = row[IN_ROOM], row[ROWS], row[COLS]
    if not metric:
        return room[:0].reshape(0, 0), room[:0].reshape(0, 0)
    return room[at : at + rows].reshape(1, rows), room[at + rows : at + rows + cols].reshape(1, cols)


@compiled
def measure_one(row, like, beta, eps, room, means):
    """Write x, y and the new means over rows and over columns into the rooms; return the sum of S^2."""
    at, rows, cols = row[IN_ROOM], row[ROWS], row[COLS]
    x, y = factors_of(row, True, room)
    new = room[at + rows + cols : at + 2 * rows + cols].reshape(1, rows)
    numbers, roots, sums = np.empty((1, 3)), np.empty((1, 1)), np.zeros((1, 1, cols))
    measure_columns(view_at(row[BY_COL], (1, cols), like), view_at(row[COUNT], (1,), row), beta, eps, y, numbers)
    old = view_at(row[BY_ROW], (1, rows), like)
    measure_parts(0, 1, 1, one_number(row[GRADIENT]), old, beta, numbers, new, x, roots, sums)
    for k in range(cols):
        means[row[IN_MEANS] + k] = sums[0, 0, k] / rows
    return roots[0, 0] * numbers[0, 2]


@compiled
def remember_one(row, like, beta, room, means):
    """Put the gradient into the metric's state."""
    at, rows, cols = row[IN_ROOM], row[ROWS], row[COLS]
    by_row, by_col, total = view_at(row[BY_ROW], (rows,), like), view_at(row[BY_COL], (cols,), like), 0.0
    for i in range(rows):
        by_row[i] = room[at + rows + cols + i]
    top = np.float64(np.finfo(by_col.dtype).max)
    for k in range(cols):
        mean, old = means[row[IN_MEANS] + k], np.float64(by_col[k])
        total += mean
        by_col[k] = min(old + (1 - beta) * (mean - old), top)
    count = view_at(row[COUNT], (1,), row)
    count[0] += count[0] > 0 or total > 0


@compiled
def add_far(row, weight, metric, room, like, error_like):
    """Compute p <- p + weight * S^-1 r, where r is the matrix's residual."""
    x, y = factors_of(row, metric, room)
    no_scale = view_at(row[ERROR], (0, 0, 0), like)
    add_kept_rows(0, row[ROWS], error_of(row, False, error_like), no_scale, x, y, one_number(row[PARAM]), weight, row[COLS])


@compiled
def far_squares(lo, hi, table, like, error_like, out):
    """Write the sum of the squares of each residual to `out`."""
    for t in range(lo, hi):
        row = table[t]
        sums = np.empty((1, row[ROWS]))
        square_rows(0, row[ROWS], error_of(row, False, error_like), view_at(row[ERROR], (0, 0, 0), like), row[COLS], like, sums)
        out[t] = sums.sum()
