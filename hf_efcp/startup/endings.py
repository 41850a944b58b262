"""How an error ends a program under `hf-efcp run` where a traceback would say less than has been said already.

sitecustomize.py runs this file in the Pythons that the program starts, hf_efcp/run.py imports it.

Nobody sees what a Python says whose stderr is closed or the null device. It leaves the message of its error in a file for the one
that started it, which shows it if it ends because of that failure, and removes it if not.
"""

from __future__ import annotations

import os
import sys

# In the environment: the process id of the Python that started this one.
_STARTER = "HF_EFCP_STARTER"


def status_of(error: BaseException) -> int | None:
    """Give the exit status that an error stands for; None: the error is the program's own, and Python shows its traceback.

    A bad option of ours is one line on stderr and status 2. Where a Python that the program has started failed, that one has said
    why: the status is its status, and a signal that ended it ends this process too.
    """
    if (type(error).__module__, type(error).__name__) == ("hf_efcp.options", "OptionError"):
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = _status_of_a_python(error)
    if status is not None:
        words = _last_words()
        if not words and _unseen(error):
            words = f"error: {error} It was started with a stderr of its own.\n"
        if words and sys.stderr is not None:
            print(words, end="", file=sys.stderr, flush=True)
    if status is not None and status < 0:
        import signal

        signal.signal(-status, signal.SIG_DFL)
        signal.raise_signal(-status)
        return 128 - status
    return status


def hook(original):
    """Give an excepthook that ends with `status_of` the error, and calls the original where there is none."""
    starter = listen()

    def excepthook(kind, error, traceback):
        import io

        # torch.distributed, whose hook calls this one, reads what goes to sys.stderr, and would drop it at SystemExit.
        seen, unheard = sys.stderr, _unheard()
        said = io.StringIO()
        sys.stderr = said if unheard else sys.__stderr__
        try:
            status = status_of(error)
            if status is None and unheard:
                import traceback as printing

                printing.print_exception(kind, error, traceback)
        finally:
            sys.stderr = seen
        if unheard and starter:
            _leave(starter, said.getvalue())
        if status is None:
            original(kind, error, traceback)
        else:
            raise SystemExit(status)

    return excepthook


def listen():
    """Have the Pythons that this one starts leave their last words; give the process id of the one that started this one."""
    import atexit

    starter, os.environ[_STARTER] = os.environ.get(_STARTER), str(os.getpid())
    atexit.register(_last_words)
    return starter


def _unheard():
    """Tell whether nobody hears what this process says: its stderr is closed, or the null device."""
    try:
        return sys.stderr is None or os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev
    except OSError:
        return True


def _file(pid):
    return os.path.join(os.environ.get("TMPDIR", "/tmp"), f"hf_efcp_last_words_{pid}")


def _leave(pid, words):
    """Leave words for a process."""
    try:
        with open(os.open(_file(pid), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(words)
    except (OSError, AttributeError):  # no such folder; a system without O_NOFOLLOW
        pass


def _last_words():
    """Give what a process has left for this one, and remove it."""
    try:
        with open(os.open(_file(os.getpid()), os.O_RDONLY | os.O_NOFOLLOW)) as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return ""
            words = file.read()
        os.remove(_file(os.getpid()))
        return words
    except (OSError, AttributeError):
        return ""


def _unseen(error):
    """Tell whether subprocess.run or check_call, which raised the error, was given a stderr."""
    traceback, subprocess = error.__traceback__, sys.modules["subprocess"]
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        given = frame.f_locals.get("kwargs") if frame.f_globals is vars(subprocess) else None
        if isinstance(given, dict) and given.get("stderr") is not None:
            return True
    return False


def _status_of_a_python(error: BaseException) -> int | None:
    """Give the status of the Python whose failure the error tells; None: it tells another, or that one's output was caught."""
    subprocess = sys.modules.get("subprocess")  # who has raised it has imported it
    if subprocess is None or not isinstance(error, subprocess.CalledProcessError):
        return None
    if error.stderr is not None or error.output is not None:
        return None
    import shutil

    # A program beside this interpreter, such as torchrun, is a Python too.
    program = shutil.which(error.cmd[0]) if isinstance(error.cmd, (list, tuple)) and error.cmd else None
    return error.returncode if program and os.path.dirname(program) == os.path.dirname(sys.executable) else None
