"""comm="factors" under Accelerate, and so under Trainer: gives the model's DistributedDataParallel the optimizer's hook."""

from __future__ import annotations

import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from ..options import OptionError
from .checkpoints import unwrapped


def hook_model(original: Any) -> Any:
    """Wrap Accelerator's `prepare_model`: its DistributedDataParallel gets the hook, once the optimizer is there too."""

    def prepare_model(self, *args, **kwargs):
        prepared = original(self, *args, **kwargs)
        if isinstance(prepared, DistributedDataParallel):
            if not hasattr(self, "_hf_efcp_models"):
                self._hf_efcp_models = weakref.WeakSet()
            self._hf_efcp_models.add(prepared)
            _join(self)
        return prepared

    return prepare_model


def hook_optimizer(original: Any) -> Any:
    """Wrap Accelerator's `prepare_optimizer`, which may come before or after `prepare_model`."""

    def prepare_optimizer(self, *args, **kwargs):
        prepared = original(self, *args, **kwargs)
        _join(self)
        return prepared

    return prepare_optimizer


def _join(accelerator: Any) -> None:
    """Give each model without a hook the hook of the optimizer that trains the model."""
    for model in list(getattr(accelerator, "_hf_efcp_models", ())):
        for optimizer in map(unwrapped, accelerator._optimizers):
            if optimizer is None or hasattr(model, "_hf_efcp_hooked"):
                continue
            if getattr(optimizer.options, "comm", "") == "factors":
                mine = {p for group in optimizer.param_groups for p in group["params"]}
                if mine.isdisjoint(model.parameters()):
                    continue
                if accelerator.scaler is not None:
                    raise OptionError(
                        "comm='factors' with fp16: the factors would be of scaled gradients; use bf16, or comm='gradients'"
                    )
                optimizer.register_comm_hook(model)
                model._hf_efcp_hooked = True
