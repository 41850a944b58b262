"""TrainingArguments with a typed field for every option of every optimizer: `--efcp_rank 8` instead of optim_args."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..options import as_text, described
from ..registry import all_optimizers, optim_defaults
from .parsing import refuse_unknown
from .run_options import FIELD, RunOptions
from .trainer_options import efcp_fields

# EFCPFields is a mixin beside a subclass of TrainingArguments. The type checker takes it for a TrainingArguments.
if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


def _fields() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of every option of the optimizers and of a run. The default None means that it is not given."""
    users: dict[str, list[str]] = {}
    defaults: dict[str, list[str]] = {}
    options: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    for info in all_optimizers():
        hints, start = typing.get_type_hints(info.cls.options_type), info.merged(optim_defaults(info.name))
        for field in dataclasses.fields(info.cls.options_type):
            users.setdefault(field.name, []).append(info.name)
            options.setdefault(field.name, (hints[field.name], field))
            defaults.setdefault(field.name, []).append(as_text(getattr(start, field.name)))
    result: list[tuple[str, Any, Any]] = []
    for option, (hint, field) in options.items():
        names = "" if len(users[option]) == len(all_optimizers()) else f" ({', '.join(users[option])})"
        text = f"{described(field)}{names}; unless given: {' or '.join(dict.fromkeys(defaults[option]))}"
        kind = hint if hint in (int, float, bool) else str  # "none" and dtypes are text
        result.append((FIELD + option, kind | types.NoneType, dataclasses.field(default=None, metadata={"help": text})))
    hints = typing.get_type_hints(RunOptions)
    for field in dataclasses.fields(RunOptions):
        kind = hints[field.name] | types.NoneType
        result.append((FIELD + field.name, kind, dataclasses.field(default=None, metadata={"help": described(field)})))
    return result


def _with_fields(cls: type[_Base]) -> type[_Base]:
    """Make `cls` a dataclass with a field for every option."""
    cls.__annotations__ = {name: kind for name, kind, _ in _fields()}
    for name, _, field in _fields():
        setattr(cls, name, field)
    return dataclasses.dataclass(cls)


@_with_fields
class EFCPFields(_Base):
    """Only the fields, for other subclasses of TrainingArguments: `@dataclass class Config(EFCPFields, SFTConfig)`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse a misspelt field, and name the nearest one, which Python's own error does not."""
        fields = [field.name for field in dataclasses.fields(cls)]
        refuse_unknown([name for name in kwargs if name not in fields], fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option, value in efcp_fields(self).items():
            if isinstance(value, torch.dtype):  # to_json_string, which reporters call, cannot write a dtype
                setattr(self, FIELD + option, str(value).removeprefix("torch."))
        super().__post_init__()


@dataclasses.dataclass
class EFCPTrainingArguments(EFCPFields, TrainingArguments):
    """TrainingArguments with `optim="efcp_lowrank_mfac"` and a field `efcp_OPTION` for every option.

    A field that is not given has the `--optim` default (`hf-efcp list --options`). Options may be given in `optim_args` instead.

    Raises:
        OptionError: a bad value, a field that the chosen optimizer does not have, or a field that contradicts `optim_args`.
    """

    optim: OptimizerNames | str = dataclasses.field(
        default="efcp_lowrank_mfac", metadata={"help": "The optimizer: hf_efcp's or any of transformers'."}
    )
