"""DeepSpeed through Accelerate and Trainer: sets up the configurations that work, and refuses all others before training.

For each parameter group, ZeRO-1 and 2 give an optimizer this process's piece of the group's parameters as one flat fp32 tensor,
and call `step` once. With a single group, that is one step of one window over all pieces: K is summed over the processes, and
everything else is local. Low rank is refused, because a flat piece has no matrices. ZeRO-3 is refused, because it calls `step`
once for each sub-group. Nothing here imports deepspeed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from ..engine.base import EngineOptimizer
from ..engine.parameters import counted
from ..options import OptionError
from ..registry import all_optimizers
from .checkpoints import unwrapped

logger = logging.getLogger(__name__)

# Metrics that need the rows, or the single tensors, of the parameters.
_OF_ROWS = ("factored", "diagonal")
INSTEAD = "use DDP, where shard=auto divides the optimizer's state as ZeRO-1 does, or FSDP2"


def config_of(args: Any) -> Mapping[str, Any]:
    """Give the DeepSpeed configuration of TrainingArguments, from `--deepspeed` or `accelerate launch`; empty: there is none."""
    plugin = getattr(args, "deepspeed_plugin", None)
    holder = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "hf_ds_config", None)
    return getattr(holder, "config", None) or {}


def stage_of(config: Mapping[str, Any]) -> int:
    """Give the ZeRO stage; 0 if the configuration has none."""
    stage = _section(config, "zero_optimization").get("stage", 0)
    if not str(stage).isdigit():
        raise OptionError(f"DeepSpeed zero_optimization.stage={stage!r}: expected 0, 1, 2 or 3")
    return int(stage)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Give a section of the configuration; empty if it is not there."""
    section = config.get(key) or {}
    if not isinstance(section, Mapping):
        raise OptionError(f"DeepSpeed's config has {key}={section!r}: expected a section, {{...}}")
    return section


def check_config(
    config: Mapping[str, Any], cls: type[EngineOptimizer], options: Mapping[str, Any], given: Collection[str] = ()
) -> None:
    """Raise OptionError where DeepSpeed would replace the optimizer, or give it parameters that it cannot train.

    Args:
        config: DeepSpeed's configuration.
        cls: the optimizer's class.
        options: all options of the optimizer.
        given: the names of the options that the user gave.
    """
    name, stage = cls.__name__, stage_of(config)
    zero = _section(config, "zero_optimization")
    if "optimizer" in config:
        kind = _section(config, "optimizer").get("type")
        raise OptionError(f"DeepSpeed's config has an optimizer of its own ({kind}), which replaces {name}: remove that section")
    offload = _section(zero, "offload_optimizer").get("device", "none")
    if str(getattr(offload, "value", offload)) != "none" or zero.get("cpu_offload"):
        raise OptionError(
            f"DeepSpeed's offload_optimizer replaces {name} by DeepSpeedCPUAdam, or keeps its state where the processes cannot "
            f"sum it: set offload_optimizer.device to none, or {INSTEAD}"
        )
    if stage not in (0, 1, 2):
        raise OptionError(f"DeepSpeed zero_optimization.stage={stage}: {name} allows 0, 1 and 2 (sparse and dense); {INSTEAD}")
    if _section(config, "tensor_parallel").get("autotp_size", 0) > 1:
        raise OptionError(f"DeepSpeed tensor_parallel.autotp_size: {name} has no tensor parallelism; {INSTEAD}")
    if stage == 0:
        return
    if not cls.method.takes_flat_pieces:
        remedies = [*_without_matrices(cls), "stage 0", INSTEAD]
        raise OptionError(
            f"DeepSpeed zero_optimization.stage={stage} flattens the parameters, and {name} needs matrices: use "
            f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
        )
    if options.get("scope") == "layer":
        raise OptionError(f"scope='layer': DeepSpeed zero_optimization.stage={stage} leaves no layers; use scope=model")
    if options.get("metric") in _OF_ROWS and "metric" in given:
        raise OptionError(
            f"metric={options['metric']!r}: DeepSpeed zero_optimization.stage={stage} flattens the parameters, and rows "
            f"are lost: use metric=tensor or none, or {INSTEAD}"
        )
    if options.get("stochastic_rounding") and not _section(config, "bf16").get("bf16_master_weights_and_grads"):
        raise OptionError(
            f"stochastic_rounding=true has no effect: DeepSpeed zero_optimization.stage={stage} trains an fp32 copy of the "
            "parameters; leave it out, or set bf16_master_weights_and_grads and bf16_optimizer_states in its bf16 section"
        )
    for key, where in (("elastic_checkpoint", zero), ("load_universal", _section(config, "checkpoint"))):
        if where.get(key):
            raise OptionError(f"DeepSpeed {key}=true takes the optimizer's state for copies of the parameters: set it to false")


def _without_matrices(cls: type[EngineOptimizer]) -> list[str]:
    """Give the classes of the same family that take flat pieces, joined to one text; empty if there are none."""
    family = next((info.family for info in all_optimizers() if info.cls is cls), None)
    flat = [i.cls.__name__ for i in all_optimizers() if i.family == family and i.cls.method.takes_flat_pieces]
    return [" or ".join(flat)] if flat else []


def one_group(groups: list[dict[str, Any]], stage: int) -> list[dict[str, Any]]:
    """Join the parameter groups to one, as ZeRO-1 and 2 need. All have the same weight decay, and `compress`.

    Raises:
        OptionError: the groups have different weight decay, or only some of them are compressed.
    """
    if len(groups) < 2:
        return groups
    for key, remedy in (("weight_decay", "weight_decay=0"), ("compress", "no optim_target_modules")):
        values = {group[key] for group in groups}
        if len(values) > 1:
            raise OptionError(
                f"DeepSpeed zero_optimization.stage={stage} steps each parameter group by itself: one window takes one "
                f"group, but {key} is {' and '.join(map(str, sorted(values)))}: use {remedy}, or {INSTEAD}"
            )
    common = {key: groups[0][key] for key in ("weight_decay", "compress")}
    return [{"params": [entry for i in counted(groups) for entry in groups[i]["params"]], **common}]


def prepare(original: Any) -> Any:
    """Wrap Accelerator's `_prepare_deepspeed`: check the configuration, set up the optimizer, and check DeepSpeed's engine."""

    def _prepare_deepspeed(self, *args):
        ours = next((found for a in args if (found := unwrapped(a)) is not None), None)
        if ours is None:
            return original(self, *args)
        config = self.deepspeed_plugin.deepspeed_config
        open_ones, options = ours.builder.asked.open, dataclasses.asdict(ours.options)
        check_config(config, type(ours), options, [name for name in options if name not in open_ones])
        _set_up(ours, stage_of(config))
        result = original(self, *args)
        engine = next((r for r in result if isinstance(r, nn.Module) and hasattr(r, "optimizer")), None)
        if engine is not None:
            _check_engine(engine, ours, stage_of(config))
        return result

    return _prepare_deepspeed


def _set_up(ours: EngineOptimizer, stage: int) -> None:
    if ours.state:
        raise OptionError("the optimizer has taken steps: under DeepSpeed prepare it first")
    # DeepSpeed saves the first process's state, or with ZeRO each process's state: a stub would not do.
    if ours.builder.keep_state_together() and stage == 0:
        logger.warning("DeepSpeed without ZeRO: every process holds the optimizer's whole state (shard=off)")
    if stage == 0:
        return
    groups = [group for group in ours.param_groups if any(p.requires_grad for p in group["params"])]
    if len(groups) > 1:
        raise OptionError(
            f"DeepSpeed zero_optimization.stage={stage} steps each parameter group by itself: one window takes one group, got "
            f"{len(groups)}: pass the parameters as one list, or {INSTEAD}"
        )
    builder = ours.builder
    if getattr(ours.options, "metric", "none") in _OF_ROWS:  # it is the preset's: a given one was refused
        builder.options = dataclasses.replace(ours.options, metric="tensor")
        logger.warning("DeepSpeed zero_optimization.stage=%d: metric=tensor, one for each parameter's part of a piece", stage)
    ours.take_flat_pieces(sum(p.numel() for group in groups for p in group["params"] if p.requires_grad))


def _check_engine(engine: nn.Module, ours: EngineOptimizer, stage: int) -> None:
    name, found = type(ours).__name__, engine.optimizer
    if unwrapped(found) is not ours:
        raise OptionError(f"DeepSpeed trains with {type(found).__name__} in place of {name}: {INSTEAD}")
    if stage == 0:
        known = {id(p) for p in engine.parameters()}
        if any(id(p) not in known for group in ours.param_groups for p in group["params"]):
            raise OptionError(
                f"DeepSpeed's {type(found).__name__} hands {name} copies of the parameters (bf16 or fp16 without ZeRO): use "
                f"zero_optimization.stage 1 or 2 (sparse and dense), full precision, or {INSTEAD}"
            )
        return
    divided = getattr(found, "dp_process_group", None)
    if type(found).__name__ != "DeepSpeedZeroOptimizer" or dist.get_world_size(divided) != dist.get_world_size():
        raise OptionError(
            f"DeepSpeed divides the parameters by {type(found).__name__}, and not over all processes: {name} takes ZeRO-1 and 2 "
            f"without tensor, pipeline, expert or sequence parallelism; {INSTEAD}"
        )
    pieces = ours.builder.pieces
    assert pieces is not None, "_set_up comes first"
    ours.take_flat_pieces(pieces.coordinates, _parts_of(found))


def _parts_of(zero: Any) -> tuple[slice, ...]:
    """Give the place of each parameter's part in this process's piece, in order. Padding belongs to no part.

    Args:
        zero: a DeepSpeedZeroOptimizer with one group. Its tensors lie one behind the other, perhaps with padding after each, and
            are cut into pieces of `partition_size`.
    """
    tensors, size, parts = zero.round_robin_bit16_groups[0], int(zero.partition_size[0]), []
    paddings = getattr(zero, "round_robin_bit16_padding", [[0] * len(tensors)])[0]  # DeepSpeed before 0.19 has none
    start = -size * dist.get_rank(zero.dp_process_group)
    for p, padding in zip(tensors, paddings, strict=True):
        part = slice(max(start, 0), min(start + p.numel(), size))
        parts += [part] if part.start < part.stop else []
        start += p.numel() + padding
    return tuple(parts)
