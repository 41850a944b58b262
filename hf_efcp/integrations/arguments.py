"""TrainingArguments with a typed field for every option of every optimizer: `--efcp_rank 8` instead of optim_args."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..options import as_text, described
from ..registry import get_optimizer_info, list_optimizers
from .names import FIELD, efcp_fields


def _fields() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of every option but those that TrainingArguments has itself; None means not given."""
    users: dict[str, list[str]] = {}
    defaults: dict[str, list[str]] = {}
    found: dict[str, tuple[Any, dataclasses.Field]] = {}
    for name in list_optimizers():
        info = get_optimizer_info(name)
        hints = typing.get_type_hints(info.cls.options_type)
        for field in dataclasses.fields(info.cls.options_type):
            users.setdefault(field.name, []).append(name)
            found.setdefault(field.name, (hints[field.name], field))
            default = as_text(info.hf_defaults.get(field.name, field.default))
            defaults.setdefault(field.name, []).append(default)
    result = []
    for option, (hint, field) in found.items():
        names = "" if len(users[option]) == len(list_optimizers()) else f" ({', '.join(users[option])})"
        text = f"{described(field)}{names}; unless given: {' or '.join(dict.fromkeys(defaults[option]))}"
        kind = hint if hint in (int, float, bool) else str  # "none" and dtypes are text
        result.append((FIELD + option, kind | types.NoneType, dataclasses.field(default=None, metadata={"help": text})))
    return result


def _dtypes_as_text(self) -> None:
    for option, value in efcp_fields(self).items():
        if isinstance(value, torch.dtype):  # to_json_string, which reporters call, cannot write it
            setattr(self, FIELD + option, str(value).removeprefix("torch."))
    super(EFCPFields, self).__post_init__()


# The fields alone, for other subclasses of TrainingArguments: `class Config(EFCPFields, SFTConfig)`, decorated by dataclass.
EFCPFields = dataclasses.make_dataclass(
    "EFCPFields", _fields(), namespace={"__module__": __name__, "__post_init__": _dtypes_as_text}
)


@dataclasses.dataclass
class EFCPTrainingArguments(EFCPFields, TrainingArguments):
    """TrainingArguments with `optim="efcp_lowrank_mfac"` and a field `efcp_OPTION` for every option.

    A field that is not given has the `--optim` default (`hf-efcp list --options`). It may be given in `optim_args` instead.

    Raises:
        OptionError: a bad value, a field that the chosen optimizer does not have, or one that contradicts `optim_args`.
    """

    optim: OptimizerNames | str = dataclasses.field(
        default="efcp_lowrank_mfac", metadata={"help": "The optimizer: hf_efcp's or any of transformers'."}
    )
