"""Low-rank entries of many small matrices: see cpu_many.py. Householder reflections in fp64 make the bases."""

from __future__ import annotations

import numpy as np

from .cpu_keep import keep_low_rank_rows
from .cpu_low_rank import products
from .cpu_many import (
    COLS,
    ERROR,
    FIRST,
    GRADIENT,
    IN_ROOM,
    KEPT,
    NUMBER,
    PARAM,
    ROWS,
    SECOND,
    WARM,
    add_far,
    error_of,
    factors_of,
    measure_one,
    one_number,
    remember_one,
    store,
    view_at,
)
from .cpu_tools import CONTRACTED, REORDERED, compiled, read_row, real


@compiled
def _start(row, like, least):
    """Give Q^T (r, cols), where Q's columns have length 1; and whether a column is dead: at most `least` times the longest."""
    cols, rank = row[COLS], row[KEPT]
    warm, q, norms = view_at(row[WARM], (cols, rank), like), np.empty((rank, cols), like.dtype), np.zeros(rank)
    for k in range(cols):
        for s in range(rank):
            norms[s] += np.float64(warm[k, s]) * np.float64(warm[k, s])
    longest = np.sqrt(norms.max())
    for s in range(rank):
        norm = np.sqrt(norms[s])
        if not norm > least * longest:
            return q, True
        for k in range(cols):
            q[s, k] = np.float64(warm[k, s]) / norm
    return q, False


@compiled
def _orthonormal(a):
    """Replace the rows of a, (r, length) fp64, by an orthonormal basis in their order, by Householder reflections."""
    rank, length = a.shape
    v, q = a.copy(), np.zeros((rank, length))
    for s in range(rank):
        norm = 0.0
        for k in range(s, length):
            norm += v[s, k] * v[s, k]
        head = v[s, s] + np.copysign(np.sqrt(norm), v[s, s])
        square = norm - v[s, s] * v[s, s] + head * head
        v[s, s] = head
        for t in range(s + 1, rank):
            _reflect(v[s], square, s, v[t])
        v[s, :s] = 0
        q[s, s] = 1
        for t in range(s, -1, -1):
            size = 0.0
            for k in range(t, length):
                size += v[t, k] * v[t, k]
            _reflect(v[t], size, t, q[s])
    for s in range(rank):  # numba compiles the assignment of a slice for seconds, which is mostly the text of its error
        for k in range(length):
            a[s, k] = q[s, k]


@compiled
def _reflect(v, square, start, x):
    """Compute x <- x - 2 v <v, x> / |v|^2 from `start` on; x stays as it is where |v|^2, which is `square`, is 0."""
    dot = 0.0
    for k in range(start, x.size):
        dot += v[k] * x[k]
    if square != 0:
        dot = 2 * dot / square
        for k in range(start, x.size):
            x[k] -= dot * v[k]


@compiled
def _entry(row, room):
    """Give views of the new entry in the room: P^T (r, rows) and Q^T (r, cols) as stored, and Q^T (r, cols) before rounding."""
    rows, cols, rank = row[ROWS], row[COLS], row[KEPT]
    at = row[IN_ROOM] + 2 * rows + cols
    p = room[at : at + rank * rows].reshape(rank, rows)
    at += rank * rows
    q = room[at : at + rank * cols].reshape(rank, cols)
    at += rank * cols
    return p, q, room[at : at + rank * cols].reshape(rank, cols)


@compiled
def _as_stored(x, like):
    """Round x, of one dimension, to the numbers that the dtype of `like` can hold."""
    stored = np.empty(x.size, like.dtype)
    store(x, stored)
    for i in range(x.size):
        x[i] = real(stored[i])


@compiled
def are_dead(lo, hi, table, like, least, dead):
    """Write to `dead` whether a matrix's warm start has columns that must be drawn anew."""
    for t in range(lo, hi):
        dead[t] = _start(table[t], like, least)[1]


@compiled(relaxed=REORDERED)
def stage_low_rank(lo, hi, table, like, error_like, window_like, m, j, metric, far, beta, eps, least, room, means, squares, dots):
    """Make the new entry and measure the metric; write the entry's inner products with the window to `dots` (matrices, m)."""
    for t in range(lo, hi):
        row = table[t]
        rows, cols, rank = row[ROWS], row[COLS], row[KEPT]
        if metric:
            squares[t] = measure_one(row, like, beta, eps, room, means)
        x, y = factors_of(row, metric, room)
        g, e = view_at(row[GRADIENT], (rows, cols), like), error_of(row, far, error_like)
        no_scale = view_at(row[ERROR], (0, 0, 0), like)
        a, more = np.empty((rows, cols), like.dtype), np.empty(cols, like.dtype)
        start, _ = _start(row, like, least)
        product = np.zeros((rows, rank), like.dtype)
        for i in range(rows):
            read_row(a[i], more, g[i], x, y, e, no_scale, 0, i, 0)
            products(a[i], start, 0, product[i])
        basis = np.empty((rank, rows))
        for i in range(rows):
            for s in range(rank):
                basis[s, i] = product[i, s]
        _orthonormal(basis)
        p, q, whole = _entry(row, room)
        for s in range(rank):
            for i in range(rows):
                p[s, i] = basis[s, i]
            for k in range(cols):
                whole[s, k] = 0
            for i in range(rows):
                weight = p[s, i]
                for k in range(cols):
                    whole[s, k] += weight * a[i, k]
            for k in range(cols):
                q[s, k] = whole[s, k]
            _as_stored(p[s], window_like)
            _as_stored(q[s], window_like)
        _factor_dots(row, p, q, window_like, m, j, dots[t])


@compiled(relaxed=REORDERED)
def _factor_dots(row, p, q, like, m, j, dots):
    rank = row[KEPT]
    first, second = view_at(row[FIRST], (m, rank, row[ROWS]), like), view_at(row[SECOND], (m, rank, row[COLS]), like)
    left, right, p_64, q_64 = np.empty(rank), np.empty(rank), p.astype(np.float64), q.astype(np.float64)
    for i in range(m):
        total = 0.0
        for s in range(rank):
            left[:], right[:] = 0, 0
            if i == j:
                products(p[s], p_64, 0, left)
                products(q[s], q_64, 0, right)
            else:
                products(first[i, s], p_64, 0, left)
                products(second[i, s], q_64, 0, right)
            for u in range(rank):
                total += left[u] * right[u]
        dots[i] = total


@compiled
def commit_low_rank(lo, hi, table, like, error_like, window_like, m, j, metric, limit, decay, step, beta, room, means):
    """Compute e <- decay * e + S^-1 g - c; put c into slot j, this step's Q into the warm start, g into the metric's state."""
    nothing = np.zeros(1, np.bool_)
    for t in range(lo, hi):
        row = table[t]
        rows, cols, rank = row[ROWS], row[COLS], row[KEPT]
        p, q, whole = _entry(row, room)
        x, y = factors_of(row, metric, room)
        one, two = p.reshape(1, rank, rows), q.reshape(1, rank, cols)
        e, no_scale = error_of(row, False, error_like), view_at(row[ERROR], (0, 0, 0), like)
        keep_low_rank_rows(
            0, rows, e, no_scale, limit, nothing, one_number(row[GRADIENT]), x, y, one, two, cols, decay, step,
            one_number(row[NUMBER]), 0, 0, like,
        )  # fmt: skip
        first, second = view_at(row[FIRST], (m, rank, rows), window_like), view_at(row[SECOND], (m, rank, cols), window_like)
        warm, alive = view_at(row[WARM], (cols, rank), like), False
        for s in range(rank):
            store(p[s], first[j, s])
            store(q[s], second[j, s])
            for k in range(cols):
                alive = alive or whole[s, k] != 0
        if alive:
            for k in range(cols):
                for s in range(rank):
                    warm[k, s] = whole[s, k]
        if metric:
            remember_one(row, like, beta, room, means)


@compiled(relaxed=CONTRACTED)
def apply_low_rank(lo, hi, table, like, error_like, window_like, m, c, decays, weights, metric, far, room):
    """Compute p <- decay * p + diag(x) (sum of c_i P_i^T Q_i + weight * r) diag(y), for c (matrices, m) in the compute dtype."""
    for t in range(lo, hi):
        row = table[t]
        rows, cols, rank = row[ROWS], row[COLS], row[KEPT]
        first, second = view_at(row[FIRST], (m * rank, rows), window_like), view_at(row[SECOND], (m * rank, cols), window_like)
        q, u, param = np.empty((m * rank, cols), like.dtype), np.empty(cols, like.dtype), view_at(row[PARAM], (rows, cols), like)
        for s in range(m * rank):
            weight = c[t, s // rank]
            for k in range(cols):
                q[s, k] = weight * real(second[s, k])
        x, y = factors_of(row, metric, room)
        for i in range(rows):
            u[:] = 0
            for s in range(m * rank):
                weight, numbers = like.dtype.type(real(first[s, i])), q[s]
                for k in range(cols):
                    u[k] += weight * numbers[k]
            decay, to = decays[t], param[i]
            if metric:
                for k in range(cols):
                    to[k] = decay * to[k] + (x[0, i] * u[k]) * y[0, k]
            else:
                for k in range(cols):
                    to[k] = decay * to[k] + u[k]
        if far:
            add_far(row, weights[t : t + 1], metric, room, like, error_like)
