"""The console script `hf-efcp`: run a program with our optimizers; list, estimate and time them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import inspect
import os
import platform
import sys
import types
import typing
from collections.abc import Iterator, Sequence

from .. import run
from .._version import __version__
from ..bench import command as bench
from ..options import GroupOptions, OptionError, as_text, described, field_types
from ..registry import OptimizerInfo, get_optimizer_info, list_optimizers, optim_defaults
from . import advise, capacity, completion, enable, estimate, report
from .common import Parser

_ABOUT = """\
Trains Hugging Face models with optimizers that use how the gradients of all weights vary together. Your script uses one of
these optimizers in place of AdamW. The script needs no change, and keeps its learning rate.

What it costs: a training step takes longer (BERT-base on one H100: 46.5 ms instead of 42.7). efcp_lowrank_mfac keeps 2.5
bytes of state per parameter of BERT-base (AdamW: 8), and 11 bytes per trained parameter of LoRA adapters of rank 8.

What to type:
  hf-efcp run train.py --optim efcp_lowrank_mfac --learning_rate 1e-4 ...    train with this optimizer
  hf-efcp advise bert-base --gpu 24GiB                                       get a command line for your model
  hf-efcp estimate bert-base --gpu 24GiB                                     see how much memory it takes
  hf-efcp bench bert-base                                                    see how long a step takes here
  hf-efcp report OUTPUT_DIR                                                  see what a run did, and what to change"""
_HEADER = ("option", "type", "class default", "--optim default", "meaning")
# Options that the Trainer takes from arguments of its own.
_TRAINER_DEFAULTS = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; None: `sys.argv[1:]`.

    Returns:
        The exit status; argparse leaves with status 2 by itself where the command or its arguments are wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:  # before argparse, which would take the script's options for its own
        return run.main(argv[1:])
    args = _parser().parse_args(argv)
    try:
        status = args.handler(args)
        sys.stdout.flush()
        return status
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `hf-efcp list | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else python complains when it flushes at the end
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-efcp",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the version stays one line
        description=_ABOUT,
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "run", help="run your script, a module (-m) or a program, whose --optim then takes the names of hf-efcp list"
    )
    enable.add_parsers(commands)
    lister = commands.add_parser(
        "list",
        help="list the optimizers that --optim takes",
        description="Lists the optimizers that --optim takes, each with a line about it.",
    )
    lister.add_argument("pattern", nargs="?", default="*", help='list only the names that match, for example "*lowrank*"')
    lister.add_argument("--options", action="store_true", help="list the options of each optimizer too, with their defaults")
    lister.add_argument("--markdown", action="store_true", help="print one Markdown table of all options, as in docs/options.md")
    lister.set_defaults(handler=lambda args: _list(args.pattern, args.options, args.markdown))
    estimate.add_parser(commands)
    capacity.add_parser(commands)
    advise.add_parser(commands)
    bench.add_parser(commands)
    report.add_parsers(commands)
    completion.add_parser(commands, _parser)
    return parser


def _versions() -> str:
    """Name our version, and the versions of torch, transformers, accelerate and Python."""
    others = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate")]
    return ", ".join([f"hf_efcp {__version__}", *others, f"Python {platform.python_version()}"])


def _list(pattern: str, options: bool, markdown: bool) -> int:
    names = list_optimizers(pattern)
    if not names:
        raise OptionError(f"no optimizer matches {pattern!r}; there are: {', '.join(list_optimizers())}")
    if markdown:
        _print_markdown(names)
        return 0
    width = max(map(len, names))
    for name in names:
        info = get_optimizer_info(name)
        print(f"{name:<{width}}  {info.description}")
        if options:
            _print_table([_HEADER, *_option_rows(info)])
            print()
    return 0


def _option_rows(info: OptimizerInfo) -> Iterator[tuple[str, ...]]:
    signature, start = inspect.signature(info.cls).parameters, info.merged(optim_defaults(info.name))
    for options_type in (GroupOptions, info.cls.options_type):
        types_ = field_types(options_type)
        for field in dataclasses.fields(options_type):
            hf_default = _TRAINER_DEFAULTS.get(field.name) or as_text(getattr(start, field.name))
            default = signature[field.name].default
            shown = "required" if default is inspect.Parameter.empty else as_text(default)
            yield field.name, _show_type(types_[field.name]), shown, hf_default, described(field)


def _print_markdown(names: Sequence[str]) -> None:
    users: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        for row in _option_rows(get_optimizer_info(name)):
            users.setdefault(row, []).append(name)
    header = (*_HEADER, "optimizers")
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row, of in users.items():
        who = "all" if len(of) == len(names) else ", ".join(f"`{name}`" for name in of)
        cells = [f"`{cell}`" if i in (0, 2, 3) else cell for i, cell in enumerate(row)]
        print("| " + " | ".join([*cells, who]) + " |")


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("    " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_type(annotation: object) -> str:
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
