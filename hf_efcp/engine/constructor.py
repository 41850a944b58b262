"""Constructors of optimizers, where each option is a typed argument; and group defaults that refuse a schedule of momentum."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..options import OptionError, field_types
from .asked import say


class Defaults(dict[str, Any]):
    """The defaults of parameter groups. A schedule that looks here for a momentum to vary gets an OptionError: there is none."""

    def __contains__(self, key: object) -> bool:
        """Tell whether groups have the key. torch's OneCycleLR and CyclicLR ask for momentum; their own error has no remedy."""
        if key in ("momentum", "betas") and sys._getframe(1).f_globals.get("__name__") == "torch.optim.lr_scheduler":
            raise OptionError(
                "cycle_momentum=True: here momentum is an option of the whole optimizer, and no schedule varies it: pass "
                "cycle_momentum=False"
            )
        return super().__contains__(key)


def constructor(init: Callable[..., None], cls: type, options_type: type) -> Callable[..., None]:
    """Give the `__init__` of `cls`: its signature spells out the options that `init` takes as `**options`.

    help(), editors, and programs that make command lines from constructors (jsonargparse) read the signature. Bytes and dtypes
    may be given as text too, because no such program can parse them.
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
    """Leave out defaults filled in by a program that always gives all arguments, such as LightningCLI.

    Each default would count as given, and no preset, budget or checkpoint could set any option.
    """
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    left = {n: v for n, v in kwargs.items() if n not in defaults or v != defaults[n]}
    if left.get("preset") or left.get("memory_budget"):
        say(f"{name}: all options are given, as by a program that fills in the defaults: those with a default count as not given")
    return left
