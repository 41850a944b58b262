"""Run an unmodified script with hf_efcp's optimizers registered.

python -m hf_efcp.run script.py ARGS
python -m hf_efcp.run -m module ARGS

The same under `torchrun [options] -m hf_efcp.run script.py ARGS` and
`accelerate launch [options] -m hf_efcp.run script.py ARGS`.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from .options import OptionError

USAGE = """\
usage: python -m hf_efcp.run script.py [ARGS]
       python -m hf_efcp.run -m module [ARGS]

Runs the script (or module) as python would, with the names of `hf-efcp list` valid for --optim. ARGS are not touched."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script or module that `argv` names, as `__main__`.

    Args:
        argv: `script.py ARGS` or `-m module ARGS`; None: `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 2 where there is no such script or one of our options is bad (one line on stderr). What
        the script itself raises passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    is_module = argv[:1] == ["-m"]
    given = argv[is_module:]
    problem = _problem(given[0] if given else None, is_module)
    if problem:
        return _fail(problem)

    target, sys.argv = given[0], given
    try:
        if is_module:
            _set_first_path(os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            script = os.path.abspath(target)
            _set_first_path(os.path.dirname(os.path.realpath(script)))
            runpy.run_path(script, run_name="__main__")
    except OptionError as error:
        return _fail(str(error))
    _leave_process_group()
    return 0


def _problem(target: str | None, is_module: bool) -> str:
    """What is wrong with the target, found before anything of it runs; empty: nothing."""
    if target is None or target.startswith("-"):
        got = "nothing" if target is None else repr(target)
        return f"expected {'a module after -m' if is_module else 'a script or -m module'}, got {got}"
    if not is_module:
        return "" if os.path.isfile(target) else f"no such script: {target}"
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


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
