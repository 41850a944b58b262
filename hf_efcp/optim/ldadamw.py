"""LDAdamW: AdamW in a subspace of rank r that drifts from step to step, with error feedback (arXiv 2410.16103).

a = e + g. A (short x long) is a or a^T. P (short x r) has orthonormal columns. P0, m0, v0 are those of the step before. `turned`
changes the basis of v0.

    b = rho P0 m0 / (1 - b1^(t-1)) + (1 - rho) A,   P = orth(b b^T P0);  the first P: A's r leading left singular vectors
    h = P^T A,   T = P^T P0,   k = b1 / (1 - b1)
    E <- A - P h + k (P0 m0 - P T m0)
    m = b1 T m0 + (1 - b1) h,   v = b2 turned(v0) + (1 - b2) h^2
    u = P (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Other tensors (vectors, embeddings, the head) are trained by AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated, LowRankEntry
from ..core.cells import Layout, Spec
from ..core.linalg import as_it_is, completed, inner, lengths, reciprocal, without_noise
from ..core.random import counted_noise
from ..core.values import POSITIVE
from ..engine.adamw import ADAMW, AdamWOptions, adam
from ..engine.base import EngineOptimizer
from ..engine.options import StateOptions, SubspaceOptions
from ..engine.tensorwise import Rule, TensorStack, Tensorwise, U
from ..options import fraction, option, positive

# A singular value below this fraction of the first is nothing but rounding errors.
_NO_VALUE = 1e-6


@dataclasses.dataclass(frozen=True)
class LDAdamWOptions(SubspaceOptions, AdamWOptions, StateOptions):
    """Options of LDAdamW."""

    beta1: float = option(0.908, "decay of the mean gradient", allowed="a number in [0, 1)", check=fraction)
    beta2: float = option(0.99, "decay of the mean squared gradient", allowed="a number in [0, 1)", check=fraction)
    rank: int = option(16, "rank r of the subspace, clamped to min(rows, cols)", allowed="an integer >= 1", check=positive)
    rho: float = option(
        0.908,
        "share of the momentum, against the gradient, in the matrix whose subspace is followed",
        allowed="a number in [0, 1]",
        check=lambda x: 0 <= x <= 1,
    )
    proj_type: str = option(
        "std",
        "side that is projected; std: the shorter one (the rows of a square matrix); reverse_std: the other one; left: the rows; "
        "right: the columns",
        choices=("std", "reverse_std", "left", "right"),
    )
    proj_method: str = option(
        "power_iteration",
        "how the subspace follows, after the first step; power_iteration: by two products; svd: by singular vectors at each step",
        choices=("power_iteration", "svd"),
    )
    error_feedback: bool = option(
        True, "add to the next gradient what the subspace leaves out of this one and of the momentum; false: it is lost"
    )


# preset="measured": AdamW's learning rates work with these values.
MEASURED: Mapping[str, Any] = MappingProxyType({"error_dtype": torch.bfloat16, "adjust_lr_fn": "match_rms_adamw"})


class Side:
    """The side of the matrices that is projected. For the left side A = a, else A = a^T.

    Args:
        layout: of the matrices.
        o: options.
        total: sums over the processes that share the rows, see `Stack`.

    Attributes:
        left: whether it is the left side.
        rank: r.
        sum_short: sums a tensor over the processes in place, if each holds some of A's rows.
        sum_long: sums a tensor over the processes in place, if each holds some of A's columns.
        reduce: sum_short; None where this process holds all of A's rows.
    """

    def __init__(self, layout: Layout, o: Any, total: Callable[[Tensor], Tensor] | None = None):
        wide = layout.rows <= layout.cols
        self.left = {"std": wide, "reverse_std": not wide, "left": True, "right": False}[o.proj_type]
        self.short, self.long = (layout.rows, layout.cols) if self.left else (layout.cols, layout.rows)
        self.rank = min(o.rank, self.short, self.long)
        self.reduce = total if self.left else None
        self.sum_short = self.reduce or as_it_is
        self.sum_long = as_it_is if self.left or total is None else total

    def times(self, a: Accumulated, y: Tensor) -> Tensor:
        """Give A y, (n, short, r)."""
        return a.times(y) if self.left else a.transposed_times(y)

    def transposed_times(self, a: Accumulated, p: Tensor) -> Tensor:
        """Give A^T p, (n, long, r)."""
        return a.transposed_times(p) if self.left else a.times(p)

    def entry(self, p: Tensor, h: Tensor) -> LowRankEntry:
        """Make a's entry from P (n, short, r) and H (n, r, long): P H or (P H)^T."""
        return LowRankEntry.of(p, h.mT, wide=True) if self.left else LowRankEntry.of(h.mT, p, wide=True)


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare P (short x r) and both moments (r x long)."""
    side = Side(layout, o)
    moment, follows = (side.rank, side.long), None if side.left else 1
    return (
        Spec("projector", (side.short, side.rank), layout.dtype, rows=0 if side.left else None),
        Spec("exp_avg", moment, layout.dtype, rows=follows),
        Spec("exp_avg_sq", moment, layout.dtype, rows=follows, values=POSITIVE),
    )


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> U:
    """Give u as factors, by the equations at the top of the file."""
    side, k = Side(s.layout, o, a.total), o.beta1 / (1 - o.beta1)
    p0, m0, v0 = s.projector.read(), s.exp_avg.read(), s.exp_avg_sq.read()
    c1, c2 = (_correction(beta, t) for beta in (o.beta1, o.beta2))
    p = next_projector(s, a, t, side, p0, m0 / c1, o)
    h = without_noise(side.transposed_times(a, p).mT, 2, side.sum_long)
    turn = side.sum_short(p.mT @ p0)
    m1 = turn @ m0
    a.keep(side.entry(torch.cat([p, p0], 2), torch.cat([h + k * m1, -k * m0], 1)))  # e <- a - P h + k (P0 m0 - P m1)
    v1 = turned(v0, m0, m1, turn, c1, c2)
    m = o.beta1 * m1 + (1 - o.beta1) * h
    v = o.beta2 * v1 + (1 - o.beta2) * h.square()
    s.projector.write(p)
    s.exp_avg.write(m)
    s.exp_avg_sq.write(v)
    size = (side.short / side.rank) ** 0.5 if o.adjust_lr_fn == "match_rms_adamw" else 1.0
    return side.entry(p, size * adam(m, v, t, o)).dense


def turned(v0: Tensor, m0: Tensor, m1: Tensor, turn: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Give v0 (n, r, long) in another basis, for T = `turn` and m1 = T m0: the turned variance plus m1^2, both without bias."""
    return c2 * (turn.square() @ (v0 / c2 - (m0 / c1).square()) + (m1 / c1).square()).abs()


def next_projector(s: TensorStack, a: Accumulated, t: Tensor, side: Side, p0: Tensor, mean: Tensor, o: Any) -> Tensor:
    """Give P, (n, short, r). `mean` is m0 without its bias."""
    new, n = s.newcomers(t), len(p0)
    if o.proj_method == "svd":
        z, decomposed = torch.zeros_like(p0), list(range(n))
    else:
        # y = b^T P0,  z = b y,  as P0^T P0 = 1. The columns' sizes do not matter, but would leave fp32's range.
        y = o.rho * mean.mT + (1 - o.rho) * side.transposed_times(a, p0)
        y = y * reciprocal(lengths(y, 1, side.sum_long)).to(y.dtype)
        z, decomposed = o.rho * p0 @ side.sum_long(mean @ y) + (1 - o.rho) * side.times(a, y), new
    if decomposed:
        matrices = a.rows()
        for i in decomposed:
            b = matrices[i]
            if i not in new:
                b = (1 - o.rho) * b + o.rho * side.entry(p0[i : i + 1], mean[i : i + 1]).dense()[0]
            z[i] = leading(s, side, b)
    start = s.turn.origin[0] if side.left else 0

    def noise() -> Tensor:
        return counted_noise(s.turn.step, s.ids, side.rank, side.short).mT[:, start : start + z.shape[1]]

    return completed(z, noise, side.reduce)


def leading(s: TensorStack, side: Side, b: Tensor) -> Tensor:
    """Give the r leading singular vectors of b (rows, cols) on the projected side, (short, r), in any scale.

    If b has fewer, the rest is 0. They are eigenvectors of b b^T or b^T b, whichever is smaller, in fp64. Where rows are divided
    among processes, b b^T needs all of b on each process.
    """
    rows, cols, total = s.layout.rows, s.layout.cols, s.total or as_it_is
    start = s.turn.origin[0]
    mine = slice(start, start + len(b))
    if cols <= rows:
        gram = total(inner(b.mT[None], b.mT[None])[0])
    else:
        whole = b
        if len(b) < rows:
            whole = b.new_zeros(rows, cols)
            whole[mine] = b
            total(whole)
        gram = inner(whole[None], whole[None])[0]
    values, vectors = torch.linalg.eigh(gram)
    v = torch.where(values > _NO_VALUE**2 * values[-1], vectors, 0.0)[:, -side.rank :].flip(1).to(b.dtype)
    if cols <= rows:
        return b @ v if side.left else v
    return v[mine] if side.left else total(b.mT @ v[mine])


def _correction(beta: float, t: Tensor) -> Tensor:
    """Give 1 - beta^(t-1), (n, 1, 1); 1 at t = 1, where the numbers that it divides are 0."""
    c = 1 - beta ** (t.double() - 1)
    return torch.where(t > 1, c, 1.0).to(t.dtype)


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count products of length rows cols r: with a (three; one with svd), two for e of rank 2r, and P times the quotient."""
    products = (3 if o.proj_method == "power_iteration" else 1) + (2 if o.error_feedback else 0) + 1
    return 2.0 * n * products * rows * cols * min(o.rank, rows, cols)


class LDAdamW(EngineOptimizer):
    """AdamW in a subspace of rank r that drifts from step to step, with error feedback.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. AdamW trains vectors, groups of the kind "embedding" or
            "head", which `parameter_groups(model)` makes, and groups with `compress=False`.
        lr: learning rate.
        **options: see the signature. `hf-efcp list --options` has the meaning and range of each.
    """

    options_type = LDAdamWOptions
    measured = MEASURED
    method = Tensorwise(
        Rule(specs, update, lossy=lambda o: o.error_feedback, operations=operations, decomposes=True),
        ADAMW,
        other_kinds=("embedding", "head"),
    )
