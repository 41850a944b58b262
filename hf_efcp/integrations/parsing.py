"""Errors of HfArgumentParser and EFCPTrainingArguments for unknown arguments: they say where the option belongs, or its name."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection
from typing import Any

from ..options import OptionError, unknown_name
from ..registry import all_optimizers
from .run_options import FIELD, NAMES


def named(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `HfArgumentParser.parse_args_into_dataclasses` or `parse_dict`: an unused argument that is ours is explained."""

    @functools.wraps(original)
    def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except ValueError as error:
            fields = {field.name for kind in self.dataclass_types for field in dataclasses.fields(kind)}
            given = next((value for value in (*args, *kwargs.values()) if value is not None), sys.argv)
            if not isinstance(error, OptionError) and "not used by the HfArgumentParser" in str(error) and FIELD in str(given):
                unused = re.findall(r"'(-*[\w-]+=?)", str(error))
                refuse_unknown([name for name in unused if name.startswith("-") or not name.isdigit()], fields)
            raise

    return parse


def one_line_for_optim(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `error` of a parser: an unknown name for --optim ends the program with one line that has the nearest name.

    argparse's own answer has 126 lines of usage.
    """

    def error(parser: argparse.ArgumentParser, message: str) -> Any:
        unknown = re.match(r"argument --optim: invalid choice: '([^']*)'", message)
        if unknown is None:
            return original(parser, message)
        choices = next((action.choices for action in parser._actions if action.dest == "optim"), None) or ()
        valid = [str(getattr(choice, "value", choice)) for choice in choices]
        near = difflib.get_close_matches(unknown[1], valid, n=1)
        ours = ", ".join(name for name in valid if name.startswith(FIELD))
        meant = f"did you mean {near[0]}? " if near else ""
        parser.exit(2, f"error: --optim {unknown[1]}: no such name: {meant}hf_efcp has {ours}; transformers' own: --help\n")

    return error


def refuse_unknown(names: Collection[str], fields: Collection[str]) -> None:
    """Raise OptionError for the first name that is, or is meant to be, an option of ours.

    Args:
        names: names that the arguments do not have. Names from the command line have dashes, and "=" if a value follows.
        fields: names that the arguments have.
    """
    options = {option for info in all_optimizers() for option in info.options()} | {*NAMES}
    typed = {field for field in fields if field.startswith(FIELD)}
    for given in names:
        name = given.lstrip("-").rstrip("=")
        option = name.removeprefix(FIELD)
        if given == f"{name}=" and name in options:
            raise OptionError(f"{name}=...: --optim_args takes one text: put commas between options, as in rank=4,window_size=32")
        if name.startswith(FIELD) and typed:
            raise OptionError(unknown_name("field", name, sorted(typed)))
        if name.startswith(FIELD) and option not in options:
            raise OptionError(f"{name}: {unknown_name('option', option, sorted(options))}")
        if name.startswith(FIELD) or name in options:
            where = f"give {FIELD}{option}" if typed else f"give --optim_args {option}=VALUE, or use EFCPTrainingArguments"
            raise OptionError(f"{name}: these training arguments have no such field: {where}")
