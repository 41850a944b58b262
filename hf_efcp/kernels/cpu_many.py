"""A step of many small matrices of different shapes on CPUs, by numba: one call for all, where one for each takes too long.

A matrix is handled as by the kernels for n matrices of one shape, as a view of the memory that a table names. A row of the table
is a matrix; its columns are named below: addresses in bytes, and places in rooms in numbers.

numba does not notice when a file changes whose functions are compiled in here: see cpu_tools.py.
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

# Shape; rank, or numbers kept in a row; addresses of the gradient, parameter, error or residual, warm start, both parts of the
# window, and the metric's state; the parameter's number; places in the rooms of numbers, means and indices; length of a block,
# and how many numbers are kept in it and in a shorter last one.
ROWS, COLS, KEPT, GRADIENT, PARAM, ERROR, WARM, FIRST, SECOND, BY_ROW, BY_COL, COUNT, NUMBER = range(13)
IN_ROOM, IN_MEANS, IN_INDICES, BLOCK, IN_BLOCK, IN_TAIL, WIDTH = range(13, 20)
# A NaN, as bf16's bits.
_NAN = np.int16(0x7FC0)


@compiled
def view_at(address, shape, like):
    """The array of this shape at an address, in the dtype of `like`."""
    return numba.carray(pointer(address, like), shape)


@compiled
def one_number(number):
    """An array of one number: what kernels take for n matrices."""
    one = np.empty(1, np.int64)
    one[0] = number
    return one


def store(x, out):
    """out <- x, both of one dimension, rounded to nearest where out is the bits of bf16."""
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
    """e of a matrix, (1, rows, cols); empty where `far`: then what is at its place does not enter a."""
    return view_at(row[ERROR], (0, 0, 0) if far else (1, row[ROWS], row[COLS]), like)


@compiled
def factors_of(row, metric, room):
    """x (1, rows) and y (1, cols) of the metric; empty where there is none."""
    at, rows, cols = row[IN_ROOM], row[ROWS], row[COLS]
    if not metric:
        return room[:0].reshape(0, 0), room[:0].reshape(0, 0)
    return room[at : at + rows].reshape(1, rows), room[at + rows : at + rows + cols].reshape(1, cols)


@compiled
def measure_one(row, like, beta, eps, room, means):
    """Put x, y, the new means over rows and over columns into the rooms; returns the sum of S^2."""
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
    """Let the metric's state contain the gradient."""
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
    """p <- p + weight * S^-1 r for the residual r of a matrix."""
    x, y = factors_of(row, metric, room)
    no_scale = view_at(row[ERROR], (0, 0, 0), like)
    add_kept_rows(0, row[ROWS], error_of(row, False, error_like), no_scale, x, y, one_number(row[PARAM]), weight, row[COLS])


@compiled
def far_squares(lo, hi, table, like, error_like, out):
    """The sum of the squares of each residual."""
    for t in range(lo, hi):
        row = table[t]
        sums = np.empty((1, row[ROWS]))
        square_rows(0, row[ROWS], error_of(row, False, error_like), view_at(row[ERROR], (0, 0, 0), like), row[COLS], like, sums)
        out[t] = sums.sum()
