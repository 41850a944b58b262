"""What hf_efcp changes in transformers and accelerate: the table `_PATCHES`, and the code that applies its lines.

transformers has no plug-in mechanism for optimizers. A line is applied as soon as its module has been imported, or at once if the
module already was. So `import hf_efcp` does not import transformers. Names that are not in `list_optimizers()` go to the original
unchanged.

If a future transformers lacks one of the changed parts, a warning names the public way, which needs none of them:
`hf_efcp.optimizer_cls_and_kwargs`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..options import as_text
from ..registry import list_optimizers
from . import deepspeed
from .card import with_optimizer
from .checkpoints import hook_states, load_beside, load_fsdp, save_beside
from .ddp_hook import hook_model, hook_optimizer
from .parsing import named, one_line_for_optim
from .trainer_options import check_name, check_no_fields, is_ours, optimizer_cls_and_kwargs
from .wrapped import answering

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

_warned = False


def register_with_transformers() -> None:
    """Make our names valid for `--optim`, `TrainingArguments` and the stock Trainer. May be called again, also after reloads."""
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_import_hook(f)]
    sys.meta_path.insert(0, _PatchOnImport())
    for name in dict.fromkeys(patch.module for patch in _PATCHES):
        if name in sys.modules:
            _apply(sys.modules[name])


# What is put in the place of an original ------------------------------------------------------------------------------------


def _with_names(names: type[OptimizerNames]) -> type[OptimizerNames]:
    """Add a member to `OptimizerNames` for every registered name: argparse and `TrainingArguments(optim=...)` then accept it."""
    for value in list_optimizers():
        member: Any = names._value2member_map_.get(value)
        if member is None:
            member = _add_member(names, value)
        # Set on the member, not on the class, so that the built-in names keep their own pickling.
        member.__reduce_ex__ = functools.partial(_reduce, value)
    return names


def _add_member(names: Any, value: str) -> Any:
    """Make a new member of the str enum `names`, and enter it wherever Python's enum module (3.10 to 3.13) looks for members."""
    name = value.upper()
    member: Any = str.__new__(names, value)
    member._name_, member._value_, member._sort_order_ = name, value, len(names._member_names_)
    member.__objclass__ = names
    by_name, by_value, order = names._member_map_, names._value2member_map_, names._member_names_
    setattr(names, name, member)  # 3.12+ does not look in _member_map_; an entry there would refuse the setting
    by_name[name] = by_value[value] = member
    order.append(name)
    if hasattr(names, "_hashable_values_"):
        names._hashable_values_.append(value)
    return member


def _reduce(value: str, protocol: int) -> tuple[Callable[[str], OptimizerNames], tuple[str]]:
    return _restore, (value,)


def _restore(value: str) -> OptimizerNames:
    """Unpickle one of our names. To find this function, pickle imports hf_efcp, which registers the name."""
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `TrainingArguments.__post_init__`: a bad `--optim_args` then fails before any data or model is loaded."""

    def __post_init__(self: TrainingArguments, *args: Any, **kwargs: Any) -> None:
        check_name(self)
        original(self, *args, **kwargs)
        if is_ours(self):
            optimizer_cls_and_kwargs(self)
            if isinstance(self.optim_args, dict):  # to_json_string, which reporters call, cannot write a dtype
                self.optim_args = {k: as_text(v) if isinstance(v, torch.dtype) else v for k, v in self.optim_args.items()}
        else:
            check_no_fields(self)

    return __post_init__


def _answered(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer.get_optimizer_cls_and_kwargs`: our parser of `optim_args` comes before its own, which fails on JSON."""

    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: torch.nn.Module | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        if is_ours(args):
            return optimizer_cls_and_kwargs(args, model=model, decay_names=_decay_names(model))
        return original(args, model, *rest, **kwargs)

    return get_optimizer_cls_and_kwargs


def _decay_names(model: torch.nn.Module | None) -> list[str] | None:
    """Give the names that the Trainer decays. Without an instance, a subclass's rule is unknown here (EFCPTrainer knows it)."""
    from transformers.trainer import Trainer

    rule: Callable[..., list[str]] = Trainer.get_decay_parameter_names  # it does not look at its instance
    return None if model is None else rule(None, model)


def _handled(handlers: dict[str, Any]) -> dict[str, Any]:
    """Add our names to `_OPTIMIZER_HANDLERS`, for other code that looks there. `_answered` is for the Trainer itself."""
    handlers.update(dict.fromkeys(list_optimizers(), _handler))
    return handlers


def _handler(context: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return optimizer_cls_and_kwargs(context.args, model=context.model, decay_names=_decay_names(context.model))


def _hooked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Accelerator.prepare_optimizer` for checkpoints and for comm="factors"."""
    return hook_optimizer(hook_states(original))


def _with_callbacks(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Trainer.__init__`: a Trainer then has the callbacks that its arguments ask for."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from .callback import add_callbacks  # needs the Trainer

        add_callbacks(self)

    return __init__


# The table ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Patch:
    """A private part that is changed.

    Attributes:
        module: the module that has the part.
        path: the names of attributes that lead to the part from there, with dots between them.
        wrapper: original -> replacement; or the original, changed in place.
        static: whether the original is a static method. If this is wrong, nothing is changed.
        optional: whether the part may be absent.
    """

    module: str
    path: str
    wrapper: Callable[[Any], Any]
    static: bool = False
    optional: bool = False


_PATCHES = (
    _Patch("transformers.training_args", "OptimizerNames", _with_names),
    _Patch("transformers.training_args", "TrainingArguments.__post_init__", _checked),
    _Patch("transformers.hf_argparser", "HfArgumentParser.parse_args_into_dataclasses", named, optional=True),
    _Patch("transformers.hf_argparser", "HfArgumentParser.parse_dict", named, optional=True),
    _Patch("transformers.hf_argparser", "HfArgumentParser.error", one_line_for_optim, optional=True),
    _Patch("trl.scripts._hf_argparser", "HfArgumentParser.parse_args_into_dataclasses", named, optional=True),
    _Patch("trl.scripts._hf_argparser", "HfArgumentParser.error", one_line_for_optim, optional=True),
    _Patch("transformers.trainer", "Trainer.get_optimizer_cls_and_kwargs", _answered, static=True),
    _Patch("transformers.trainer", "Trainer.__init__", _with_callbacks),
    _Patch("transformers.trainer", "Trainer._save_optimizer_and_scheduler", save_beside),
    _Patch("transformers.trainer", "Trainer._load_optimizer_and_scheduler", load_beside),
    _Patch("transformers.trainer", "load_fsdp_optimizer", load_fsdp),
    _Patch("transformers.trainer_optimizer", "_OPTIMIZER_HANDLERS", _handled, optional=True),  # transformers 5
    _Patch("transformers.modelcard", "extract_hyperparameters_from_trainer", with_optimizer, optional=True),
    _Patch("accelerate.accelerator", "Accelerator.prepare_optimizer", _hooked),
    _Patch("accelerate.optimizer", "AcceleratedOptimizer", answering),
    _Patch("accelerate.accelerator", "Accelerator.prepare_model", hook_model),
    _Patch("accelerate.accelerator", "Accelerator._prepare_deepspeed", deepspeed.prepare),
    _Patch("accelerate.accelerator", "load_fsdp_optimizer", load_fsdp),
)


# How the table is applied ---------------------------------------------------------------------------------------------------


def _apply(module: ModuleType) -> None:
    """Apply the table's lines for a module that has been executed."""
    try:
        for patch in _PATCHES:
            if patch.module == module.__name__:
                _replace(module, patch)
    except (AttributeError, KeyError, TypeError) as error:
        _warn_unsupported(f"{module.__name__}: {error}")


def _replace(module: ModuleType, patch: _Patch) -> None:
    """Put the wrapped original in its place. A wrapper of ours that is already there is replaced, not wrapped again."""
    *parents, name = patch.path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent, None)
    if patch.optional and not hasattr(owner, name):
        return
    current = getattr(owner, name)
    if isinstance(inspect.getattr_static(owner, name), staticmethod) != patch.static:
        raise TypeError(f"{patch.path} is {'no' if patch.static else 'a'} static method")
    original = getattr(current, "_hf_efcp_original", current)
    new = patch.wrapper(original)
    if new is original:
        return
    functools.update_wrapper(new, original)
    new._hf_efcp_original = original
    setattr(owner, name, staticmethod(new) if patch.static else new)


def _warn_unsupported(reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"hf_efcp cannot register its optimizers with this version of transformers ({reason}): `--optim efcp_...` may "
        "not work. Use Trainer(optimizer_cls_and_kwargs=hf_efcp.optimizer_cls_and_kwargs(args)), with the name as a second "
        "argument where TrainingArguments refuses it.",
        stacklevel=2,
    )


def _is_import_hook(finder: object) -> bool:
    # Compared by name: after a reload of this module, an installed finder has another class.
    return (type(finder).__module__, type(finder).__name__) == (__name__, "_PatchOnImport")


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Finds the modules of `_PATCHES` by the other finders, and patches a module after it was executed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See importlib. None unless the table has lines for the module."""
        if all(patch.module != fullname for patch in _PATCHES):
            return None
        others = (f for f in sys.meta_path if hasattr(f, "find_spec") and not _is_import_hook(f))
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                _apply(module)

            # Only this loader is changed: a loader of another class would lose the source, the cache and the resources.
            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec
