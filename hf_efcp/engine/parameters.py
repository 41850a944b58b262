"""Which parameters and parameter groups an optimizer takes; whatever would go wrong silently or late is refused at once."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp2 import is_sharded, problem
from ..options import OptionError, ParamGroupOptions, build, field_types
from .asked import say


def checked_group(group: Any, others: Sequence[dict[str, Any]], options_type: type, name: str) -> dict[str, Any]:
    """Check a parameter group, and give it with typed values.

    Args:
        group: as the user gives it.
        others: the groups so far.
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
        params = list({id(_tensor(entry)): entry for entry in params}.values())  # tied weights once
        for p in map(_tensor, params):
            if isinstance(p, Tensor) and p.requires_grad:  # what is no tensor is torch's to refuse
                refuse_parameter(p, name)
        params = _named_alike(params, others)
    return {**group, **{k: getattr(checked, k) for k in given}, "params": params}


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


class Defaults(dict[str, Any]):
    """The defaults of parameter groups. A schedule that looks there for a momentum to vary gets an OptionError: there is none."""

    def __contains__(self, key: object) -> bool:
        """Whether groups have the key; torch's OneCycleLR and CyclicLR ask for these two, and would name no remedy."""
        if key in ("momentum", "betas") and sys._getframe(1).f_globals.get("__name__") == "torch.optim.lr_scheduler":
            raise OptionError(
                "cycle_momentum=True: momentum is an option of the whole optimizer here, which no schedule varies; pass "
                "cycle_momentum=False"
            )
        return super().__contains__(key)


def constructor(init: Callable[..., None], cls: type, options_type: type) -> Callable[..., None]:
    """Give the `__init__` of `cls`, which spells out the options where `init` takes `**options`.

    Its signature is what help(), editors and programs that make command lines of constructors (jsonargparse) read. Text is a type
    of those options of which no such program knows the form: bytes and dtypes.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(kwargs) >= len(keywords) and keywords <= kwargs.keys():
            kwargs = _without_filled_in(kwargs, parameters, cls.__name__)
        init(self, *args, **kwargs)

    first, types = list(inspect.signature(init).parameters.values())[:-1], typing.get_type_hints(init)
    options = []
    for field in dataclasses.fields(options_type):
        annotation = field_types(options_type)[field.name]
        if field.metadata["parse"] or torch.dtype in (annotation, *typing.get_args(annotation)):
            annotation |= str
        kind = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))
    parameters = [*(p.replace(annotation=types.get(p.name, p.empty)) for p in first), *options]
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    made: Any = __init__
    made.__signature__ = inspect.Signature(parameters, return_annotation=None)
    made.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty} | {"return": None}
    made.__qualname__, made.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    return made


def _without_filled_in(kwargs: dict[str, Any], parameters: Iterable[inspect.Parameter], name: str) -> dict[str, Any]:
    """Leave out the defaults that a program fills in which always gives all arguments, as LightningCLI does.

    Each of them would count as given: then no preset, budget or checkpoint could decide on anything.
    """
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    left = {n: v for n, v in kwargs.items() if n not in defaults or v != defaults[n]}
    if left.get("preset") or left.get("memory_budget"):
        say(f"{name}: all options are given, as by a program that fills in the defaults: those with a default count as not given")
    return left


def levels_to_caller() -> int:
    """Count the frames up to the first one outside of torch and of this package, for `warnings.warn(stacklevel=...)`."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "hf_efcp"):
        frame, level = frame.f_back, level + 1
    return level


def _named_alike(params: list[Any], others: Sequence[dict[str, Any]]) -> list[Any]:
    """Give `params` as (name, tensor) pairs or as tensors, as the groups so far: torch refuses a mixture."""
    if not others or not params:
        return params
    if "param_names" not in others[0]:
        return [_tensor(entry) for entry in params]
    number = len(others)
    return [e if isinstance(e, tuple) else (f"group{number}.{i}", e) for i, e in enumerate(params)]


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry
