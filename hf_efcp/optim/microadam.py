"""MicroAdam: AdamW whose moments are recomputed from the last m compressed gradients (arXiv 2405.15593).

    a = e + g,  c = TopK(a),  e <- a - c                        e in 4 bits, c in slot (t - 1) mod m of a ring
    m = sum_i w1_i c_i,  v = sum_i w2_i c_i^2                   over the ring, w_i = (1 - b) b^age(i) / (1 - b^t)
    u = m / (sqrt(v) + eps) + alpha e,  e <- (1 - alpha) e

t counts a tensor's own gradients. The ring has the last min(t, m) of them. Their weights add up to (1 - b^min(t, m)) / (1 - b^t),
which is small for b2. So the update of a coordinate that is always kept grows to 6.5 times Adam's (m = 10). With
`window_bias_correction`, the weights are divided by their own sum.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec
from ..core.compressors import BlockTopK
from ..core.sparse_window import SparseWindow, adam, move
from ..engine.adamw import ADAMW, AdamWOptions
from ..engine.base import EngineOptimizer
from ..engine.options import STATE_DTYPES, SparseOptions, StateOptions
from ..engine.tensorwise import Rule, TensorStack, Tensorwise, U, Unformed
from ..options import fraction, option, positive


@dataclasses.dataclass(frozen=True)
class MicroAdamOptions(SparseOptions, AdamWOptions, StateOptions):
    """Options of MicroAdam."""

    window_size: int = option(10, "number m of gradients in the ring", allowed="an integer >= 1", check=positive)
    window_bias_correction: bool = option(
        False,
        "divide the weights of the ring's gradients by their sum, so that updates have Adam's size; false: divide them by Adam's "
        "bias correction, as the reference does, whose updates grow to 6.5 times Adam's",
    )
    alpha: float = option(
        0.0,
        "part of the error feedback that each update takes out and adds, so that all coordinates move",
        allowed="a number in [0, 1)",
        check=fraction,
    )
    window_dtype: torch.dtype | None = option(
        torch.bfloat16, "dtype of the ring's numbers; none: fp64 for fp64 parameters, else fp32", choices=STATE_DTYPES
    )
    error_format: str = option(
        "minmax4",
        "how the error feedback is stored; minmax4: 4 bits between the least and the largest of each 256 numbers, rounded to "
        "nearest; int8, int4: with a scale for each 256 numbers, rounded stochastically; plain: in error_dtype (the default if "
        "you give error_dtype alone)",
        choices=("minmax4", "plain", "int8", "int4"),
    )


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare the ring: indices and values, (rows, m, k)."""
    return SparseWindow.specs(
        layout, o.window_size, grid_of(layout.cols, o.density, o.block_size), o.window_dtype or layout.dtype
    )


@functools.lru_cache(maxsize=256)
def grid_of(cols: int, density: float, block_size: int) -> BlockTopK:
    """Make the blocks of a row."""
    return BlockTopK(cols, density, block_size)


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> U:
    """Write the ring and the error; give u."""
    grid, count = grid_of(s.layout.cols, o.density, o.block_size), t.view(-1).long()
    c = a.extract(grid, s.turn.step)  # as in the reference, what c loses in bf16 is not fed back: a - c is 0 where c is kept
    for cell, x in zip((s.window_indices, s.window_values), c.parts, strict=True):
        cell.put(x, (count - 1) % o.window_size)
    w1, w2 = (weights(count, o.window_size, beta, o.window_bias_correction) for beta in (o.beta1, o.beta2))

    def rows_of_u(rows: slice) -> Tensor:
        u = adam(s.buffers, w1, w2, o.eps, grid, rows, s.layout.dtype)
        if o.alpha:
            e = s.error.read(rows)
            u.add_(e, alpha=o.alpha)
            s.error.write((1 - o.alpha) * e, rows)
        return u

    def add_to(params: list[Tensor], scale: float, decay: float) -> bool:
        return not o.alpha and move(s.buffers, w1, w2, o.eps, grid, params, scale, decay, s.layout.dtype)

    return Unformed(rows_of_u, add_to)


def weights(t: Tensor, m: int, beta: float, window_bias_correction: bool) -> Tensor:
    """Give the weight (1 - b) b^age / (1 - b^t) of each slot, (n, m) fp64. The correction puts 1 - b^min(t, m) for 1 - b^t.

    Args:
        t: (n,) int64, the number of gradients that each tensor has had; the newest is in slot (t - 1) mod m.
        m: length of the ring. An empty slot holds zeros, so its weight does not matter.
        beta: b.
        window_bias_correction: whether the weights of filled slots add up to 1.
    """
    age = (t[:, None] - 1 - torch.arange(m, device=t.device)) % m
    count = t.clamp_max(m) if window_bias_correction else t
    return (1 - beta) * beta ** age.double() / (1 - beta ** count.double())[:, None]


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count the operations of a step.

    For each number of the matrix: 1 to add e, 2 to decode it, 4 to encode it, 4 for u and 2 for p. For each number in the ring:
    two products, two sums and a square.
    """
    grid = grid_of(cols, o.density, o.block_size)
    return n * rows * (13.0 * cols + 5.0 * o.window_size * grid.per_row)


class MicroAdam(EngineOptimizer):
    """AdamW in 0.9 bytes per parameter: block top-k gradients in a ring, error feedback in 4 bits.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. AdamW trains groups with `compress` false.
        lr: learning rate.
        **options: see the signature. `hf-efcp list --options` has the meaning and range of each.
    """

    options_type = MicroAdamOptions
    method = Tensorwise(Rule(specs, update, lossy=True, operations=operations, vectors=True), ADAMW)
