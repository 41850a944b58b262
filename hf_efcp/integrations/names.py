"""Everything that hf_efcp needs of transformers' private parts, in this one file.

transformers has no plug-in mechanism for optimizers. Five things are changed, each as soon as its module is imported
(at once, if it already was), so that `import hf_efcp` itself does not pay for importing transformers:

- `training_args.OptimizerNames` gains our names, in place: argparse and `TrainingArguments(optim=...)` accept them;
- `TrainingArguments.__post_init__` ends with a check of our options: a bad `--optim_args` fails there, before any data
  or model is loaded, and in `Trainer.create_optimizer` if the arguments were changed in between;
- `Accelerator.prepare_model` and `prepare_optimizer` give DDP the hook of comm="factors" (communication.py);
- `Trainer._save_optimizer_and_scheduler`, `_load_...` and `Accelerator.prepare_optimizer` keep sharded state too
  (checkpoints.py), as does `load_fsdp_optimizer` under FSDP2; `Accelerator._prepare_deepspeed` refuses what cannot be right
  (deepspeed.py);
- `Trainer.get_optimizer_cls_and_kwargs` (and 5.x's `_OPTIMIZER_HANDLERS`) answers for our names. It does so before
  transformers parses `optim_args`, because that parser fails on JSON and on a trailing comma. Any other name goes to
  the original, untouched.

Where a future transformers lacks these, one warning names the public way, which needs none of them:
`optimizer_cls_and_kwargs`.
"""

from __future__ import annotations

import functools
import importlib.abc
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from ..groups import parameter_groups, parse_targets
from ..options import OptionError, as_text, unknown_name
from ..registry import OptimizerInfo, get_optimizer_info, list_optimizers, parse_optim_args
from . import deepspeed
from .checkpoints import hook_states, load_beside, load_fsdp, save_beside
from .ddp_hook import hook_model, hook_optimizer

# Options that are also arguments of their own: name in optim_args -> field of TrainingArguments.
_OWN_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
# Fields of EFCPTrainingArguments: this and the option's name.
FIELD = "efcp_"

_warned = False


def register_with_transformers() -> None:
    """Make our names valid for `--optim`, `TrainingArguments` and the stock Trainer. Idempotent; survives reloads."""
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_ours(f)]
    sys.meta_path.insert(0, _PatchOnImport())
    for name in _PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])


def optimizer_cls_and_kwargs(
    args: Any, name: str | None = None, model: torch.nn.Module | None = None, decay_names: Iterable[str] | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the class and its keyword arguments, every option checked.

    The Trainer calls this by itself for a registered name. By hand it needs nothing private of transformers.

    Args:
        args: the TrainingArguments, of which only what concerns the optimizer is read.
        name: one of `hf_efcp.list_optimizers()`; None: `args.optim`.
        model: what is trained: the keyword arguments then include its `params`, in groups (see `parameter_groups`), which
            replace the Trainer's own. `optim_target_modules` needs it.
        decay_names: the parameters with weight decay; None: as `parameter_groups` has it.

    Raises:
        OptionError: unknown name or option, wrong type, value out of range, or an option that contradicts `args`.
    """
    info = get_optimizer_info(name or name_of(args))
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
    kwargs = {"lr": own["lr"], **info.defaults(options), **options}
    if config := deepspeed.config_of(args):
        deepspeed.check_config(config, info.cls, kwargs)
    if kwargs.get("comm") == "factors":
        _check_for_factors(args)
    if model is not None:
        groups = parameter_groups(model, own["weight_decay"], decay_names=decay_names, target_modules=targets)
        stage = deepspeed.stage_of(config)
        kwargs["params"] = deepspeed.one_group(groups, stage) if stage else groups
    return info.cls, kwargs


def _check_for_factors(args: Any) -> None:
    """With comm="factors" no process ever has the gradient: its norm is not known, and it is not unscaled."""
    if getattr(args, "max_grad_norm", None):
        raise OptionError(
            f"comm='factors' with max_grad_norm={args.max_grad_norm!r}: the gradient's norm is not known where only factors are "
            "sent; set max_grad_norm=0 (the update is rescaled by update_rms), or comm='gradients'"
        )
    if getattr(args, "fp16", False):
        raise OptionError(
            "comm='factors' with fp16=True: the factors would be of scaled gradients; use bf16, or comm='gradients'"
        )


def _given_options(args: Any, info: OptimizerInfo) -> dict[str, Any]:
    """The options of `optim_args` and of the `efcp_...` fields, which may repeat but not contradict each other."""
    options = parse_optim_args(args.optim_args)
    for option in [option for option in options if option not in info.options()]:
        having = [n for n in list_optimizers() if option in get_optimizer_info(n).options()]
        if having:
            raise OptionError(f"optim_args: {option}={options[option]!r}: no option of {info.name}, but of {', '.join(having)}")
    for option, value in efcp_fields(args).items():
        if option not in info.options():
            having = [n for n in list_optimizers() if option in get_optimizer_info(n).options()]
            if not having:
                valid = [FIELD + o for o in info.options() if o not in _OWN_ARGUMENTS]
                raise OptionError(unknown_name("field", FIELD + option, valid, info.name))
            raise OptionError(f"{FIELD}{option}={value!r}: no option of {info.name}, but of {', '.join(having)}")
        typed_value = info.check({option: value})[option]
        if option in options and info.check({option: options[option]})[option] != typed_value:
            raise OptionError(
                f"{FIELD}{option}={value!r} contradicts {option}={options[option]!r} in optim_args: give one of them"
            )
        options[option] = value
    return options


def efcp_fields(args: Any) -> dict[str, Any]:
    """Option name -> value of the `efcp_...` fields of `args` that are set."""
    set_fields = {n: v for n, v in vars(args).items() if n.startswith(FIELD) and v is not None}
    return {name.removeprefix(FIELD): value for name, value in set_fields.items()}


def name_of(args: Any) -> str:
    """The value of `args.optim` as text."""
    return str(getattr(args.optim, "value", args.optim))


def is_ours(args: Any) -> bool:
    """Whether `args.optim` is one of our names."""
    return name_of(args) in list_optimizers()


def _is_ours(finder: Any) -> bool:
    # By name: after a reload of this module the class of an installed finder is another one.
    return (type(finder).__module__, type(finder).__name__) == (__name__, "_PatchOnImport")


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Finds the modules of `_PATCHES` as the other finders do, and patches them when they have been executed."""

    def find_spec(self, fullname, path=None, target=None):
        """See importlib: None unless the module is one of ours to patch."""
        if fullname not in _PATCHES:
            return None
        others = (f for f in sys.meta_path if hasattr(f, "find_spec") and not _is_ours(f))
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module):
                execute(module)
                _patch(module)

            spec.loader.exec_module = execute_and_patch
        return spec


def _patch(module: Any) -> None:
    try:
        _PATCHES[module.__name__](module)
    except (AttributeError, KeyError, TypeError) as error:
        _warn_unsupported(f"{module.__name__}: {error}")


def _warn_unsupported(reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"hf_efcp cannot register its optimizers with this version of transformers ({reason}): `--optim efcp_...` may "
        "not work. Use Trainer(optimizer_cls_and_kwargs=hf_efcp.integrations.names.optimizer_cls_and_kwargs(args)), "
        "with the name as a second argument where TrainingArguments refuses it.",
        stacklevel=2,
    )


def _patch_training_args(module: Any) -> None:
    names = module.OptimizerNames
    maps = names._member_map_, names._value2member_map_, names._member_names_
    for value in list_optimizers():
        member = names._value2member_map_.get(value)
        if member is None:
            member = _add_member(names, value, *maps)
        # On the member, not the class: the built-in names keep their own pickling.
        member.__reduce_ex__ = functools.partial(_reduce, value)

    _replace(module.TrainingArguments, "__post_init__", _checked_post_init)


def _add_member(names: Any, value: str, by_name: dict, by_value: dict, order: list) -> Any:
    """A new member of the str enum `names`, entered wherever Python's enum module (3.10 to 3.13) looks for members."""
    name = value.upper()
    member = str.__new__(names, value)
    member._name_, member._value_, member._sort_order_ = name, value, len(order)
    member.__objclass__ = names
    setattr(names, name, member)  # 3.12+ has no lookup in _member_map_; once it is there, setting it is refused
    by_name[name] = by_value[value] = member
    order.append(name)
    if hasattr(names, "_hashable_values_"):
        names._hashable_values_.append(value)
    return member


def _reduce(value: str, protocol: int) -> tuple:
    return _restore, (value,)


def _restore(value: str) -> Any:
    """Unpickle one of our names: finding this function imports hf_efcp, which registers it."""
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


def _replace(owner: Any, name: str, make: Any, kind: Any = lambda function: function) -> None:
    """`owner.name = kind(make(original))`; a version of ours that is already there is replaced, not wrapped again."""
    current = getattr(owner, name)
    original = getattr(current, "_hf_efcp_original", current)
    new = functools.wraps(original)(make(original))
    new._hf_efcp_original = original
    setattr(owner, name, kind(new))


def _checked_post_init(original: Any) -> Any:
    def __post_init__(self, *args, **kwargs):
        if name_of(self).startswith("efcp_"):  # transformers would list all of its own
            get_optimizer_info(name_of(self))
        original(self, *args, **kwargs)
        if is_ours(self):
            optimizer_cls_and_kwargs(self)
            if isinstance(self.optim_args, dict):  # to_json_string, which reporters call, cannot write a dtype
                self.optim_args = {k: as_text(v) if isinstance(v, torch.dtype) else v for k, v in self.optim_args.items()}
        elif efcp_fields(self):
            fields = ", ".join(FIELD + option for option in efcp_fields(self))
            raise OptionError(f"{fields}: no effect with optim={name_of(self)}; choose one of {', '.join(list_optimizers())}")

    return __post_init__


def _patch_trainer(module: Any) -> None:
    name = "get_optimizer_cls_and_kwargs"
    if not isinstance(vars(module.Trainer)[name], staticmethod):
        raise TypeError(f"Trainer.{name} is no static method")
    _replace(module.Trainer, name, _dispatch, staticmethod)
    _replace(module.Trainer, "_save_optimizer_and_scheduler", save_beside)
    _replace(module.Trainer, "_load_optimizer_and_scheduler", load_beside)
    _replace(module, "load_fsdp_optimizer", load_fsdp)


def _dispatch(original: Any) -> Any:
    def get_optimizer_cls_and_kwargs(args, model=None, *rest, **kwargs):
        if is_ours(args):
            return optimizer_cls_and_kwargs(args, model=model, decay_names=_decay_names(model))
        return original(args, model, *rest, **kwargs)

    return get_optimizer_cls_and_kwargs


def _decay_names(model: torch.nn.Module | None) -> list[str] | None:
    """What the Trainer decays; it passes no instance, so that a subclass's own rule is not known here (EFCPTrainer knows it)."""
    from transformers.trainer import Trainer

    return None if model is None else Trainer.get_decay_parameter_names(None, model)


def _patch_trainer_optimizer(module: Any) -> None:
    # Only for code that looks here: the Trainer itself is dispatched above.
    getattr(module, "_OPTIMIZER_HANDLERS", {}).update(dict.fromkeys(list_optimizers(), _handler))


def _handler(context: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return optimizer_cls_and_kwargs(context.args, model=context.model, decay_names=_decay_names(context.model))


def _patch_accelerator(module: Any) -> None:
    _replace(module.Accelerator, "prepare_optimizer", lambda original: hook_optimizer(hook_states(original)))
    _replace(module.Accelerator, "prepare_model", hook_model)
    _replace(module.Accelerator, "_prepare_deepspeed", deepspeed.prepare)
    _replace(module, "load_fsdp_optimizer", load_fsdp)


_PATCHES = {
    "transformers.training_args": _patch_training_args,
    "transformers.trainer": _patch_trainer,
    "transformers.trainer_optimizer": _patch_trainer_optimizer,  # 5.x only
    "accelerate.accelerator": _patch_accelerator,
}
