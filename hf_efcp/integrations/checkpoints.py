"""Sharded state in the checkpoints of Trainer and Accelerate: every process writes and reads its part beside the stub.

`optimizer.pt` (`optimizer.bin`) is written by the first process and holds groups and options only; the tensors are in the
folder `efcp_optim` of the checkpoint. Where the state is not sharded nothing of this does anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engine.base import EngineOptimizer
from ..engine.saving import SHARD_FOLDER
from ..options import OptionError

# As accelerate.utils.constants has it.
_OPTIMIZER_NAME = "optimizer"


def unwrapped(optimizer: Any) -> EngineOptimizer | None:
    """Our optimizer inside what Accelerate made of it; None if it is another one."""
    while optimizer is not None and not isinstance(optimizer, EngineOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def save_beside(original: Any) -> Any:
    """Trainer's `_save_optimizer_and_scheduler`, which runs on every process."""

    def _save_optimizer_and_scheduler(self, output_dir, *args, **kwargs):
        _save([self.optimizer], output_dir)
        return original(self, output_dir, *args, **kwargs)

    return _save_optimizer_and_scheduler


def load_beside(original: Any) -> Any:
    """Trainer's `_load_optimizer_and_scheduler`."""

    def _load_optimizer_and_scheduler(self, checkpoint, *args, **kwargs):
        if checkpoint is not None:
            _find([self.optimizer], checkpoint)
        try:
            return original(self, checkpoint, *args, **kwargs)
        finally:
            if (ours := unwrapped(self.optimizer)) is not None:
                ours.shard_folder = None  # a checkpoint without an optimizer leaves nothing behind for a later load

    return _load_optimizer_and_scheduler


def hook_states(original: Any) -> Any:
    """Accelerator's `prepare_optimizer`: `save_state` and `load_state` then call ours first, on every process.

    FSDP1 is refused here, before training: with `use_orig_params=False` our optimizer would hold parameters nobody trains.
    """

    def prepare_optimizer(self, optimizer, *args, **kwargs):
        ours = unwrapped(optimizer)
        if ours is not None and str(self.distributed_type).endswith("FSDP") and not getattr(self, "is_fsdp2", False):
            raise OptionError(
                f"fsdp_version=1: {type(ours).__name__} needs whole matrices, and FSDP1 hands it flat pieces: "
                "use fsdp_version=2 or DDP"
            )
        if ours is not None and not getattr(self, "_hf_efcp_hooked", False):
            self._hf_efcp_hooked = True
            self.register_save_state_pre_hook(lambda models, weights, folder: _save(self._optimizers, folder))
            self.register_load_state_pre_hook(lambda models, folder: _find(self._optimizers, folder))
        return original(self, optimizer, *args, **kwargs)

    return prepare_optimizer


def load_fsdp(original: Any) -> Any:
    """Accelerate's `load_fsdp_optimizer`, which Trainer calls too: memory_budget first chooses what the saved run had."""

    def load_fsdp_optimizer(fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, *args, **kwargs):
        ours = unwrapped(optimizer)
        if ours is not None and kwargs.get("use_dcp", True):  # else each process has a file of its own
            name = f"{_OPTIMIZER_NAME}_{optimizer_index}"
            folder = Path(input_dir) if Path(input_dir).name == name else Path(input_dir, name)
            file = Path(input_dir, f"{name if optimizer_index else _OPTIMIZER_NAME}.bin")
            ours.choose_as(file if file.is_file() else folder)
        return original(fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, *args, **kwargs)

    return load_fsdp_optimizer


def _save(optimizers: list, folder: str | Path) -> None:
    for number, optimizer in enumerate(optimizers):
        if (ours := unwrapped(optimizer)) is not None:
            ours.save_shards(_shard_folder(folder, number))


def _find(optimizers: list, folder: str | Path) -> None:
    for number, optimizer in enumerate(optimizers):
        if (ours := unwrapped(optimizer)) is not None:
            ours.shard_folder = _shard_folder(folder, number)


def _shard_folder(folder: str | Path, number: int) -> Path:
    # Numbered as Accelerate numbers optimizer.bin, optimizer_1.bin, ...
    return Path(folder, SHARD_FOLDER + (f"_{number}" if number else ""))
