"""Run an unmodified program with hf_efcp's optimizers registered.

python -m hf_efcp.run script.py ARGS
python -m hf_efcp.run -m module ARGS
python -m hf_efcp.run program ARGS

`hf-efcp run` is the same, and so is `-m hf_efcp.run` under torchrun and `accelerate launch`. The Python processes that the
program starts have the names too.
"""

from __future__ import annotations

import difflib
import gc
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence

from . import startup
from .startup.endings import listen, status_of

USAGE = """\
usage: hf-efcp run script.py [ARGS]
       hf-efcp run -m module [ARGS]
       hf-efcp run program [ARGS]

Runs a script or a module as python would, or a program such as trl, which is looked for beside this python and on PATH.
--optim then takes the names of `hf-efcp list`, also in the Python processes that the script starts. ARGS are not changed.
`python -m hf_efcp.run` does the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script or module that `argv` names, as `__main__`, or the program, in this process's place.

    Args:
        argv: `script.py ARGS`, `-m module ARGS` or `program ARGS`; None: `sys.argv[1:]`.

    Returns:
        The exit status: 0; 2 where there is no such script or one of our options is bad (one line on stderr); or the status of
        a Python that the script has started and that failed. What the script itself raises passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    is_module = argv[:1] == ["-m"]
    given = argv[is_module:]
    program = None if is_module or not given else _program(given[0])
    problem = "" if program else _problem(given[0] if given else None, is_module)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2

    _hand_on()
    if program:
        return _become([program, *given[1:]])
    target, sys.argv = given[0], given
    try:
        if is_module:
            _set_first_path(os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            script = os.path.abspath(target)
            _set_first_path(os.path.dirname(os.path.realpath(script)))
            runpy.run_path(script, run_name="__main__")
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        return status
    _leave_process_group()
    return 0


def _program(target: str) -> str | None:
    """Give the program's file, beside the interpreter or on PATH; None: it is no program, or a script for this interpreter."""
    if os.path.isfile(target):
        runs_itself = os.access(target, os.X_OK) and not target.endswith((".py", ".pyc", ".pyw"))
        return os.path.abspath(target) if runs_itself else None
    if target.startswith("-") or target.endswith(".py") or os.path.dirname(target):
        return None
    return shutil.which(target, path=os.path.dirname(sys.executable)) or shutil.which(target)


def _problem(target: str | None, is_module: bool) -> str:
    """What is wrong with the target, found before anything of it runs; empty: nothing."""
    if target is None or target.startswith("-"):
        got = "nothing" if target is None else repr(target)
        return f"expected {'a module after -m' if is_module else 'a script, -m module or a program'}, got {got}"
    if not is_module:
        if os.path.isfile(target):
            return ""
        if target.endswith(".py") or os.path.dirname(target) or os.path.isdir(target):
            return f"no such script: {target}"
        folder = os.path.dirname(sys.executable)
        near = difflib.get_close_matches(target, os.listdir(folder), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"no such script, and no such program in {folder} or on PATH: {target}{hint}"
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{target}.__main__")
    except (ImportError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing is not None and not f"{target}.".startswith(f"{missing}."):
            raise  # a parent package was found, and fails to import something else
        spec = None
    return "" if spec is not None else f"no such module, or nothing to run in it: {target}"


def _hand_on() -> None:
    """Have every Python that is started from now on run startup/sitecustomize.py."""
    listen()
    ours, given = startup.__path__[0], os.environ.get("PYTHONPATH")
    others = [folder for folder in (given.split(os.pathsep) if given else []) if folder != ours]
    os.environ["PYTHONPATH"] = os.pathsep.join([ours, *others])
    if os.environ.get("HF_EFCP") == "0":  # that is about what is enabled for all programs; this one was asked for
        del os.environ["HF_EFCP"]


def _become(command: list[str]) -> int:
    """Put a program in this process's place: its messages, signals and status are what the caller sees."""
    try:
        if os.name == "posix":
            sys.stdout.flush()
            sys.stderr.flush()
            os.execv(command[0], command)
        return subprocess.run(command).returncode
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 126


def _leave_process_group() -> None:
    # Few scripts do, and an interpreter that exits with a live group may abort. The script's model goes first: a
    # DistributedDataParallel that outlives its group may wait for ever.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def _set_first_path(folder: str) -> None:
    # As python itself: the script's folder (or the current one) comes first, unless -P or -I forbids it.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


if __name__ == "__main__":
    sys.exit(main())
