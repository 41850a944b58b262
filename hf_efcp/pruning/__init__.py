"""Pruning by Iterative Optimal Brain Surgeon (arXiv 2408.17163): `prune`, masks that hold during training, a callback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .banded import Banded
from .masks import Masks
from .model import prune
from .options import PruningOptions

if TYPE_CHECKING:
    from ..integrations.pruning import IOBSCallback


def __getattr__(name: str) -> Any:
    if name != "IOBSCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module("hf_efcp.integrations.pruning").IOBSCallback
    except ModuleNotFoundError:
        raise ImportError("hf_efcp.pruning.IOBSCallback needs transformers: pip install transformers") from None


__all__ = ["Banded", "IOBSCallback", "Masks", "PruningOptions", "prune"]
