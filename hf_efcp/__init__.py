"""Full-matrix second-order optimizers with compressed gradient windows (EFCP, arXiv 2306.06098) for Hugging Face training.

Importing this package registers its names with transformers, when that is installed; the optimizers themselves need torch only.
"""

import importlib.util

from ._version import __version__
from .optim import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, SparseGGT, SparseMFAC
from .optim.options import OptionError
from .registry import create_optimizer, list_optimizers


def register() -> None:
    """Make the names of `list_optimizers()` valid for transformers' `--optim` and Trainer. Idempotent; called on import.

    Raises:
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("hf_efcp.register() needs transformers: pip install transformers")
    from .integrations.names import register_with_transformers

    register_with_transformers()


if importlib.util.find_spec("transformers") is not None:
    register()

__all__ = [
    "DenseGGT",
    "DenseMFAC",
    "LowRankGGT",
    "LowRankMFAC",
    "OptionError",
    "SparseGGT",
    "SparseMFAC",
    "__version__",
    "create_optimizer",
    "list_optimizers",
    "register",
]
