"""AdamW on CPUs, by numba: gradient, moments and parameter are read once; moments and parameter are written once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from . import Matrices
from .cpu_threads import divide_work
from .cpu_tools import CONTRACTED, Addresses, array, compiled, example, matrix_row, narrowed, real, writes


@compiled(relaxed=CONTRACTED)
def _rows(lo, hi, gradients, m, v, params, like, one, two, beta1, beta2, eps, scale, decay):
    """Take AdamW's step for some rows, bit for bit as torch does: each operation has its own loop, so no two are contracted."""
    rows, cols = m.shape[1:]
    number = m.dtype.type
    by1, by2, half = number(1.0 - beta1), number(1.0 - beta2), number(0.5)
    rest1, keep2 = number(1.0 - (1.0 - beta1)), number(beta2)
    u, base = np.empty(cols, m.dtype), np.empty(cols, m.dtype)
    for task in range(lo, hi):
        t, row = task // rows, task % rows
        g, p, m_row, v_row = matrix_row(gradients[t], row, cols, m), matrix_row(params[t], row, cols, like), m[t, row], v[t, row]
        if by1 < half:
            for x in range(cols):
                m_row[x] += by1 * (g[x] - m_row[x])
        else:
            for x in range(cols):
                m_row[x] = g[x] - rest1 * (g[x] - m_row[x])
        for x in range(cols):
            base[x] = keep2 * v_row[x]
        for x in range(cols):
            v_row[x] = base[x] + (by2 * g[x]) * g[x]
        for x in range(cols):
            u[x] = (m_row[x] / one[t]) / (np.sqrt(v_row[x] / two[t]) + eps)
        for x in range(cols):
            base[x] = decay * number(real(p[x]))
        for x in range(cols):
            p[x] = narrowed(base[x] + scale * u[x], p)


def adamw(
    gradients: Matrices,
    moments: tuple[Tensor, Tensor],
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
    params: Matrices,
    scale: float,
    decay: float,
) -> bool:
    """See `hf_efcp.kernels.adamw`. Parameters must be contiguous, in fp32, fp64 or bf16; bf16 is rounded to nearest."""
    if not writes(params, gradients[0].dtype):
        return False
    g, p, (m, v) = Addresses(gradients), Addresses(params), moments
    n, rows, cols = g.shape
    number = array(m[:0]).dtype.type
    corrections = [array((1 - beta ** t.double()).to(m.dtype)) for beta in betas]
    numbers = *betas, number(eps), number(scale), number(decay)
    divide_work(_rows, n * rows, cols, g.array, array(m), array(v), p.array, example(p.dtype), *corrections, *numbers)
    return True
