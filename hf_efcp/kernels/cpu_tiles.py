"""Products with few columns on CPUs, by numba, in tiles of 4 x 4: eight rows are read for sixteen products.

A sum keeps the order of its terms, whatever the tile; `multiply_tile` alone may reorder sums.
"""

from __future__ import annotations

from .cpu_tools import CONTRACTED, REORDERED, compiled

TILE = 4


@compiled(relaxed=CONTRACTED)
def add_tile(out, weights, s, first, a):
    """Compute out[s + i] += the sum over k of weights[s + i, first + k] * a[k], for four i and four k."""
    w, u, v, z = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
    w0, w1, w2, w3 = w[first], w[first + 1], w[first + 2], w[first + 3]
    u0, u1, u2, u3 = u[first], u[first + 1], u[first + 2], u[first + 3]
    v0, v1, v2, v3 = v[first], v[first + 1], v[first + 2], v[first + 3]
    z0, z1, z2, z3 = z[first], z[first + 1], z[first + 2], z[first + 3]
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    o0, o1, o2, o3 = out[s], out[s + 1], out[s + 2], out[s + 3]
    for x in range(a0.size):
        x0, x1, x2, x3 = a0[x], a1[x], a2[x], a3[x]
        o0[x] = (((o0[x] + w0 * x0) + w1 * x1) + w2 * x2) + w3 * x3
        o1[x] = (((o1[x] + u0 * x0) + u1 * x1) + u2 * x2) + u3 * x3
        o2[x] = (((o2[x] + v0 * x0) + v1 * x1) + v2 * x2) + v3 * x3
        o3[x] = (((o3[x] + z0 * x0) + z1 * x1) + z2 * x2) + z3 * x3


@compiled(relaxed=CONTRACTED)
def subtract_tile(a, weights, s, first, q):
    """Compute a[i] -= the sum over k of weights[s + k, first + i] * q[s + k], for four i and four k."""
    w, u, v, z = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
    w0, w1, w2, w3 = w[first], w[first + 1], w[first + 2], w[first + 3]
    u0, u1, u2, u3 = u[first], u[first + 1], u[first + 2], u[first + 3]
    v0, v1, v2, v3 = v[first], v[first + 1], v[first + 2], v[first + 3]
    z0, z1, z2, z3 = z[first], z[first + 1], z[first + 2], z[first + 3]
    q0, q1, q2, q3 = q[s], q[s + 1], q[s + 2], q[s + 3]
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for x in range(a0.size):
        x0, x1, x2, x3 = q0[x], q1[x], q2[x], q3[x]
        a0[x] = (((a0[x] - w0 * x0) - u0 * x1) - v0 * x2) - z0 * x3
        a1[x] = (((a1[x] - w1 * x0) - u1 * x1) - v1 * x2) - z1 * x3
        a2[x] = (((a2[x] - w2 * x0) - u2 * x1) - v2 * x2) - z2 * x3
        a3[x] = (((a3[x] - w3 * x0) - u3 * x1) - v3 * x2) - z3 * x3


@compiled(relaxed=REORDERED)
def multiply_tile(out, a, q, s):
    """Compute out[i, s + k] = <a[i], q[s + k]>, for four i and four k."""
    t00 = t01 = t02 = t03 = t10 = t11 = t12 = t13 = a.dtype.type(0)
    t20 = t21 = t22 = t23 = t30 = t31 = t32 = t33 = a.dtype.type(0)
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    q0, q1, q2, q3 = q[s], q[s + 1], q[s + 2], q[s + 3]
    for x in range(a0.size):
        x0, x1, x2, x3, y0, y1, y2, y3 = a0[x], a1[x], a2[x], a3[x], q0[x], q1[x], q2[x], q3[x]
        t00, t01, t02, t03 = t00 + x0 * y0, t01 + x0 * y1, t02 + x0 * y2, t03 + x0 * y3
        t10, t11, t12, t13 = t10 + x1 * y0, t11 + x1 * y1, t12 + x1 * y2, t13 + x1 * y3
        t20, t21, t22, t23 = t20 + x2 * y0, t21 + x2 * y1, t22 + x2 * y2, t23 + x2 * y3
        t30, t31, t32, t33 = t30 + x3 * y0, t31 + x3 * y1, t32 + x3 * y2, t33 + x3 * y3
    out[0, s], out[0, s + 1], out[0, s + 2], out[0, s + 3] = t00, t01, t02, t03
    out[1, s], out[1, s + 1], out[1, s + 2], out[1, s + 3] = t10, t11, t12, t13
    out[2, s], out[2, s + 1], out[2, s + 2], out[2, s + 3] = t20, t21, t22, t23
    out[3, s], out[3, s + 1], out[3, s + 2], out[3, s + 3] = t30, t31, t32, t33
