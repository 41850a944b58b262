"""The optimizers. Plain torch: nothing here imports a Hugging Face package."""

from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC

__all__ = ["DenseMFAC", "LowRankMFAC", "SparseMFAC"]
