"""GGT: full-matrix Adagrad on the last m gradients (arXiv 1806.02958), D = diag(beta2^age), A = D G.

    u = ((A^T A)^1/2 + eps*I)^-1 c_j = G^T D [ ((D K D)^1/2 + eps*I)^-1 ] D^-1 e_j

Low-rank and sparse windows with error feedback are EFCP (arXiv 2306.06098). The preconditioned vector lies in the span of the
window, so K needs no jitter. Outside of the span the matrix is 1/eps, which multiplies residuals only (`residual="momentum"`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.coefficients import ggt
from ..core.gram import GramMatrix
from ..core.linalg import reciprocal
from ..engine.base import EngineOptimizer
from ..engine.formats import EntryFormat, LowRankFormat, SparseFormat
from ..engine.options import LOW_RANK, METRIC, SPARSE, LowRankOptions, SparseOptions, WindowOptions
from ..engine.windowed import Windowed
from ..options import OptionError, fraction, option, positive


@dataclasses.dataclass(frozen=True)
class GGTOptions:
    """Options of (A^T A)^1/2 + eps*I, A = diag(beta2^age) G."""

    window_size: int = option(100, "number m of gradients in the window", allowed="an integer >= 1", check=positive)
    eps: float = option(
        1e-5, "added to the square root, in units of the gradient's norm", allowed="a finite number > 0", check=positive
    )
    eps_mode: str = option(
        "absolute", "relative: eps times the root mean square of the entries' norms", choices=("absolute", "relative")
    )
    beta1: float = option(
        0.0,
        "momentum before preconditioning, as window_momentum (give one of them)",
        allowed="a number in [0, 1)",
        check=fraction,
        instead_of="window_momentum",
    )
    beta2: float = option(1.0, "decay of the window's entries by age", allowed="a number in (0, 1]", check=lambda x: 0 < x <= 1)


@dataclasses.dataclass(frozen=True)
class DenseGGTOptions(GGTOptions, WindowOptions):
    """Options of DenseGGT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta1 and self.window_momentum:
            raise OptionError(
                f"beta1={self.beta1} and window_momentum={self.window_momentum} are the same thing: give one of them"
            )
        if self.centered and self.beta2 < 1:
            raise OptionError(f"centered=True with beta2={self.beta2}: allowed is beta2=1, since decayed entries have no mean")

    @property
    def averaging(self) -> float:
        """See WindowOptions."""
        return self.beta1 or self.window_momentum


@dataclasses.dataclass(frozen=True)
class SparseGGTOptions(SparseOptions, DenseGGTOptions):
    """Options of SparseGGT."""


@dataclasses.dataclass(frozen=True)
class LowRankGGTOptions(LowRankOptions, DenseGGTOptions):
    """Options of LowRankGGT."""


# preset="measured": AdamW's learning rates work with these values.
MEASURED: Mapping[str, Any] = MappingProxyType({**METRIC, "eps": 0.3, "eps_mode": "relative"})


def eps_of(o: Any, gram: GramMatrix) -> Tensor | float:
    """Give eps; with eps_mode="relative", it is (groups,) fp64."""
    return o.eps if o.eps_mode == "absolute" else o.eps * gram.mean_square().sqrt()


def phi(o: Any, gram: GramMatrix, j: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Give c = D phi(D K D) D^-1 w, (groups, m) fp64. For the arguments, see `Windowed`."""
    decay = o.beta2 ** gram.ages(j).double()
    return ggt(gram.matrix, w, decay, eps_of(o, gram), dtype, gram.filled_slots if o.centered else None)


def outside(o: Any, gram: GramMatrix) -> Tensor:
    """Give phi(0) = 1 / eps, (groups,) fp64; 0 where eps is 0, since there is no gradient yet."""
    return reciprocal(torch.zeros_like(gram.matrix[:, 0, 0]) + eps_of(o, gram))


def solve(m: int) -> float:
    """Count the operations of an eigendecomposition: tridiagonal form 4/3 m^3, its eigenvectors 4/3 m^3, turning back 2 m^3."""
    return 14 / 3 * m**3


class DenseGGT(EngineOptimizer):
    """Precondition each gradient by full-matrix Adagrad on the last m gradients, kept whole (GGT).

    The update is u = ((A^T A)^1/2 + eps*I)^-1 g, where the rows of A are the gradients, each times beta2^age (arXiv 1806.02958).
    The state takes 4*m bytes per parameter, so that this class is for small models and for comparisons.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = DenseGGTOptions
    measured = MEASURED
    method = Windowed(EntryFormat, phi, solve, outside)


class SparseGGT(EngineOptimizer):
    """Precondition by full-matrix Adagrad on sparse gradients: GGT with top-k compression (EFCP, arXiv 2306.06098).

    It has the window and the error feedback of `SparseMFAC`, and the update of `DenseGGT`.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = SparseGGTOptions
    measured = MappingProxyType({**MEASURED, **SPARSE})
    method = Windowed(SparseFormat, phi, solve, outside)


class LowRankGGT(EngineOptimizer):
    """Precondition by full-matrix Adagrad on low-rank gradients: GGT with low-rank compression (EFCP, arXiv 2306.06098).

    It has the window and the error feedback of `LowRankMFAC`, and the update of `DenseGGT`.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs; of fp64, fp32, bf16 or fp16.
        lr: learning rate, a float or a tensor of one number; it may be given in the groups instead.
        process_group: of torch.distributed, whose processes share the state; None: this process has all of it.
        **options: the other arguments of the signature. `docs/options.md` has the meaning and range of each.

    Raises:
        OptionError: an option is unknown or out of range, or the parameters cannot be trained (complex, on mps, ...).
    """

    options_type = LowRankGGTOptions
    measured = MappingProxyType({**MEASURED, **LOW_RANK})
    method = Windowed(LowRankFormat, phi, solve, outside)
