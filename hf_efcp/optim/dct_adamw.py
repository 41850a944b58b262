"""DCT-AdamW: AdamW in r columns of a fixed cosine basis that the gradient chooses, with error feedback (arXiv 2505.17967).

a = e + g. A (long x short) is a or a^T. D (short x short) is the orthonormal DCT-II basis, which is not a part of the state. i0
are the columns of the step before.

    S = A D,   i = the r columns of S of largest norm,   h = S_i = A D_i
    e <- A - h D_i^T
    m' = m D_i0^T D_i,  v' = v D_i0^T D_i:   a column that stays keeps its moments, a new column begins with zeros
    m = b1 m' + (1 - b1) h,   v = b2 v' + (1 - b2) h^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) D_i^T

Other tensors (vectors, embeddings, the head) are trained by AdamW.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec
from ..core.columns import Columns, carried
from ..core.linalg import as_it_is, without_noise
from ..core.values import POSITIVE
from ..engine.adamw import ADAMW, AdamWOptions, adam
from ..engine.base import EngineOptimizer
from ..engine.options import STATE_DTYPES, ColumnsOptions, StateOptions, SubspaceOptions
from ..engine.tensorwise import Rule, TensorStack, Tensorwise, U
from ..options import option, positive


@dataclasses.dataclass(frozen=True)
class DCTAdamWOptions(ColumnsOptions, SubspaceOptions, AdamWOptions, StateOptions):
    """Options of DCTAdamW."""

    update_interval: int = option(
        1, "choose the columns at every so many steps of a tensor, and at its first", allowed="an integer >= 1", check=positive
    )
    rotate: bool = option(
        True,
        "moments follow their columns when others are chosen; false: they stay where they are in the state, as in the reference, "
        "so that a column may get another one's",
    )
    error_feedback: bool = option(True, "add to the next gradient what the columns leave out of this one; false: it is lost")
    moment_dtype: torch.dtype | None = option(
        None,
        "dtype of both moments of low-rank matrices, bf16 rounded stochastically; none: fp64 for fp64 parameters, else fp32",
        choices=STATE_DTYPES,
    )


# preset="measured": AdamW's learning rates work with these values.
MEASURED: Mapping[str, Any] = MappingProxyType({"error_format": "int8", "adjust_lr_fn": "match_rms_adamw"})


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare i and both moments (long x r)."""
    columns, dtype = Columns(layout, o.rank), o.moment_dtype or layout.dtype
    moment, follows = (columns.long, columns.rank), columns.follows()
    return (
        columns.spec(),
        Spec("exp_avg", moment, dtype, rows=follows),
        Spec("exp_avg_sq", moment, dtype, rows=follows, values=POSITIVE),
    )


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> U:
    """Give u as factors, by the equations at the top of the file."""
    columns, i0 = Columns.of(s, o), s.indices.read().long()
    i, h = choose(columns, a, t, i0, o.update_interval)
    d = columns.vectors(i)
    h = without_noise(h, 1, as_it_is if columns.left else a.total or as_it_is)
    a.keep(columns.entry(d, h))  # e <- A - h D_i^T
    m, v = s.exp_avg.read(), s.exp_avg_sq.read()
    if o.rotate:
        m, v = (carried(x, i0, i, columns.short) for x in (m, v))
    m = o.beta1 * m + (1 - o.beta1) * h
    v = o.beta2 * v + (1 - o.beta2) * h.square()
    s.indices.write(i)
    s.exp_avg.write(m)
    s.exp_avg_sq.write(v)
    size = math.sqrt(columns.short / columns.rank) if o.adjust_lr_fn == "match_rms_adamw" else 1.0
    return columns.entry(d, size * adam(m, v, t, o)).dense


def choose(columns: Columns, a: Accumulated, t: Tensor, i0: Tensor, interval: int) -> tuple[Tensor, Tensor]:
    """Give i and h. Where no columns are due, i is i0. The host has to know what is due, unless columns are always due."""
    if interval == 1:
        return columns.choose(a)
    anew = (t == 1) | (t % interval == 0)
    flags = anew.flatten().tolist()
    if all(flags):
        return columns.choose(a)
    i = torch.where(anew[:, 0], columns.choose(a)[0], i0) if any(flags) else i0
    return i, columns.times(a, columns.vectors(i))


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count the operations for S by a Fourier transform and its norms, h where columns stay, e minus h D_i^T, and u."""
    short, chosen = min(rows, cols), 1 / o.update_interval
    products = 1 + (1 if o.error_feedback else 0) + (1 - chosen)
    return n * rows * cols * (2.0 * products * min(o.rank, short) + chosen * (2.5 * math.log2(short) + 2))


class DCTAdamW(EngineOptimizer):
    """AdamW in the columns of a cosine basis that the gradient lies along most, with error feedback.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. AdamW trains vectors, groups of the kind "embedding" or
            "head", which `parameter_groups(model)` makes, and groups with `compress=False`.
        lr: learning rate.
        **options: see the signature. `hf-efcp list --options` has the meaning and range of each.
    """

    options_type = DCTAdamWOptions
    measured = MEASURED
    method = Tensorwise(
        Rule(specs, update, lossy=lambda o: o.error_feedback, operations=operations), ADAMW, other_kinds=("embedding", "head")
    )
