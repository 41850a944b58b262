"""`hf-efcp completion`: a script with which a shell completes commands, options, and the names that they take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from ..options import OptionError, unknown_name
from ..registry import list_optimizers
from .advise import TASKS
from .common import DTYPES, GPUS
from .shapes import BUILT_IN

SHELLS = ("bash", "zsh", "fish")
# What an argument takes, by its name in the parser.
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "optim": list_optimizers,
    "pattern": list_optimizers,
    "model": lambda: BUILT_IN,
    "dtype": lambda: DTYPES,
    "gpu": lambda: GPUS,
    "task": lambda: TASKS,
    "device": lambda: ("cpu", "cuda"),
    "shell": lambda: SHELLS,
}
_FILES = {"FILE": "FILE", "FOLDER": "DIRECTORY", "OUTPUT_DIR": "DIRECTORY", "SCRIPT": "FILE"}


def add_parser(commands: Any, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command.

    Args:
        commands: of the parser.
        make_parser: makes a whole parser, which is changed here before a shell learns it.
    """
    parser = commands.add_parser(
        "completion",
        help="print a script with which your shell completes hf-efcp's commands, options and names",
        description="Prints a script for your shell. The shell then completes the commands of hf-efcp, their options, and the "
        "names of optimizers, models and GPUs when you press Tab.",
        epilog="Write the script to the file in which your shell looks for it. docs/cli.md names the file of each shell.",
    )
    parser.add_argument("shell", metavar="SHELL", help=f"the shell: {', '.join(SHELLS)}")
    parser.set_defaults(handler=lambda args: _print(args.shell, make_parser()))


def _print(shell: str, parser: argparse.ArgumentParser) -> int:
    if shell not in SHELLS:
        raise OptionError(unknown_name("shell", shell, SHELLS))
    try:
        import shtab
    except ImportError:
        raise OptionError('shell completion needs shtab, which is not installed: pip install "hf_efcp[completion]"') from None
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    commands.choices["run"].add_argument("script", metavar="SCRIPT", nargs="*")
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in _NAMES:
                action.choices = tuple(_NAMES[action.dest]())
            elif action.metavar in _FILES:
                action.complete = getattr(shtab, _FILES[str(action.metavar)])
    print(shtab.complete(parser, shell))
    return 0
