"""The model card that Trainer writes, with our optimizer's options and the size of its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .._version import __version__
from ..engine.choices import shown
from ..options import as_text
from .checkpoints import unwrapped
from .trainer_options import name_of


def with_optimizer(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap `extract_hyperparameters_from_trainer`: "optimizer" then has all options, if the optimizer is ours."""

    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        found = original(trainer)
        ours = unwrapped(trainer.optimizer)
        if ours is None:
            return found
        default = type(ours.options)()
        options = {f.name: getattr(ours.options, f.name) for f in dataclasses.fields(default)}
        changed = ", ".join(f"{k}={as_text(v)}" for k, v in options.items() if v != getattr(default, k))
        found["optimizer"] = f"{name_of(trainer.args)} of hf_efcp {__version__}" + (f" with {changed}" if changed else "")
        if ours.builder.setup is not None:  # to build it now, processes would have to communicate
            size = sum(ours.memory_footprint().values())
            count = sum(p.numel() for group in ours.param_groups for p in group["params"])
            where = "" if trainer.args.world_size == 1 else ", on the first process"
            found["optimizer_state"] = f"{shown(size)}, {size / count:.2f} bytes per trained parameter{where}"
        return found

    return extract_hyperparameters_from_trainer
