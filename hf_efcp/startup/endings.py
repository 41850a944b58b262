"""How an error ends a program under `hf-efcp run` where a traceback would say less than has been said already.

sitecustomize.py runs this file in the Pythons that the program starts, hf_efcp/run.py imports it.
"""

from __future__ import annotations

import sys


def status_of(error: BaseException) -> int | None:
    """Give the exit status that an error stands for; None: the error is the program's own, and Python shows its traceback.

    A bad option of ours is one line on stderr and status 2. Where a Python that the program has started failed, that one has said
    why: the status is its status, and a signal that ended it ends this process too.
    """
    if (type(error).__module__, type(error).__name__) == ("hf_efcp.options", "OptionError"):
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = _status_of_a_python(error)
    if status is not None and status < 0:
        import signal

        signal.signal(-status, signal.SIG_DFL)
        signal.raise_signal(-status)
        return 128 - status
    return status


def hook(original):
    """Give an excepthook that ends with `status_of` the error, and calls the original where there is none."""

    def excepthook(kind, error, traceback):
        # torch.distributed, whose hook calls this one, reads what goes to sys.stderr, and would drop it at SystemExit.
        seen, sys.stderr = sys.stderr, sys.__stderr__
        try:
            status = status_of(error)
        finally:
            sys.stderr = seen
        if status is None:
            original(kind, error, traceback)
        else:
            raise SystemExit(status)

    return excepthook


def _status_of_a_python(error: BaseException) -> int | None:
    """Give the status of the Python whose failure the error tells; None: it tells another, or that one's output was caught."""
    subprocess = sys.modules.get("subprocess")  # who has raised it has imported it
    if subprocess is None or not isinstance(error, subprocess.CalledProcessError):
        return None
    if error.stderr is not None or error.output is not None:
        return None
    import os
    import shutil

    # A program beside this interpreter, such as torchrun, is a Python too.
    program = shutil.which(error.cmd[0]) if isinstance(error.cmd, (list, tuple)) and error.cmd else None
    return error.returncode if program and os.path.dirname(program) == os.path.dirname(sys.executable) else None
