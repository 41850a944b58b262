"""The right to compile a variant of a function, which one process of a machine has at a time. The others load what it saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: every process compiles
    fcntl = None  # type: ignore[assignment]

# Seconds after which a process compiles whether another one is at it or not. No variant takes so long, unless its process hangs.
LONGEST = 60.0
_PAUSE = 0.02


class Turn:
    """A lock of the operating system on a file, which ends with the process that has it.

    Args:
        path: the file. It is there only while the lock is wanted. Where it cannot be made or locked, no process waits.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self, waiting: Callable[[], None]) -> bool:
        """Take the lock. Tell whether another process had it; `waiting()` is called before the wait for that process."""
        if fcntl is None:
            return False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        except OSError:
            return False
        waited, end = False, time.monotonic() + LONGEST
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return waited
            except BlockingIOError:
                if not waited:
                    waiting()
                waited = True
                if time.monotonic() > end:
                    self._close()
                    return True
                time.sleep(_PAUSE)
            except OSError:  # a file system without locks
                self._close()
                return waited

    def end(self) -> None:
        """Give the lock to the next process."""
        if self._file is not None:
            # Who has opened the file before locks what is gone, and may compile beside who opens a new one: no more than that.
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
