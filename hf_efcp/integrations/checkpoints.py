"""Adds the parts of a state to the checkpoints of Trainer and Accelerate that these do not write themselves.

With sharded state, the first process writes `optimizer.pt` (`optimizer.bin`), which has groups and options only. Every process
writes and reads its tensors in the folder `efcp_optim` of the checkpoint. Under FSDP2, torch.distributed.checkpoint writes
tensors and groups only, and the first process writes class and options to `efcp_options.pt`. Files that torch reads with pickle
are checked first. In all other cases nothing is added.
"""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.fsdp2 import is_sharded
from ..engine.base import EngineOptimizer
from ..engine.matching import refuse_others
from ..engine.parameters import canonical_name
from ..engine.saving import SHARD_FOLDER, section
from ..options import OptionError

# Class and options of a state that torch.distributed.checkpoint writes.
OPTIONS_FILE = "efcp_options.pt"
# The name in accelerate.utils.constants.
_OPTIMIZER_NAME = "optimizer"
_log = logging.getLogger("hf_efcp")


def unwrapped(optimizer: Any) -> EngineOptimizer | None:
    """Give our optimizer inside Accelerate's wrappers; None if the optimizer is not ours."""
    while optimizer is not None and not isinstance(optimizer, EngineOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def save_beside(original: Any) -> Any:
    """Wrap Trainer's `_save_optimizer_and_scheduler`, which runs on every process: the shards are saved first."""

    def _save_optimizer_and_scheduler(self, output_dir, *args, **kwargs):
        _save([self.optimizer], output_dir)
        return original(self, output_dir, *args, **kwargs)

    return _save_optimizer_and_scheduler


def load_beside(original: Any) -> Any:
    """Wrap Trainer's `_load_optimizer_and_scheduler`: the optimizer learns where the shards are."""

    def _load_optimizer_and_scheduler(self, checkpoint, *args, **kwargs):
        if checkpoint is not None:
            _find([self.optimizer], checkpoint)
            _warn_of_no_state(self, Path(checkpoint))
        try:
            return original(self, checkpoint, *args, **kwargs)
        finally:
            if (ours := unwrapped(self.optimizer)) is not None:
                ours.shard_folder = None  # after a checkpoint without an optimizer, a later load must not find the folder

    return _load_optimizer_and_scheduler


def hook_states(original: Any) -> Any:
    """Wrap Accelerator's `prepare_optimizer`: `save_state` and `load_state` then call our functions first, on every process.

    FSDP1 is refused here, before training. With its `use_orig_params=False`, our optimizer would hold parameters that nobody
    trains.
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
    """Wrap Accelerate's `load_fsdp_optimizer`, which Trainer calls too: compare names, and take the saved run's options."""

    def load_fsdp_optimizer(fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, *args, **kwargs):
        ours = unwrapped(optimizer)
        if ours is not None and kwargs.get("use_dcp", True):  # without it, each process has a file of its own
            name = f"{_OPTIMIZER_NAME}_{optimizer_index}"
            folder = Path(input_dir) if Path(input_dir).name == name else Path(input_dir, name)
            file = Path(input_dir, f"{name if optimizer_index else _OPTIMIZER_NAME}.bin")
            options = _numbered(folder.parent, OPTIONS_FILE, optimizer_index)
            _refuse_programs(folder)
            _check_names(ours, model, file if file.is_file() else folder)
            ours.choose_as(options if options.is_file() else file if file.is_file() else folder)
        return original(fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, *args, **kwargs)

    return load_fsdp_optimizer


def _save(optimizers: list, folder: str | Path) -> None:
    for number, optimizer in enumerate(optimizers):
        if (ours := unwrapped(optimizer)) is not None:
            ours.save_shards(_numbered(folder, SHARD_FOLDER, number))
            if any(is_sharded(p) for group in ours.param_groups for p in group["params"]) and dist.get_rank() == 0:
                Path(folder).mkdir(parents=True, exist_ok=True)
                torch.save({"efcp": section(ours.builder.name, ours.options)}, _numbered(folder, OPTIONS_FILE, number))


def _check_names(ours: EngineOptimizer, model: torch.nn.Module, saved: Path) -> None:
    """Raise OptionError where a file or folder under FSDP2 is of other parameters: torch's own error names at most one tensor."""
    from ..distributed import folder  # takes most of a second

    try:
        state = {} if saved.is_dir() else torch.load(str(saved), map_location="meta", mmap=True, weights_only=True)["state"]
        there = folder.names(saved) if saved.is_dir() else {str(key) for key in state}
    except Exception:  # the file is damaged, or not on this process: the code that reads it says so
        return
    trained = {p for group in ours.param_groups for p in group["params"] if p.requires_grad or p in ours.state}
    here = [canonical_name(name) for name, p in model.named_parameters() if p in trained]
    if there:  # it is empty if the state was saved before the first step
        refuse_others(sorted(map(canonical_name, there)), here)


def _find(optimizers: list, folder: str | Path) -> None:
    for number, optimizer in enumerate(optimizers):
        if (ours := unwrapped(optimizer)) is not None:
            ours.shard_folder = _numbered(folder, SHARD_FOLDER, number)
            _refuse_programs(Path(folder, f"{_OPTIMIZER_NAME}_{number}"))
            for name in (f"{_OPTIMIZER_NAME}.pt", f"{_OPTIMIZER_NAME}.bin"):
                file = _numbered(folder, name, number)
                if file.is_file() and not zipfile.is_zipfile(file):  # torch.save writes zip files, whose end has the index
                    raise OptionError(f"{file} is damaged or cut short: resume from another checkpoint")


def _warn_of_no_state(trainer: Any, checkpoint: Path) -> None:
    """Warn where Trainer finds no optimizer in a checkpoint, and goes on without a word (`save_only_model`)."""
    ours = None if getattr(trainer, "is_deepspeed_enabled", False) else unwrapped(trainer.optimizer)
    there = ours is None or not checkpoint.is_dir() or any(checkpoint.glob(f"{_OPTIMIZER_NAME}*"))
    if not there and trainer.is_world_process_zero():
        _log.warning("%s has no optimizer.pt: the optimizer starts anew, with an empty window", checkpoint)


def _refuse_programs(folder: Path) -> None:
    """Raise OptionError if a folder that torch.distributed.checkpoint is about to read with pickle may hold a program."""
    if not folder.is_dir():
        return
    from ..distributed import dcp_metadata

    try:
        dcp_metadata.refuse_programs(folder)
    except dcp_metadata.CheckpointError as error:
        raise OptionError(str(error)) from None


def _numbered(folder: str | Path, name: str, number: int) -> Path:
    # The numbers are those of Accelerate: optimizer.bin, optimizer_1.bin, ...
    path = Path(folder, name)
    return path.with_stem(f"{path.stem}_{number}") if number else path
