"""Trion: Muon in r columns of a fixed cosine basis, with error feedback inside the momentum (arXiv 2505.17967).

a = M + g. A (long x short) is a or a^T. D (short x short) is the orthonormal DCT-II basis, which is not a part of the state.

    S = A D,   i = the r columns of S of largest norm,   h = S_i = A D_i
    M <- A - (1 - mu) h D_i^T:   the part in the columns decays, the part outside of them is kept whole
    o = NS(h):   nearly the polar factor of h, by five steps of Newton-Schulz
    u = kappa o D_i^T

At full rank M = mu A, and u is that of Muon without Nesterov's momentum. Other tensors (vectors, embeddings, the head) are
trained by AdamW, with `adam_lr_ratio` times the matrices' learning rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec
from ..core.columns import Columns
from ..core.linalg import as_it_is
from ..core.newton_schulz import newton_schulz
from ..engine.adamw import ADAMW, AdamWOptions
from ..engine.base import EngineOptimizer
from ..engine.options import ColumnsOptions, StateOptions, SubspaceOptions
from ..engine.tensorwise import Message, Rule, TensorStack, Tensorwise, U
from ..options import fraction, option, positive


@dataclasses.dataclass(frozen=True)
class TrionOptions(ColumnsOptions, SubspaceOptions, AdamWOptions, StateOptions):
    """Options of Trion."""

    momentum: float = option(
        0.95,
        "decay of the part of the momentum that lies in the chosen columns; the rest of the momentum does not decay",
        allowed="a number in [0, 1)",
        check=fraction,
    )
    scaling_type: str = option(
        "kj",
        "factor of a matrix's update; kj: the square root of rows / cols, at least 1; none: 1; kimi: 0.2 times the square root "
        "of the longer side; dion: the square root of rows / cols",
        choices=("kj", "none", "kimi", "dion"),
    )
    ns_schedule: str = option(
        "muon",
        "coefficients of the five Newton-Schulz steps; muon: Muon's, the same at each; dion: different ones, whose results are "
        "nearer to orthonormal",
        choices=("muon", "dion"),
    )
    adam_lr_ratio: float = option(
        0.015,
        "learning rate of AdamW, which trains vectors, embeddings and the head, as a multiple of lr",
        allowed="a finite number > 0",
        check=positive,
    )
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", allowed="a number in [0, 1)", check=fraction)
    eps: float = option(1e-10, "added to AdamW's root mean square", allowed="a finite number > 0", check=positive)


# preset="measured": updates have AdamW's size, so that AdamW's learning rates work.
MEASURED: Mapping[str, Any] = MappingProxyType(
    {
        "error_dtype": torch.bfloat16,
        "scaling_type": "kimi",
        "adjust_lr_fn": "match_rms_adamw",
        "adam_lr_ratio": 1.0,
        "beta2": 0.999,
        "eps": 1e-8,
    }
)


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare nothing: the error feedback is M."""
    return ()


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> tuple[Tensor, ...]:
    """Give i (n, r) int32 and o (n, long, r), by the equations at the top of the file."""
    columns = Columns.of(s, o)
    i, h = columns.choose(a)
    d = columns.vectors(i)
    a.keep(columns.entry(d, (1 - o.momentum) * h))  # M <- A - (1 - mu) h D_i^T
    return i.int(), newton_schulz(h, o.ns_schedule, as_it_is if columns.left else a.total or as_it_is)


def parts(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare i and o of one matrix. DDP's processes send each other these long x r numbers in place of rows x cols."""
    columns = Columns(layout, o.rank)
    return columns.spec(), Spec("orthonormal", (columns.long, columns.rank), layout.dtype)


def form(s: TensorStack, message: Sequence[Tensor], o: Any) -> U:
    """Give u = kappa o D_i^T as factors."""
    columns, (i, orthonormal) = Columns.of(s, o), message
    return columns.entry(columns.vectors(i.long()), size_of(s.layout, o) * orthonormal).dense


def size_of(layout: Layout, o: Any) -> float:
    """Give kappa."""
    rows, cols = layout.rows, layout.cols
    size = {
        "kj": math.sqrt(max(1.0, rows / cols)),
        "none": 1.0,
        "kimi": 0.2 * math.sqrt(max(rows, cols)),
        "dion": math.sqrt(rows / cols),
    }[o.scaling_type]
    short = min(rows, cols)
    return size * (math.sqrt(short / min(o.rank, short)) if o.adjust_lr_fn == "match_rms_adamw" else 1.0)


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count operations for S by a Fourier transform and its norms, M minus h D_i^T, u, and Newton-Schulz's five steps."""
    short, long = min(rows, cols), max(rows, cols)
    r = min(o.rank, short)
    return n * (rows * cols * (4.0 * r + 2.5 * math.log2(short) + 2) + 5 * (4.0 * long * r**2 + 2 * r**3))


class Trion(EngineOptimizer):
    """Muon in the columns of a cosine basis that the momentum lies along most.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. AdamW trains vectors, groups of the kind "embedding" or
            "head", which `parameter_groups(model)` makes, and groups with `compress=False`.
        lr: learning rate of the matrices. AdamW's is `adam_lr_ratio` times as large.
        **options: see the signature. `hf-efcp list --options` has the meaning and range of each.
    """

    options_type = TrionOptions
    measured = MEASURED
    method = Tensorwise(
        Rule(specs, update, lossy=True, operations=operations, message=Message(parts, form)),
        dataclasses.replace(ADAMW, rate=lambda o: o.adam_lr_ratio),
        other_kinds=("embedding", "head"),
    )
