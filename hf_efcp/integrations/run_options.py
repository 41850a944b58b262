"""Options of a run, not of its optimizer: log diagnostics, write a report. They are given where the optimizer's options are."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from ..options import OptionError, build, option, unknown_name

# The prefix of an option's field in EFCPTrainingArguments.
FIELD = "efcp_"
DIAGNOSTICS_STEPS = 100


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run."""

    diagnostics_steps: int | None = option(
        None,
        f"log all diagnostics of the optimizer every so many steps, and of the last one; 0: those that cost nothing; "
        f"EFCPTrainer: {DIAGNOSTICS_STEPS}, the stock Trainer: no diagnostics",
        allowed="an integer >= 0",
        check=lambda steps: steps >= 0,
    )
    report: bool = option(
        False, "record the run in efcp_run.json and write its report, report.html, into output_dir (needs matplotlib)"
    )


NAMES = tuple(field.name for field in dataclasses.fields(RunOptions))


def split(given: Mapping[str, Any], others: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the options of a run from the optimizer's.

    Args:
        given: option -> value, of both.
        others: the names of the optimizer's options.

    Raises:
        OptionError: an unknown name that is nearest to an option of a run.
    """
    for name in given.keys() - {*others, *NAMES}:
        if (near := difflib.get_close_matches(name, [*others, *NAMES], n=1)) and near[0] in NAMES:
            raise OptionError(unknown_name("option", name, [*others, *NAMES]))
    own = {name: value for name, value in given.items() if name in NAMES}
    return own, {name: value for name, value in given.items() if name not in NAMES}


def fields_of(args: Any) -> dict[str, Any]:
    """Give the options of a run that are set in fields of the training arguments."""
    there = {name: getattr(args, FIELD + name, None) for name in NAMES}
    return {name: value for name, value in there.items() if value is not None}


def checked(in_optim_args: Mapping[str, Any], in_fields: Mapping[str, Any]) -> RunOptions:
    """Give the options of a run from both places, checked.

    Raises:
        OptionError: a bad value, two places that disagree, or a report without matplotlib.
    """
    text = build(RunOptions, dict(in_optim_args), "optim_args")
    field = build(RunOptions, dict(in_fields), "EFCPTrainingArguments")
    for name in in_optim_args.keys() & in_fields.keys():
        if getattr(text, name) != getattr(field, name):
            raise OptionError(
                f"{FIELD}{name}={in_fields[name]!r} contradicts {name}={in_optim_args[name]!r} in optim_args: give one of them"
            )
    found = dataclasses.replace(text, **{name: getattr(field, name) for name in in_fields})
    if found.report and importlib.util.find_spec("matplotlib") is None:
        raise OptionError("report=true: the report needs matplotlib, which is not installed: pip install matplotlib")
    return found
