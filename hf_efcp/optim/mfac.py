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
        "number that the sum over the window is divided by; window: window_size; filled: the number of entries so far (always so "
        "with centered)",
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


# preset="measured": AdamW's learning rates work with these values.
MEASURED: Mapping[str, Any] = MappingProxyType({**METRIC, "damping": 0.1, "damping_mode": "relative"})


def damping_of(o: Any, gram: GramMatrix) -> Tensor | float:
    """Give the damping; with damping_mode="relative", it is (groups,) fp64."""
    if o.damping_mode == "absolute":
        return o.damping
    return o.damping * gram.mean_square()


def outside(o: Any, gram: GramMatrix) -> Tensor:
    """Give phi(0) = 1 / damping, (groups,) fp64; 0 where the damping is 0, since there is no gradient yet."""
    return reciprocal(torch.zeros_like(gram.matrix[:, 0, 0]) + damping_of(o, gram))


def phi(o: Any, gram: GramMatrix, j: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Give c = N (M K + N*damping*I)^-1 w, (groups, m) fp64. For the arguments, see `Windowed`."""
    k, damping = gram.matrix, damping_of(o, gram)
    divisor = gram.filled.double() if o.centered or o.divisor == "filled" else o.window_size
    return mfac(k, w, damping, divisor, dtype, gram.filled_slots if o.centered else None)


def solve(m: int) -> float:
    """Count the operations of a Cholesky factorisation and two triangular systems."""
    return m**3 / 3 + 2 * m**2


class DenseMFAC(EngineOptimizer):
    """Precondition each gradient by the empirical Fisher of the last m gradients, kept whole (M-FAC).

    The update is u = (damping*I + G^T G / m)^-1 g, where the rows of G are the gradients (arXiv 2107.03356). The state takes
    4*m bytes per parameter, so that this class is for small models and for comparisons.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = DenseMFACOptions
    measured = MEASURED
    method = Windowed(EntryFormat, phi, solve, outside)


class SparseMFAC(EngineOptimizer):
    """Precondition by the empirical Fisher of sparse gradients: M-FAC with top-k compression (EFCP, arXiv 2306.06098).

    Of every block of `block_size` numbers in a row of a matrix, the share `density` of largest magnitude enters the window. The
    rest is added to the next gradient (error feedback). Indices are int16.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = SparseMFACOptions
    measured = MappingProxyType({**MEASURED, **SPARSE})
    method = Windowed(SparseFormat, phi, solve, outside)


class LowRankMFAC(EngineOptimizer):
    """Precondition by the empirical Fisher of low-rank gradients: M-FAC with low-rank compression (EFCP, arXiv 2306.06098).

    A matrix (rows, cols) enters the window as P Q^T of rank `rank`, found by one power iteration from the Q of the step before
    (PowerSGD, arXiv 1905.13727). What P Q^T leaves out is added to the next gradient (error feedback). Vectors enter whole.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = LowRankMFACOptions
    measured = MappingProxyType({**MEASURED, **LOW_RANK})
    method = Windowed(LowRankFormat, phi, solve, outside)
