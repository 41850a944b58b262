"""`hf-efcp enable`, `disable` and `status`: the names in every program of this Python environment, without a launcher.

A file of one line in site-packages has Python run startup/names.py when it starts. It names that file instead of importing it:
where hf_efcp is removed, the line does nothing.
"""

from __future__ import annotations

import argparse
import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from .. import startup
from ..options import OptionError

FILE = "hf_efcp_names.pth"
_RUN = "with open(_) as f: exec(compile(f.read(), _, 'exec'), {'__name__': 'hf_efcp_names', '__file__': _})"
_LINE = "import os; _ = {file!a}; os.environ.get('HF_EFCP') == '0' or not os.path.exists(_) or exec({run!r})\n"


def add_parsers(commands: Any) -> None:
    """Add the three commands."""
    for name, run, text in (
        ("enable", _enable, "let --optim take the names of hf-efcp list in every program of this Python environment"),
        ("disable", _disable, "undo hf-efcp enable"),
        ("status", _status, "tell whether this Python environment is enabled"),
    ):
        about = (
            f"{text[0].upper()}{text[1:]}. The file {FILE} in site-packages does this. HF_EFCP=0 turns it off for one process."
        )
        commands.add_parser(name, help=text, description=about).set_defaults(handler=run)


def _enable(args: argparse.Namespace) -> int:
    line, problems = _line(), []
    for folder in _folders():
        file = folder / FILE
        try:
            if not file.exists() or file.read_text() != line:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(line)
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
            continue
        print(f"enabled in {sys.prefix}: {file}")
        return 0
    raise OptionError(f"cannot write {'; '.join(problems)}: make a virtual environment, or start programs by `hf-efcp run`")


def _disable(args: argparse.Namespace) -> int:
    files = _files()
    for file in files:
        try:
            file.unlink()
        except OSError as error:
            raise OptionError(f"cannot remove {file}: {error.strerror}") from None
        print(f"disabled in {sys.prefix}: {file} is removed")
    if not files:
        print(f"not enabled in {sys.prefix}: nothing to do")
    return 0


def _status(args: argparse.Namespace) -> int:
    files = _files()
    for file in files:
        stale = "" if file.read_text() == _line() else ", by another installation of hf_efcp: run `hf-efcp enable` again"
        print(f"enabled in {sys.prefix}: {file}{stale}")
    if not files:
        print(f"not enabled in {sys.prefix}")
    if os.environ.get("HF_EFCP") == "0":
        print("HF_EFCP=0 turns the names off in this shell")
    return 0


def _line() -> str:
    return _LINE.format(file=str(Path(startup.__path__[0], "names.py").resolve()), run=_RUN)


def _files() -> list[Path]:
    return [folder / FILE for folder in _folders() if (folder / FILE).exists()]


def _folders() -> list[Path]:
    """The folders of this environment whose .pth files Python reads, the best first."""
    folders = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]
