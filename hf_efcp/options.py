"""How an option is declared, read and checked: one place for name, type, default, range and help.

Options are fields of dataclasses. A field reaches four users: the constructors (validation and signature), `--optim_args` (text
to typed values), the command line's listing, and checkpoints (what a run was made with).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

# fp16 is left out: squares of gradients leave its range.
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


# What options are called elsewhere.
OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay"}
_OTHER_OPTIONS = {**OTHER_NAMES, "betas": "window_momentum"}
# Arguments of torch's optimizers that ours do not have, and what to do instead.
_NOT_OURS = {
    "foreach": "leave it out: there is one implementation, which chooses kernels by device",
    "fused": "leave it out: there is one implementation, which chooses kernels by device",
    "capturable": "leave it out: steps on one GPU are a CUDA graph without it, if the model is small",
    "differentiable": "a window that is written in place cannot be differentiated through",
    "maximize": "negate the loss instead",
    "amsgrad": "it has no meaning without Adam's second moment",
}


class OptionError(ValueError):
    """A bad option: its message names the option, the value, what is allowed and the nearest valid name."""


def option(
    default: Any,
    help: str,
    *,
    allowed: str = "",
    check: Callable[[Any], bool] | None = None,
    choices: tuple[Any, ...] = (),
    parse: Callable[[str, Any], Any] | None = None,
    instead_of: str = "",
) -> Any:
    """A dataclass field with its help text and its range. It is typed Any, so that `rank: int = option(4, ...)` has a type.

    Args:
        default: the class default.
        help: one line, used by `--help`, by the listing and by the docs.
        allowed: the range in words, for the error message.
        check: predicate on the typed value; None values are not checked.
        choices: the allowed values, instead of `check`.
        parse: (name, value from Python or text) -> value, where the value's type does not say how to read it.
        instead_of: another option that is the same thing under another name: who gives one has decided on both.
    """
    if choices:
        allowed = " or ".join(str(c).removeprefix("torch.") for c in choices)
        check = choices.__contains__
    metadata = {"help": help, "allowed": allowed, "check": check, "parse": parse, "instead_of": instead_of}
    return dataclasses.field(default=default, metadata=metadata)


def as_text(value: object) -> str:
    """A value as one would type it in --optim_args."""
    text = str(value).removeprefix("torch.")
    return "none" if value is None else text.lower() if isinstance(value, bool) else text


def described(field: dataclasses.Field) -> str:
    """An option's help with its range, in one line."""
    allowed = field.metadata["allowed"]
    return field.metadata["help"] + (f" [{allowed}]" if allowed else "")


def positive(x: float) -> bool:
    """x > 0 and finite."""
    return 0 < x < math.inf


def non_negative(x: float) -> bool:
    """x >= 0 and finite."""
    return 0 <= x < math.inf


def fraction(x: float) -> bool:
    """0 <= x < 1."""
    return 0 <= x < 1


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{i}b": (1024 if i else 1000) ** n for n, letter in enumerate("kmgt", 1) for i in ("", "i")}


def parse_bytes(name: str, value: Any) -> Any:
    """A number of bytes, from `2GiB`, `500 MB`, `1e9` or a number of Python's; None and the texts for it stay as they are.

    Raises:
        OptionError: anything else, and what is less than a byte or infinite.
    """
    if _means_none(value):
        return value
    try:
        number, unit = value, ""
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([a-z]*)\s*", value.lower())
            if match is None:
                raise ValueError
            number, unit = float(match[1]), match[2]
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        if (size := int(number * _UNITS[unit])) >= 1:
            return size
    except (KeyError, ValueError, OverflowError):
        pass
    raise OptionError(f"{name}={value!r}: expected bytes (2GiB), a number >= 1 alone or with KB, MB, GB, KiB, MiB or GiB")


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """What may differ between parameter groups."""

    lr: float = option(1e-4, "learning rate", allowed="a finite number >= 0", check=non_negative)
    weight_decay: float = option(
        0.0, "weight decay; weight_decay_mode says how it acts", allowed="a finite number >= 0", check=non_negative
    )


@dataclasses.dataclass(frozen=True)
class ParamGroupOptions(GroupOptions):
    """What a parameter group may set."""

    compress: bool = option(True, "false: this group's tensors are not compressed: they enter the window whole, or have AdamW")


def _means_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, from Python or from text; raises OptionError where it does not fit.

    Text: `none` or `null` for None, `true`/`false`/`1`/`0` for booleans, `1e-3` for floats, `bf16` or `bfloat16` for dtypes.
    """
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or (_means_none(value) and kinds != (str,)):
        if type(None) in kinds:
            return None
        raise OptionError(f"{name}={value!r}: a value is needed")
    kind = next(k for k in kinds if k is not type(None))
    text = value.strip() if isinstance(value, str) else None
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[(text or "").lower()]
        if kind is torch.dtype:
            return value if isinstance(value, torch.dtype) else _DTYPES[(text or "").lower().removeprefix("torch.")]
        if kind is str:
            if text is None:
                raise TypeError
            return text
        if isinstance(value, bool | bytes | bytearray):  # float takes them all
            raise TypeError
        if kind is int:
            if text is None and (not hasattr(value, "__index__")):
                raise TypeError
            return int(value if text is None else text)
        if kind is float:
            return float(value)
    except (KeyError, TypeError, ValueError):
        pass
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(kind)
    wanted = wanted or "one of " + ", ".join(_DTYPES)
    raise OptionError(f"{name}={value!r}: expected {wanted}" + (" or none" if type(None) in kinds else ""))


def decided(options_type: type, given: Iterable[str]) -> set[str]:
    """Name the options that the given ones decide on: themselves, and those that are the same under another name."""
    pairs = [(f.name, f.metadata["instead_of"]) for f in dataclasses.fields(options_type)]
    given = set(given)
    return given | {b for a, b in pairs if a in given and b} | {a for a, b in pairs if b in given}


def unknown_name(kind: str, name: str, valid: Iterable[str], owner: str = "") -> str:
    """The message for an unknown name: what was given, the nearest valid name, all valid names."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name).lower(), valid, n=1, cutoff=0.6)
    near = [_OTHER_OPTIONS[str(name)]] if _OTHER_OPTIONS.get(str(name)) in valid else near
    hint = f"did you mean {near[0]!r}? " if near else ""
    hint = f"{_NOT_OURS[name]}; " if kind == "option" and name in _NOT_OURS else hint
    where = f" for {owner}" if owner else ""
    return f"unknown {kind} {name!r}{where}: {hint}valid: {', '.join(valid)}"


def field_types(options_type: type) -> dict[str, Any]:
    """Field name -> resolved annotation."""
    hints = typing.get_type_hints(options_type)
    return {f.name: hints[f.name] for f in dataclasses.fields(options_type)}


def build(options_type: type, given: Mapping[str, Any], owner: str) -> Any:
    """An instance of `options_type` from Python or text values, every one checked.

    Raises:
        OptionError: unknown name, wrong type or value out of range.
    """
    hints, fields = field_types(options_type), {f.name: f for f in dataclasses.fields(options_type)}
    values = {}
    for name, value in given.items():
        if name not in hints:
            raise OptionError(unknown_name("option", name, hints, owner))
        parse, allowed = (fields[name].metadata[key] for key in ("parse", "allowed"))
        value = parse(name, value) if parse else value
        try:
            values[name] = typed(name, value, hints[name])
        except OptionError as error:
            raise OptionError(f"{error} ({allowed})" if allowed else str(error)) from None
    result = options_type(**values)
    for field in dataclasses.fields(options_type):
        value, check = getattr(result, field.name), field.metadata["check"]
        if check is not None and value is not None and not check(value):
            allowed = field.metadata["allowed"]
            near = difflib.get_close_matches(value, allowed.split(" or "), n=1) if isinstance(value, str) else []
            raise OptionError(f"{field.name}={value!r}: must be {allowed}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return result
