"""Sparse entries of many small matrices: see cpu_many.py."""

from __future__ import annotations

import numpy as np

from .cpu_keep import keep_sparse_rows
from .cpu_many import (
    BLOCK,
    COLS,
    ERROR,
    FIRST,
    GRADIENT,
    IN_BLOCK,
    IN_INDICES,
    IN_ROOM,
    IN_TAIL,
    KEPT,
    NUMBER,
    PARAM,
    ROWS,
    SECOND,
    add_far,
    error_of,
    factors_of,
    measure_one,
    one_number,
    remember_one,
    store,
    view_at,
)
from .cpu_sparse import ROOM, dots_parts, update_rows
from .cpu_tools import compiled, real
from .cpu_top_k import top_k_rows


@compiled
def _kept_places(row):
    """Give `kept_places`, with columns counted in a row that has room around it."""
    block, kept = row[BLOCK], row[IN_BLOCK]
    full = row[COLS] // block
    starts, numbers = np.empty(row[KEPT], np.int32), np.empty(row[KEPT], np.int32)
    for i in range(row[KEPT]):
        numbers[i] = i // kept if i < full * kept else full
        starts[i] = numbers[i] * block + ROOM
    return starts, numbers


@compiled
def _kept(row, indices, values):
    """Give views of the new entry's indices and values in their rooms, (1, rows, k)."""
    at, shape = row[IN_INDICES], (1, row[ROWS], row[KEPT])
    stop = at + row[ROWS] * row[KEPT]
    return indices[at:stop].reshape(shape), values[at:stop].reshape(shape)


@compiled
def stage_sparse(
    lo, hi, table, like, error_like, window_like, unsigned, codes, m, j, metric, far, beta, eps, room, means, squares, dots,
    indices, values,
):  # fmt: skip
    """Make the new entry and measure the metric; write the entry's inner products with the window to `dots` (matrices, m).

    `codes` is an empty uint8 array, since the window has no scales.
    """
    for t in range(lo, hi):
        row = table[t]
        rows, cols, kept = row[ROWS], row[COLS], row[KEPT]
        if metric:
            squares[t] = measure_one(row, like, beta, eps, room, means)
        x, y = factors_of(row, metric, room)
        index, value = _kept(row, indices, values)
        at = row[IN_ROOM] + 2 * rows + cols
        numbers = room[at : at + rows * kept]
        e, no_scale = error_of(row, far, error_like), view_at(row[ERROR], (0, 0, 0), like)
        top_k_rows(
            0, rows, one_number(row[GRADIENT]), x, y, e, no_scale, unsigned, row[BLOCK], row[IN_BLOCK], row[IN_TAIL], cols, index,
            numbers.reshape(1, rows, kept),
        )  # fmt: skip
        store(numbers, value.reshape(rows * kept))
        starts, blocks_of = _kept_places(row)
        first = view_at(row[FIRST], (1, rows, m * kept), index)
        second = view_at(row[SECOND], (1, rows, m * kept), window_like)
        no_scales, sums = codes.reshape(1, 1, m, 0), np.zeros((1, 1, m))
        dots_parts(0, 1, 1, np.int32(0), first, second, no_scales, index, value, starts, blocks_of, cols, sums)
        square = 0.0
        for i in range(rows):
            for s in range(kept):
                number = np.float64(real(value[0, i, s]))
                square += number * number
        for i in range(m):
            dots[t, i] = square if i == j else sums[0, 0, i]


@compiled
def commit_sparse(
    lo, hi, table, like, error_like, window_like, m, j, metric, limit, decay, step, beta, room, means, indices, values
):
    """Compute e <- decay * e + S^-1 g - c; put c into slot j, and g into the metric's state."""
    nothing = np.zeros(1, np.bool_)
    for t in range(lo, hi):
        row = table[t]
        rows, cols, many = row[ROWS], row[COLS], row[KEPT]
        index, value = _kept(row, indices, values)
        x, y = factors_of(row, metric, room)
        starts = _kept_places(row)[0] - np.int32(ROOM)
        e, no_scale = error_of(row, False, error_like), view_at(row[ERROR], (0, 0, 0), like)
        keep_sparse_rows(
            0, rows, e, no_scale, limit, nothing, one_number(row[GRADIENT]), x, y, index, value, starts, cols, decay, step,
            one_number(row[NUMBER]), 0, 0, like,
        )  # fmt: skip
        first, second = view_at(row[FIRST], (rows, m, many), index), view_at(row[SECOND], (rows, m, many), window_like)
        for i in range(rows):
            for s in range(many):
                first[i, j, s], second[i, j, s] = index[0, i, s], value[0, i, s]
        if metric:
            remember_one(row, like, beta, room, means)


@compiled
def apply_sparse(lo, hi, table, like, error_like, window_like, index_like, codes, m, c, decays, weights, metric, far, room):
    """Compute p <- decay * p + diag(x) (G^T c + weight * r) diag(y), for c (matrices, m) in the compute dtype."""
    for t in range(lo, hi):
        row = table[t]
        rows, cols, kept = row[ROWS], row[COLS], row[KEPT]
        starts, blocks_of = _kept_places(row)
        x, y = factors_of(row, metric, room)
        first = view_at(row[FIRST], (1, rows, m * kept), index_like)
        second = view_at(row[SECOND], (1, rows, m * kept), window_like)
        update_rows(
            0, rows, 0, np.int32(0), first, second, codes.reshape(1, 1, m, 0), c[t : t + 1], starts, blocks_of, x, y,
            one_number(row[PARAM]), rows, cols, like.dtype.type(1), decays[t],
        )  # fmt: skip
        if far:
            add_far(row, weights[t : t + 1], metric, room, like, error_like)
