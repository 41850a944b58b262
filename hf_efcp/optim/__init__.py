"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC

__all__ = ["DenseGGT", "DenseMFAC", "LowRankGGT", "LowRankMFAC", "SparseGGT", "SparseMFAC"]
