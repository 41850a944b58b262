"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC
from .microadam import MicroAdam

__all__ = ["DenseGGT", "DenseMFAC", "LowRankGGT", "LowRankMFAC", "MicroAdam", "SparseGGT", "SparseMFAC"]
