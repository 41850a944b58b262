"""What local updates are asked for: options, the optimizer inside of Accelerate's, and what is refused before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.fsdp2 import is_sharded
from ..engine.base import EngineOptimizer
from ..options import OptionError, fraction, option, positive
from .lordo import LoRDO

# DES-LOC's periods, in synchronisations, for moments that all workers have in one basis.
_LORDO_AVERAGES: Mapping[str, int] = {"exp_avg": 3, "exp_avg_sq": 6}


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """Options of LocalUpdates."""

    sync_every: int = option(32, "optimizer steps between two synchronisations", allowed="an integer >= 1", check=positive)
    outer_lr: float = option(
        1.0, "share of the mean pseudo-gradient that is taken", allowed="a finite number > 0", check=positive
    )
    outer_momentum: float = option(0.0, "Nesterov momentum of the pseudo-gradients", allowed="a number in [0, 1)", check=fraction)
    offload: bool = option(False, "keep the weights of the last synchronisation, and the momentum, in the CPU's memory")
    min_workers: int | None = option(
        None,
        "go on without workers that died, as long as so many are left; none: stop",
        allowed="an integer >= 1",
        check=positive,
    )
    worker_timeout: float = option(
        300.0, "with min_workers: seconds that a worker waits for the others", allowed="a finite number > 0", check=positive
    )


def periods(optimizer: torch.optim.Optimizer, given: Mapping[str, int] | None) -> dict[str, int]:
    """Give the entries of the state whose means are taken, each with its period; checked.

    Raises:
        OptionError: an optimizer whose workers have no basis in common, or a bad name or period.
    """
    lordo = isinstance(optimizer, LoRDO)
    if given is None:
        return dict(_LORDO_AVERAGES) if lordo else {}
    if given and isinstance(optimizer, EngineOptimizer) and not lordo:
        raise OptionError(
            f"average_state={given!r}: each worker of {type(optimizer).__name__} has a basis or a window of its own, whose means "
            "mean nothing; allowed is {}"
        )
    for name, period in given.items():
        if lordo and name not in _LORDO_AVERAGES:
            raise OptionError(f"average_state: LoRDO has no entry {name!r} to average; allowed: {', '.join(_LORDO_AVERAGES)}")
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise OptionError(f"average_state: {name}={period!r}: must be an integer >= 1")
    return dict(given)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside what Accelerate made of it."""
    while not isinstance(optimizer, EngineOptimizer) and isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer, or what accelerator.prepare gave"
        )
    return optimizer


def refuse_divided(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise OptionError where workers cannot train alone."""
    kind = str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise OptionError(f"local updates train a whole model on every worker, and {kind} divides it: use DDP")
    if getattr(accelerator, "scaler", None) is not None:
        raise OptionError(
            "mixed_precision='fp16': workers would skip different steps; with local updates allowed are no and bf16"
        )
    if not isinstance(model, nn.Module):
        raise OptionError(f"model={type(model).__name__}: expected a torch.nn.Module, or what accelerator.prepare gave")
    if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        raise OptionError("local updates train a whole model on every worker, and FSDP2 divides it: use DDP")
    if isinstance(optimizer, EngineOptimizer):
        options = optimizer.options
        if getattr(options, "comm", "gradients") != "gradients":
            raise OptionError(f"comm={options.comm!r}: nothing is sent between synchronisations; allowed is gradients")
        if options.shard != "off" or optimizer.builder.process_group is not None:
            raise OptionError(
                f"shard={options.shard!r}: each worker has a state of its own with local updates; give "
                f"{type(optimizer).__name__} shard=off and no process_group"
            )


def refuse_newcomers(optimizer: torch.optim.Optimizer, known: Container[Tensor]) -> None:
    """Raise OptionError where a parameter is trained that no synchronisation knows of."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p not in known:
                raise OptionError(
                    f"a parameter of shape {tuple(p.shape)} is trained now, and was frozen or not the optimizer's when "
                    "LocalUpdates was made: synchronize before, detach, and make it anew"
                )
