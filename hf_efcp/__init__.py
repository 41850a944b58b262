"""Full-matrix second-order optimizers with compressed gradient windows (EFCP, arXiv 2306.06098) for Hugging Face training.

Importing this package registers its names with transformers, when that is installed; the optimizers themselves need torch only.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .groups import parameter_groups
from .integrations.wrapped import diagnostics
from .optim import DASH, DCTAdamW, DenseGGT, DenseMFAC, LDAdamW, LowRankGGT, LowRankMFAC, MicroAdam, SparseGGT, SparseMFAC, Trion
from .options import OptionError
from .registry import create_optimizer, list_optimizers, optim_defaults


def register() -> None:
    """Make the names of `list_optimizers()` valid for transformers' `--optim` and Trainer. Idempotent; called on import.

    Raises:
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("hf_efcp.register() needs transformers: pip install transformers")
    from .integrations.patches import register_with_transformers

    register_with_transformers()


# Importing transformers' Trainer takes seconds: what is built on it is imported when it is first asked for.
_NEED_TRANSFORMERS = {
    "EFCPTrainingArguments": "arguments",
    "EFCPTrainer": "trainer",
    "EFCPTrainerMixin": "trainer",
    "EFCPCallback": "callback",
    "optimizer_cls_and_kwargs": "trainer_options",
}

_HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if _HAS_TRANSFORMERS:
    register()

if TYPE_CHECKING:
    from .integrations.arguments import EFCPTrainingArguments
    from .integrations.callback import EFCPCallback
    from .integrations.trainer import EFCPTrainer, EFCPTrainerMixin
    from .integrations.trainer_options import optimizer_cls_and_kwargs


def __getattr__(name: str) -> Any:
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HAS_TRANSFORMERS:
        raise ImportError(f"hf_efcp.{name} needs transformers: pip install transformers")
    return getattr(importlib.import_module(f".integrations.{_NEED_TRANSFORMERS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "DASH",
    "DCTAdamW",
    "DenseGGT",
    "DenseMFAC",
    "EFCPCallback",
    "EFCPTrainer",
    "EFCPTrainerMixin",
    "EFCPTrainingArguments",
    "LDAdamW",
    "LowRankGGT",
    "LowRankMFAC",
    "MicroAdam",
    "OptionError",
    "SparseGGT",
    "SparseMFAC",
    "Trion",
    "__version__",
    "create_optimizer",
    "diagnostics",
    "list_optimizers",
    "optim_defaults",
    "optimizer_cls_and_kwargs",
    "parameter_groups",
    "register",
]
if not _HAS_TRANSFORMERS:  # so that `from hf_efcp import *` works
    __all__ = [name for name in __all__ if name not in _NEED_TRANSFORMERS]
