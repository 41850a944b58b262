"""Training with rare synchronisation: LoRDO (arXiv 2602.04396), and the same mode for any other optimizer."""

import importlib
from typing import Any

from .lordo import LoRDO
from .updates import LocalUpdates
from .workers import WorkerError


def __getattr__(name: str) -> Any:
    if name != "LocalUpdateTrainerMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Importing transformers' Trainer takes seconds.
    try:
        return importlib.import_module("hf_efcp.integrations.local_trainer").LocalUpdateTrainerMixin
    except ModuleNotFoundError:
        raise ImportError("hf_efcp.local.LocalUpdateTrainerMixin needs transformers: pip install transformers") from None


__all__ = ["LoRDO", "LocalUpdateTrainerMixin", "LocalUpdates", "WorkerError"]
