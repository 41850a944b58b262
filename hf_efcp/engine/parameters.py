"""Which parameters and parameter groups an optimizer takes; whatever would go wrong silently or late is refused at once."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..distributed.fsdp2 import is_sharded, problem
from ..distributed.placement import Placement
from ..options import OptionError, ParamGroupOptions, build, field_types


def checked_group(group: Any, options_type: type, name: str) -> dict[str, Any]:
    """Check a parameter group, and give it with typed values.

    Args:
        group: as the user gives it.
        options_type: the optimizer's options, none of which a group may set.
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
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.8)
        if key not in valid and near:
            raise OptionError(f"unknown key {key!r} in a parameter group of {name}: did you mean {near[0]!r}?")
    given = {k: v for k, v in group.items() if k in valid}
    checked = build(ParamGroupOptions, given, name)
    params = group["params"]
    if not isinstance(params, Tensor | set):  # torch refuses a set, with a good message
        params = list(params)
        once = {id(_tensor(entry)): entry for entry in params}
        if len(once) < len(params):
            warnings.warn(
                f"{name}: a parameter group with duplicate parameters; each is counted once", stacklevel=levels_to_caller()
            )
        params = list(once.values())
        for p in map(_tensor, params):
            if isinstance(p, Tensor) and p.requires_grad:  # what is no tensor is torch's to refuse
                refuse_parameter(p, name)
    return {**group, **{k: getattr(checked, k) for k in given}, "params": params}


def check_rate(groups: list[dict[str, Any]], name: str) -> None:
    """Raise OptionError, and drop the last group, where neither it nor the optimizer was given a learning rate."""
    if groups[-1]["lr"] is None:
        del groups[-1]
        raise OptionError(f"lr: a value is needed, {name} has none, and neither has its parameter group {len(groups)}")


def refuse_parameter(p: Tensor, name: str) -> None:
    """Raise OptionError for a parameter that cannot be optimized."""
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


def agree(name: str, options: Any, placement: Placement, trained: Sequence[Sequence[Tensor]]) -> None:
    """Raise OptionError on every process where one has another class, other options or other parameters.

    Args:
        name, options: of the optimizer.
        placement: whose processes have to agree.
        trained: the parameters of each group.
    """
    mine = [f"class {name}"]
    mine += [f"{option}={value!r}" for option, value in dataclasses.asdict(options).items()]
    for i, params in enumerate(trained):
        mine += [f"group {i}: a parameter {tuple(p.shape)} {p.dtype}" for p in params]
    everybody = placement.gather(mine)
    for rank, theirs in enumerate(everybody):
        for a, b in itertools.zip_longest(everybody[0], theirs, fillvalue="no more parameters"):
            if a != b:
                raise OptionError(f"the processes do not train the same: rank 0 has {a}, rank {rank} has {b}")


def signature(options_type: type) -> inspect.Signature:
    """Give a constructor's signature with the options spelled out, for help() and editors."""
    kinds = inspect.Parameter
    parameters = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        kinds("lr", kinds.POSITIONAL_OR_KEYWORD, default=None, annotation=float | None),
        kinds("weight_decay", kinds.KEYWORD_ONLY, default=0.0, annotation=float),
        kinds("process_group", kinds.KEYWORD_ONLY, default=None),
    ]
    defaults = options_type()
    for name, annotation in field_types(options_type).items():
        parameters.append(kinds(name, kinds.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation))
    return inspect.Signature(parameters)


def levels_to_caller() -> int:
    """Count the frames up to the first one outside of torch and of this package, for `warnings.warn(stacklevel=...)`."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "hf_efcp"):
        frame, level = frame.f_back, level + 1
    return level


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry
