"""GGT: full-matrix Adagrad on the last m gradients (arXiv 1806.02958), D = diag(beta2^age), A = D G.

    u = ((A^T A)^1/2 + eps*I)^-1 c_j = G^T D [ ((D K D)^1/2 + eps*I)^-1 ] D^-1 e_j

Low-rank and sparse windows with error feedback are EFCP (arXiv 2306.06098). The vector that is preconditioned always lies in
the span of the window, so neither a jitter on K nor the 1/eps of the complement enters.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..core.coefficients import ggt, weights
from ..core.gram import GramMatrix
from ..options import GGTOptions, LowRankOptions, OptionError, SparseOptions, WindowOptions
from .base import WindowedOptimizer
from .formats import DenseRows, LowRankRows, SparseRows


@dataclasses.dataclass(frozen=True)
class _FamilyOptions(GGTOptions, WindowOptions):
    def __post_init__(self):
        super().__post_init__()
        if self.beta1 and self.window_momentum:
            raise OptionError(
                f"beta1={self.beta1} and window_momentum={self.window_momentum} are the same thing: give one of them"
            )


@dataclasses.dataclass(frozen=True)
class DenseGGTOptions(_FamilyOptions):
    """Options of DenseGGT."""


@dataclasses.dataclass(frozen=True)
class SparseGGTOptions(SparseOptions, _FamilyOptions):
    """Options of SparseGGT."""


@dataclasses.dataclass(frozen=True)
class LowRankGGTOptions(LowRankOptions, _FamilyOptions):
    """Options of LowRankGGT."""


class _GGT(WindowedOptimizer):
    def coefficients(self, gram: GramMatrix, j: Tensor, row_dtype: torch.dtype) -> Tensor:
        o, ages = self.options, gram.ages(j)
        w = weights(gram.matrix, ages, o.beta1 or o.window_momentum)
        return ggt(gram.matrix, w, o.beta2 ** ages.double(), o.eps, row_dtype)


class DenseGGT(DenseRows, _GGT):
    """Full-matrix Adagrad on uncompressed gradients: 4*m bytes per parameter. The reference for the compressed ones.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs.
        lr: learning rate.
        **options: see the signature; meaning and range of each: `hf-efcp list --options`.
    """

    options_type = DenseGGTOptions


class SparseGGT(SparseRows, _GGT):
    """Full-matrix Adagrad on block top-k gradients with error feedback. As DenseGGT, with `density` and `block_size`."""

    options_type = SparseGGTOptions


class LowRankGGT(LowRankRows, _GGT):
    """Full-matrix Adagrad on rank-r gradients with error feedback. As DenseGGT, with `rank` and `power_iterations`."""

    options_type = LowRankGGTOptions
