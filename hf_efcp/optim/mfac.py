"""M-FAC: natural gradient with the empirical Fisher of the last m gradients, F = damping*I + (1/m) G^T G (arXiv 2107.03356).

    u = F^-1 c_j = G^T [ m (K + m*damping*I)^-1 ] e_j

Low-rank and sparse windows with error feedback are EFCP (arXiv 2306.06098).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.coefficients import mfac
from ..core.gram import GramMatrix
from ..core.linalg import reciprocal
from ..engine.base import EngineOptimizer
from ..engine.formats import EntryFormat, LowRankFormat, SparseFormat
from ..engine.options import LOW_RANK, METRIC, SPARSE, LowRankOptions, SparseOptions, WindowOptions
from ..engine.windowed import Windowed
from ..options import option, positive


@dataclasses.dataclass(frozen=True)
class MFACOptions:
    """Options of F = damping*I + (1/N) G^T G."""

    damping: float = option(1e-6, "damping of the empirical Fisher", allowed="a finite number > 0", check=positive)
    damping_mode: str = option(
        "absolute", "relative: damping times the mean squared norm of the entries", choices=("absolute", "relative")
    )
    divisor: str = option(
        "window",
        "N: the window size m, or filled: the number of entries so far, as always with centered",
        choices=("window", "filled"),
    )


@dataclasses.dataclass(frozen=True)
class DenseMFACOptions(MFACOptions, WindowOptions):
    """Options of DenseMFAC."""


@dataclasses.dataclass(frozen=True)
class SparseMFACOptions(SparseOptions, MFACOptions, WindowOptions):
    """Options of SparseMFAC."""


@dataclasses.dataclass(frozen=True)
class LowRankMFACOptions(LowRankOptions, MFACOptions, WindowOptions):
    """Options of LowRankMFAC."""


# preset="measured": with it AdamW's learning rates work.
MEASURED: Mapping[str, Any] = MappingProxyType({**METRIC, "damping": 0.1, "damping_mode": "relative"})


def damping_of(o: Any, gram: GramMatrix) -> Tensor | float:
    """Give the damping, (groups,) fp64 where it is relative."""
    if o.damping_mode == "absolute":
        return o.damping
    return o.damping * gram.mean_square()


def outside(o: Any, gram: GramMatrix) -> Tensor:
    """Give phi(0) = 1 / damping, (groups,) fp64; 0 while there is no gradient."""
    return reciprocal(torch.zeros_like(gram.matrix[:, 0, 0]) + damping_of(o, gram))


def phi(o: Any, gram: GramMatrix, j: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Give c = N (M K + N*damping*I)^-1 w, (groups, m) fp64; arguments: see `Windowed`."""
    k, damping = gram.matrix, damping_of(o, gram)
    divisor = gram.filled.double() if o.centered or o.divisor == "filled" else o.window_size
    return mfac(k, w, damping, divisor, dtype, gram.filled_slots if o.centered else None)


def solve(m: int) -> float:
    """Count the operations of a Cholesky factorisation and two triangular systems."""
    return m**3 / 3 + 2 * m**2


class DenseMFAC(EngineOptimizer):
    """M-FAC on uncompressed gradients: 4*m bytes per parameter. The reference that the compressed ones are measured by.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs.
        lr: learning rate.
        **options: see the signature; meaning and range of each: `hf-efcp list --options`.
    """

    options_type = DenseMFACOptions
    measured = MEASURED
    method = Windowed(EntryFormat, phi, solve, outside)


class SparseMFAC(EngineOptimizer):
    """M-FAC on block top-k gradients with error feedback (EFCP). Arguments as DenseMFAC, with `density` and `block_size`."""

    options_type = SparseMFACOptions
    measured = MappingProxyType({**MEASURED, **SPARSE})
    method = Windowed(SparseFormat, phi, solve, outside)


class LowRankMFAC(EngineOptimizer):
    """M-FAC on rank-r gradients with error feedback (EFCP). Arguments as DenseMFAC, with `rank`."""

    options_type = LowRankMFACOptions
    measured = MappingProxyType({**MEASURED, **LOW_RANK})
    method = Windowed(LowRankFormat, phi, solve, outside)
