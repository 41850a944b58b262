"""Which parameters and parameter groups an optimizer takes. What would go wrong silently or late is refused at once."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.fsdp2 import is_sharded, problem
from ..distributed.placement import Placement
from ..options import OTHER_NAMES, OptionError, ParamGroupOptions, build, field_types

# Key of a parameter group: its place in the order in which parameters are numbered, if this is not the order of the groups.
ORDER = "efcp_order"
# What wrappers (torch.compile, DDP, activation checkpointing, PEFT) put into names.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.|^module\.|^base_model\.model\.")


def checked_params(params: Any, name: str) -> Any:
    """Give the parameters, or raise TypeError and say what to pass instead.

    Args:
        params: of an optimizer or of a group, as the user gives them.
        name: of the optimizer's class.
    """
    if isinstance(params, nn.Module) or callable(params):
        kind = type(params).__name__
        raise TypeError(f"{name}: params is a {kind}: pass model.parameters(), or create_optimizer(name, model, ...) the model")
    if isinstance(params, Mapping):
        raise TypeError(
            f"{name}: params is a {type(params).__name__}: pass tensors, groups, or (name, tensor) pairs: its items()"
        )
    return params


def checked_group(group: Any, options_type: type, name: str) -> dict[str, Any]:
    """Check a parameter group, and give it with typed values.

    Args:
        group: as the user gives it.
        options_type: the dataclass of the optimizer's options. A group may set none of them.
        name: of the optimizer's class.

    Raises:
        OptionError: a bad lr or weight_decay, an option of the whole optimizer, or a parameter that cannot be optimized.
    """
    if not isinstance(group, dict):
        raise TypeError(f"{name}: a parameter group must be a dict, got {type(group).__name__}")
    valid = field_types(ParamGroupOptions)
    for key in group:
        if key in field_types(options_type):
            raise OptionError(f"{key} is an option of the whole optimizer {name}, not of a parameter group")
        if key not in valid and (near := _meant(key, valid, field_types(options_type))):
            raise OptionError(f"unknown key {key!r} in a parameter group of {name}: did you mean {near!r}?")
    given = {k: v for k, v in group.items() if k in valid}
    checked = build(ParamGroupOptions, given, name)
    params = checked_params(group["params"], name)
    if not isinstance(params, Tensor | set):  # torch refuses a set, with a good message
        params = list(params)
        once = {id(_tensor(entry)): entry for entry in params}
        if len(once) < len(params):
            warnings.warn(
                f"{name}: a parameter group with duplicate parameters; each is counted once", stacklevel=levels_to_caller()
            )
        params = list(once.values())
        for p in map(_tensor, params):
            if isinstance(p, Tensor) and p.requires_grad:  # torch refuses what is no tensor
                refuse_parameter(p, name)
    return {**group, **{k: getattr(checked, k) for k in given}, "params": params}


def check_rate(groups: list[dict[str, Any]], name: str) -> None:
    """Raise OptionError, and drop the last group, where neither the group nor the optimizer was given a learning rate."""
    if groups[-1]["lr"] is None:
        del groups[-1]
        raise OptionError(f"lr: a value is needed, {name} has none, and neither has its parameter group {len(groups)}")


def refuse_parameter(p: Tensor, name: str) -> None:
    """Raise OptionError for a parameter that cannot be optimized."""
    if p.is_nested or p.layout != torch.strided:
        layout = "nested" if p.is_nested else str(p.layout).removeprefix("torch.")
        raise OptionError(f"{name} has no arithmetic for {layout} parameters: pass a dense one, p.to_dense()")
    if p.is_complex():
        raise OptionError(f"{name} has no complex arithmetic: pass torch.view_as_real(p) instead of the {p.dtype} parameter")
    if hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened"):
        raise OptionError(f"{name} needs whole matrices, and FSDP1 hands it flat pieces: use FSDP2 (fully_shard) or DDP")
    if hasattr(p, "ds_id") or hasattr(p, "ds_tensor"):
        raise OptionError(f"{name} needs whole parameters, and DeepSpeed's ZeRO-3 divides them: use DDP or FSDP2")
    if p.device.type == "mps":
        raise OptionError(f"{name} forms inner products in fp64, which the mps device does not have: train on cpu or cuda")
    if is_sharded(p) and (trouble := problem(p)):
        raise OptionError(f"{name}: {trouble}")


def refuse_without_numbers(p: Tensor, name: str) -> None:
    """Raise OptionError for a parameter that has no numbers yet; an optimizer may be made of it, but take no step.

    On the meta device models are only planned, and FSDP2 gives an optimizer's parameters their memory later.
    """
    if p.device.type == "meta":
        raise OptionError(
            f"{name} was made of parameters on the meta device, {tuple(p.shape)} for one, which have no numbers: give the model "
            "its weights, then make the optimizer (to_empty and load_state_dict(assign=True) put new parameters in their place; "
            "device_map may leave some on meta). What it would take: estimate_footprint()"
        )


def refuse_in_step(p: Tensor, name: str, tensors: bool) -> None:
    """Raise OptionError for a parameter that cannot take a step. `tensors`: whether plain tensors can."""
    refuse_without_numbers(p, name)
    refuse_parameter(p, name)
    if not tensors and type(p) is Tensor:
        raise OptionError(
            f"{name} was given parameters, and finds a plain tensor {tuple(p.shape)} in their place, as "
            "DeepSpeed does: prepare it by Accelerate or Trainer, without ZeRO in full precision; or use DDP"
        )


def agree(name: str, options: Any, placement: Placement, trained: Iterable[tuple[int, Sequence[Tensor]]]) -> None:
    """Raise OptionError on every process if one process has another class, other options or other parameters.

    Args:
        name, options: of the optimizer.
        placement: whose processes have to agree.
        trained: the index of each group, and its parameters.
    """
    mine = [f"class {name}"]
    mine += [f"{option}={value!r}" for option, value in dataclasses.asdict(options).items()]
    for i, params in trained:
        mine += [f"group {i}: a parameter {tuple(p.shape)} {p.dtype}" for p in params]
    everybody = placement.gather(mine)
    for rank, theirs in enumerate(everybody):
        for a, b in itertools.zip_longest(everybody[0], theirs, fillvalue="no more parameters"):
            if a != b:
                raise OptionError(f"the processes do not train the same: rank 0 has {a}, rank {rank} has {b}")


def levels_to_caller() -> int:
    """Count the frames up to the first one outside of torch and of this package, for `warnings.warn(stacklevel=...)`."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "hf_efcp"):
        frame, level = frame.f_back, level + 1
    return level


def canonical_name(name: str) -> str:
    """Give a parameter's name as in the bare model, whatever wraps the model."""
    while (bare := _WRAPPERS.sub(lambda m: m.group(1) or "", name)) != name:
        name = bare
    return name


def counted(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Give the groups' indices in the order in which their parameters are numbered."""
    return sorted(range(len(groups)), key=lambda i: groups[i].get(ORDER, i))


def _meant(key: str, valid: Iterable[str], options: Iterable[str]) -> str | None:
    """Give the key of a group, or the option, that an unknown key is likely to mean; None: the key is the user's own."""
    if str(key).lower() in OTHER_NAMES:
        return OTHER_NAMES[str(key).lower()]
    if near := difflib.get_close_matches(str(key).lower(), valid, n=1, cutoff=0.8):
        return near[0]
    # Keys such as max_momentum and base_momentum are a schedule's.
    near = difflib.get_close_matches(str(key).lower(), options, n=1, cutoff=0.75)
    return near[0] if near and not str(key).endswith(f"_{near[0]}") and not str(key).startswith(f"{near[0]}_") else None


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry
