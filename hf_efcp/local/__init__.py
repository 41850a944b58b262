"""Training with rare synchronisation: LoRDO (arXiv 2602.04396), and the same mode for any other optimizer."""

from typing import TYPE_CHECKING, Any

from .lordo import LoRDO
from .updates import LocalUpdates
from .workers import WorkerError

if TYPE_CHECKING:
    from ..integrations.local_trainer import LocalUpdateTrainerMixin


def __getattr__(name: str) -> Any:
    if name != "LocalUpdateTrainerMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..integrations.local_trainer import LocalUpdateTrainerMixin  # imports transformers' Trainer, which takes seconds

    return LocalUpdateTrainerMixin


__all__ = ["LoRDO", "LocalUpdateTrainerMixin", "LocalUpdates", "WorkerError"]
