"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .dash import DASH
from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .ldadamw import LDAdamW
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC
from .microadam import MicroAdam

__all__ = ["DASH", "DenseGGT", "DenseMFAC", "LDAdamW", "LowRankGGT", "LowRankMFAC", "MicroAdam", "SparseGGT", "SparseMFAC"]
