"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .ldadamw import LDAdamW
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC

__all__ = ["DenseGGT", "DenseMFAC", "LDAdamW", "LowRankGGT", "LowRankMFAC", "SparseGGT", "SparseMFAC"]
