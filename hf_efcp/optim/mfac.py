"""M-FAC: natural gradient with the empirical Fisher of the last m gradients, F = damping*I + (1/m) G^T G (arXiv 2107.03356).

    u = F^-1 c_j = G^T [ m (K + m*damping*I)^-1 ] e_j

Low-rank and sparse windows with error feedback are EFCP (arXiv 2306.06098).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..core.coefficients import mfac, weights
from ..core.deferred import DelayedFlag
from ..core.gram import GramMatrix
from ..options import LowRankOptions, MFACOptions, SparseOptions, WindowOptions
from .base import WindowedOptimizer
from .formats import DenseRows, LowRankRows, SparseRows


@dataclasses.dataclass(frozen=True)
class DenseMFACOptions(MFACOptions, WindowOptions):
    """Options of DenseMFAC."""


@dataclasses.dataclass(frozen=True)
class SparseMFACOptions(SparseOptions, MFACOptions, WindowOptions):
    """Options of SparseMFAC."""


@dataclasses.dataclass(frozen=True)
class LowRankMFACOptions(LowRankOptions, MFACOptions, WindowOptions):
    """Options of LowRankMFAC."""


class _MFAC(WindowedOptimizer):
    def _listen_anew(self) -> None:
        super()._listen_anew()
        self._dependent = DelayedFlag()

    def coefficients(self, gram: GramMatrix, j: Tensor, row_dtype: torch.dtype) -> Tensor:
        o, k = self.options, gram.matrix
        damping = o.damping
        if o.damping_mode == "relative":
            damping = o.damping * k.diagonal(dim1=-2, dim2=-1).sum(-1) / gram.filled
        divisor = o.window_size if o.divisor == "window" else gram.filled
        return mfac(k, weights(k, gram.ages(j), o.window_momentum), damping, divisor, row_dtype, self._dependent)


class DenseMFAC(DenseRows, _MFAC):
    """M-FAC on uncompressed gradients: 4*m bytes per parameter. The reference that the compressed ones are measured by.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs.
        lr: learning rate.
        **options: see the signature; meaning and range of each: `hf-efcp list --options`.
    """

    options_type = DenseMFACOptions


class SparseMFAC(SparseRows, _MFAC):
    """M-FAC on block top-k gradients with error feedback (EFCP). Arguments as DenseMFAC, with `density` and `block_size`."""

    options_type = SparseMFACOptions


class LowRankMFAC(LowRankRows, _MFAC):
    """M-FAC on rank-r gradients with error feedback (EFCP). Arguments as DenseMFAC, with `rank`."""

    options_type = LowRankMFACOptions
