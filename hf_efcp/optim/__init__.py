"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .dash import DASH
from .dct_adamw import DCTAdamW
from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .ldadamw import LDAdamW
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC
from .microadam import MicroAdam
from .trion import Trion

__all__ = [
    "DASH",
    "DCTAdamW",
    "DenseGGT",
    "DenseMFAC",
    "LDAdamW",
    "LowRankGGT",
    "LowRankMFAC",
    "MicroAdam",
    "SparseGGT",
    "SparseMFAC",
    "Trion",
]
