"""The optimizer that TrainingArguments ask for: its name, and its options from every place where they may be given, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..engine.base import EngineOptimizer
from ..groups import parameter_groups, parse_targets
from ..options import OptionError, unknown_name
from ..registry import OptimizerInfo, all_optimizers, get_optimizer_info, list_optimizers, optim_defaults, parse_optim_args
from . import deepspeed
from .run_options import FIELD, NAMES, RunOptions, checked, fields_of, split

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Options that are also arguments of their own: name in optim_args -> field of TrainingArguments.
_OWN_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def optimizer_cls_and_kwargs(
    args: TrainingArguments,
    name: str | None = None,
    model: torch.nn.Module | None = None,
    decay_names: Iterable[str] | None = None,
) -> tuple[type[EngineOptimizer], dict[str, Any]]:
    """Give the class and the keyword arguments for `Trainer(optimizer_cls_and_kwargs=...)`, with every option checked.

    For a registered name, the Trainer calls this by itself. A call by hand needs no private part of transformers.

    Args:
        args: the TrainingArguments. Only arguments of the optimizer are read.
        name: one of `hf_efcp.list_optimizers()`; None: `args.optim`.
        model: the trained model. With a model, the keyword arguments include its `params`, in groups (see `parameter_groups`)
            that replace the Trainer's own. `optim_target_modules` needs a model.
        decay_names: the parameters with weight decay; None: the default of `parameter_groups`.

    Raises:
        OptionError: unknown name or option, wrong type, value out of range, or an option that contradicts `args`.
    """
    info = get_optimizer_info(name or name_of(args))
    run_options(args, info)
    options = info.check(_given_options(args, info))
    for option, field in _OWN_ARGUMENTS.items():
        if option in options and options[option] != getattr(args, field):
            raise OptionError(
                f"optim_args: {option}={options[option]!r} contradicts {field}={getattr(args, field)!r}; use --{field}"
            )
    own = info.check({option: getattr(args, field) for option, field in _OWN_ARGUMENTS.items()})
    targets = getattr(args, "optim_target_modules", None)
    if targets is not None:
        parse_targets(targets)
    kwargs = {"lr": own["lr"], **optim_defaults(info.name), **options}
    merged = dataclasses.asdict(info.merged(kwargs))
    if config := deepspeed.config_of(args):
        deepspeed.check_config(config, info.cls, merged, options)
    if merged.get("comm") == "factors":
        _check_for_factors(args)
    if model is not None:
        groups = parameter_groups(model, own["weight_decay"], decay_names=decay_names, target_modules=targets)
        if not groups and (frozen := sum(1 for _ in model.parameters())):
            raise OptionError(f"the model has nothing to train: all of its {frozen} parameters are frozen (requires_grad)")
        stage = deepspeed.stage_of(config)
        kwargs["params"] = deepspeed.one_group(groups, stage) if stage else groups
    return info.cls, kwargs


def name_of(args: TrainingArguments) -> str:
    """Give the value of `args.optim` as text."""
    return str(getattr(args.optim, "value", args.optim))


def check_name(args: TrainingArguments) -> None:
    """Raise OptionError for an unknown name that is like one of ours: transformers' error would list all of its own names."""
    from transformers.training_args import OptimizerNames

    ours = next((info for info in all_optimizers() if info.cls is args.optim), None)
    if ours is not None:
        raise OptionError(f"optim={ours.cls.__name__}: give the name of that class, optim={ours.name!r}")
    name = name_of(args)
    known = name in list_optimizers() or name in {member.value for member in OptimizerNames}
    alike = name.startswith(FIELD) or f"{FIELD}{name.lower()}" in list_optimizers()
    if not known and (alike or difflib.get_close_matches(name.lower(), list_optimizers(), cutoff=0.75)):
        get_optimizer_info(name)


def is_ours(args: TrainingArguments) -> bool:
    """Tell whether `args.optim` is a registered name."""
    return name_of(args) in list_optimizers()


def efcp_fields(args: TrainingArguments) -> dict[str, Any]:
    """Give the optimizer's `efcp_...` fields of `args` that are set: option name -> value."""
    set_fields = {n.removeprefix(FIELD): v for n, v in vars(args).items() if n.startswith(FIELD) and v is not None}
    return {name: value for name, value in set_fields.items() if name not in NAMES}


def run_options(args: TrainingArguments, info: OptimizerInfo | None = None) -> RunOptions:
    """Give the options of the run that `args` have, checked. `info`: of the optimizer, if it is not the one that `args` name."""
    if info is None and not is_ours(args):
        return checked(_of_others(args.optim_args), fields_of(args))
    info = info or get_optimizer_info(name_of(args))
    return checked(split(parse_optim_args(args.optim_args), info.options())[0], fields_of(args))


def _of_others(optim_args: Any) -> dict[str, Any]:
    """Give the options of a run that are among another optimizer's options. The other options are not checked here."""
    try:
        given = parse_optim_args(optim_args)
    except OptionError:
        return {}
    return {name: value for name, value in given.items() if name in NAMES}


def check_no_fields(args: TrainingArguments) -> None:
    """Raise OptionError where an `efcp_...` field is set beside the name of another optimizer."""
    without = ["diagnostics_steps"] if run_options(args).diagnostics_steps else []
    if fields := ", ".join(FIELD + option for option in [*efcp_fields(args), *without]):
        raise OptionError(f"{fields}: no effect with optim={name_of(args)}; choose one of {', '.join(list_optimizers())}")


def _given_options(args: TrainingArguments, info: OptimizerInfo) -> dict[str, Any]:
    """Give the options of `optim_args` and of the `efcp_...` fields, which may repeat each other but must not disagree."""
    _, options = split(parse_optim_args(args.optim_args), info.options())
    for option in [option for option in options if option not in info.options()]:
        if having := _having(option):
            raise OptionError(f"optim_args: {option}={options[option]!r}: no option of {info.name}, but of {having}")
    for option, value in efcp_fields(args).items():
        if option not in info.options():
            if having := _having(option):
                raise OptionError(f"{FIELD}{option}={value!r}: no option of {info.name}, but of {having}")
            valid = [FIELD + o for o in info.options() if o not in _OWN_ARGUMENTS]
            valid += [FIELD + o for o in NAMES]
            raise OptionError(unknown_name("field", FIELD + option, valid, info.name))
        try:
            typed_value = info.check({option: value})[option]
        except OptionError as error:
            raise OptionError(FIELD + str(error)) from None
        if option in options and info.check({option: options[option]})[option] != typed_value:
            raise OptionError(
                f"{FIELD}{option}={value!r} contradicts {option}={options[option]!r} in optim_args: give one of them"
            )
        options[option] = value
    return options


def _having(option: str) -> str:
    """Give the names of the optimizers that have an option, with commas between them."""
    return ", ".join(info.name for info in all_optimizers() if option in info.options())


def _check_for_factors(args: TrainingArguments) -> None:
    """Refuse clipping and fp16 with comm="factors": no process has the mean gradient, so its norm and scale are unknown."""
    if getattr(args, "max_grad_norm", None):
        raise OptionError(
            f"comm='factors' with max_grad_norm={args.max_grad_norm!r}: the gradient's norm is not known where only factors are "
            "sent; set max_grad_norm=0 (the update is rescaled by update_rms), or comm='gradients'"
        )
    if getattr(args, "fp16", False):
        raise OptionError(
            "comm='factors' with fp16=True: the factors would be of scaled gradients; use bf16, or comm='gradients'"
        )
