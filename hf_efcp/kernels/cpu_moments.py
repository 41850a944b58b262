"""Moments of a sparse window on CPUs, by numba: a row of m / (sqrt(v) + eps) is formed in the cache, and added to p there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Blocks, Matrices, Stored
from .cpu_sparse import ROOM, index_of, places_in_row, tiled, window_arrays, zeros_row
from .cpu_threads import divide_work
from .cpu_tools import CONTRACTED, Addresses, array, compiled, example, matrix_row, narrowed, real, writes


@compiled
def _weigh_moments(one, two, kept, by_one, by_two):
    """Give each number of a row's window the weights of its slot, for m and for v."""
    for j in range(by_one.size):
        by_one[j], by_two[j] = one[j // kept], two[j // kept]


@compiled(relaxed=CONTRACTED)
def _add_moments(index, value, columns, by_one, by_two, first, second, places, dense, squares):
    """Add the row's m to `dense` and its v to `squares`, which are zero; write where to `places`."""
    number = dense.dtype.type
    for j in range(value.size):  # a loop of its own is vectorized
        x = number(real(value[j]))
        first[j], second[j] = by_one[j] * x, by_two[j] * (x * x)
    for j in range(value.size):
        places[j] = columns[j] + index_of(index[j], np.int32(0))
    for j in range(value.size):
        place = np.uint32(places[j])
        dense[place] += first[j]
        squares[place] += second[j]


@compiled(relaxed=CONTRACTED)
def _adam(lo, hi, start, indices, values, one, two, eps, columns, cols, out):
    """Give rows of m / (sqrt(v) + eps), where m is the sum of one_i c_i, and v the sum of two_i c_i^2."""
    rows, length = out.shape[1], indices.shape[2]
    dense, squares = zeros_row(cols, out), zeros_row(cols, out)
    m, v, columns = dense[ROOM : ROOM + cols], squares[ROOM : ROOM + cols], tiled(columns, length)
    first, second = np.empty(length, out.dtype), np.empty(length, out.dtype)
    by_one, by_two, places = np.empty(length, out.dtype), np.empty(length, out.dtype), np.empty(length, np.int32)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if task == lo or row == 0:
            _weigh_moments(one[t], two[t], length // one.shape[1], by_one, by_two)
        index, value, u = indices[t, start + row], values[t, start + row], out[t, row]
        _add_moments(index, value, columns, by_one, by_two, first, second, places, dense, squares)
        for x in range(cols):
            u[x] = m[x] / (np.sqrt(v[x]) + eps)
        for x in range(cols):
            m[x] = 0
            v[x] = 0


@compiled(relaxed=CONTRACTED)
def _move(lo, hi, indices, values, one, two, eps, columns, params, like, rows, cols, scale, decay):
    """Compute p <- decay * p + scale * u for some rows. u is as in `_adam`, which is 0 where the window holds no number."""
    length = indices.shape[2]
    dense, squares, columns = zeros_row(cols, one), zeros_row(cols, one), tiled(columns, length)
    first, second, base = np.empty(length, one.dtype), np.empty(length, one.dtype), np.empty(length, one.dtype)
    by_one, by_two, places = np.empty(length, one.dtype), np.empty(length, one.dtype), np.empty(length, np.int32)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        if task == lo or row == 0:
            _weigh_moments(one[t], two[t], length // one.shape[1], by_one, by_two)
        index, value, p = indices[t, row], values[t, row], matrix_row(params[t], row, cols, like)
        _add_moments(index, value, columns, by_one, by_two, first, second, places, dense, squares)
        for j in range(length):
            place = np.uint32(places[j])
            first[j], second[j] = dense[place], squares[place]
        for j in range(length):
            first[j] = first[j] / (np.sqrt(second[j]) + eps)
        for j in range(length):
            dense[np.uint32(places[j])], squares[np.uint32(places[j])] = 0, 0
        for j in range(length):
            x = np.uint32(places[j] - np.int32(ROOM))
            base[j] = decay * one.dtype.type(real(p[x])) if x < cols else 0  # a damaged checkpoint's index is beside the row
        for j in range(length):  # a loop of its own: the product above is rounded first, as in torch
            base[j] += scale * first[j]
        if decay != 1:
            for x in range(cols):
                p[x] = narrowed(decay * one.dtype.type(real(p[x])), p)
        for j in range(length):  # a place that the window holds twice gets the same number twice
            x = np.uint32(places[j] - np.int32(ROOM))
            if x < cols:
                p[x] = narrowed(base[j], p)


def adam(stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, rows: slice) -> Tensor:
    """Give rows `rows` of m / (sqrt(v) + eps) for a plain window. The weights (n, m) are fp32 or fp64, as is the result."""
    n, all_rows, _, _ = stored[0].shape
    start, stop, _ = rows.indices(all_rows)
    out = torch.empty(n, stop - start, cols, dtype=one.dtype)
    _, indices, values, _ = window_arrays(stored)
    weights = array(one), array(two), array(out).dtype.type(eps)
    columns = places_in_row(cols, blocks)[0]
    divide_work(_adam, n * (stop - start), indices.shape[2] + cols, start, indices, values, *weights, columns, cols, array(out))
    return out


def move(
    stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, params: Matrices, scale: float, decay: float
) -> bool:
    """Compute p <- decay * p + scale * u in place, with `adam`'s u, for n contiguous matrices in the weights' dtype or in bf16.

    Returns:
        Whether it was done.
    """
    if not writes(params, one.dtype):
        return False
    p, (_, indices, values, _) = Addresses(params), window_arrays(stored)
    n, rows, _ = p.shape
    number = example(one.dtype).dtype.type
    weights = array(one), array(two), number(eps)
    where = places_in_row(cols, blocks)[0], p.array, example(p.dtype), rows, cols, number(scale), number(decay)
    divide_work(_move, n * rows, indices.shape[2] + cols, indices, values, *weights, *where)
    return True
