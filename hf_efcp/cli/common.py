"""What `estimate` and `bench` share: names and options from the command line, bytes as text, tables, files of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.base import EngineOptimizer
from ..groups import parameter_groups
from ..options import OptionError, parse_bytes, unknown_name
from ..registry import get_optimizer_info, list_optimizers, optim_defaults, parse_optim_args
from .shapes import BUILT_IN_HELP

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Bytes of memory that usual GPUs are sold with.
GPUS = {"t4": 16, "v100": 32, "a10": 24, "l4": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "l40s": 48, "a100-40gb": 40}
GPUS |= {"a100": 80, "h100": 80, "h200": 141, "b200": 180}
GPU_HELP = "a size such as 24GiB, or a GPU such as l4 (24 GiB), a100-40gb, a100 (80 GiB) or h100 (80 GiB)"
_OPTIMIZERS = "the optimizers to compare, as `hf-efcp list` names them (default: all)"


class Parser(argparse.ArgumentParser):
    """Names the nearest command or option where one is not known. Parsers of commands are made of this class too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; end with status 2 at an option that is not known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown and unknown[0].startswith("--"):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(unknown_name("option", unknown[0].partition("=")[0], options, self.prog))
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(unknown_name("command", value, action.choices))
        super()._check_value(action, value)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    needs_model: bool = True,
    writes: bool = True,
    optim: str = _OPTIMIZERS,
) -> argparse.ArgumentParser:
    """Add a command about models and optimizers, with MODEL, --optim, --optim_args, --optim_target_modules and --dtype.

    Args:
        commands: of the parser.
        name, help, description: of the command.
        run: does it, and gives the exit status.
        needs_model: whether MODEL must be given.
        writes: whether it has --json and --plot.
        optim: the help of --optim.
    """
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(handler=run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if needs_model else "?",
        help=f"the model. A name from this list: {BUILT_IN_HELP}. Or a name on the hub, a folder or file with a "
        "configuration, or a .json file of shapes, {name: [rows, cols]} or [[rows, cols], ...]. Weights are not read"
        + ("" if needs_model else ". Not needed with --sweep"),
    )
    parser.add_argument("--optim", metavar="NAME[,NAME]" if optim == _OPTIMIZERS else "NAME", help=optim)
    parser.add_argument("--optim_args", help='options of the optimizers, as in training: "rank=8,window_size=64" or JSON')
    parser.add_argument(
        "--optim_target_modules",
        help="the modules whose gradients are compressed, as in training: names, parts of names, or all-linear (default: all). "
        "All other parameters are trained too",
    )
    parser.add_argument(
        "--dtype", default="float32", help="number format of the parameters: float32 (default), bfloat16, float16 or float64"
    )
    if not writes:
        return parser
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file, with exact bytes")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw the figures into this file: .png, .svg or .pdf. This needs matplotlib"
    )
    return parser


def check_plot(file: str | None) -> None:
    """Raise OptionError where the figure `file`, if one is named, could not be drawn, before anything is measured."""
    if file is None:
        return
    if Path(file).suffix not in (".png", ".svg", ".pdf") or not Path(file).absolute().parent.is_dir():
        raise OptionError(f"plot={file!r}: must be a .png, .svg or .pdf file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(f'plot={file!r}: matplotlib is not installed: pip install "hf_efcp[report]"')


def check_integers(args: argparse.Namespace, **least: int) -> None:
    """Raise OptionError for an argument below the least that is allowed; None: it was not given."""
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise OptionError(f"{name}={value}: must be an integer >= {lowest}")


def dtype_of(text: str) -> torch.dtype:
    """A dtype by name; raises OptionError."""
    name = text.lower().removeprefix("torch.")
    if name not in DTYPES:
        raise OptionError(unknown_name("dtype", text, DTYPES))
    return DTYPES[name]


def chosen(names: str | None, optim_args: str | None) -> dict[str, dict[str, Any]]:
    """Optimizer name -> options under `--optim NAME`, for names with commas; None: all.

    With several names an option goes to those that have it.

    Raises:
        OptionError: an unknown name, an option that none of them has, or a bad value.
    """
    wanted = list_optimizers() if names is None else list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
    if not wanted:
        raise OptionError(f"optim={names!r}: names no optimizer; there are {', '.join(list_optimizers())}")
    infos = [get_optimizer_info(name) for name in wanted]
    given = parse_optim_args(optim_args)
    for option in given:
        if not any(option in info.options() for info in infos):
            infos[0].check({option: given[option]})  # raises
    own = {info.name: info.check({k: v for k, v in given.items() if k in info.options()}) for info in infos}
    return {name: {"lr": 1e-4, **optim_defaults(name, **options)} for name, options in own.items()}


def spelled_out(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options with what their preset stands for, for reports."""
    info = get_optimizer_info(name)
    merged, defaults = (dataclasses.asdict(o) for o in (info.merged(options), info.cls.options_type()))
    return {**{option: value for option, value in merged.items() if value != defaults[option]}, **options}


def build(name: str, options: dict[str, Any], model: nn.Module, targets: str | None) -> EngineOptimizer:
    """The optimizer, on the groups that the Trainer would make; no state is allocated yet."""
    own = {k: v for k, v in options.items() if k != "weight_decay"}
    groups = parameter_groups(model, options.get("weight_decay", 0.0), target_modules=targets)
    return get_optimizer_info(name).cls(groups, **own)


def size_of(text: str, name: str = "gpu") -> int:
    """Bytes of "24GiB", "80GB", or of a GPU by name; raises OptionError that names the option `name`."""
    plain = text.strip().lower().replace(" ", "")
    if plain in GPUS:
        return GPUS[plain] * 2**30
    if re.fullmatch(r"\d+(\.\d*)?", plain) and float(plain) < 2**20:  # more is a number of bytes
        raise OptionError(f"{name}={text!r}: a unit is missing, such as {text}GiB")
    try:
        if plain != "none":
            return parse_bytes(name, text)
    except OptionError:
        pass
    raise OptionError(f"{unknown_name(name, text, GPUS)}, or a size such as 24GiB")


def gibibytes(size: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{round(size)} B"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first one being its head; columns after the first are numbers."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            lines.append("|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def write_json(file: str | None, content: dict[str, Any]) -> None:
    """`content` to `file`, if one is named; raises OptionError where it cannot be written."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(content, indent=1, default=lambda value: str(value).removeprefix("torch.")) + "\n")
    except OSError as error:
        raise OptionError(f"json={file!r} cannot be written: {error.strerror}") from None
