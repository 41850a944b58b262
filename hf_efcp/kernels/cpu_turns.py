"""The right to compile a variant of a function, which one process of a machine has at a time. The others load what it saves."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: every process compiles
    fcntl = None  # type: ignore[assignment]

# Seconds after which a process compiles, though another one is still at it: that one may hang.
LONGEST = 120.0
_PAUSE = 0.02


class Turn:
    """A lock of the operating system on a file. The lock ends with the process that has it, and with this process's forks.

    Args:
        path: the file. It is there while a process has the lock. Where it cannot be made or locked, no process waits.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self, waiting: Callable[[], None], longest: float) -> bool:
        """Take the lock, or give up after `longest` seconds.

        Returns:
            Whether another process had it. `waiting()` is called before the wait for that process.
        """
        waited, end = False, time.monotonic() + longest
        while self._try() is False:
            if time.monotonic() >= end:
                return waited
            if not waited:
                waiting()
            waited = True
            time.sleep(_PAUSE)
        return waited

    def end(self) -> None:
        """Give the lock to the next process."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _try(self) -> bool | None:
        """Take the lock if it is free, and tell whether that worked; None: there can be no lock.

        Who waits keeps no file open, because a file that its owner has removed would be locked in vain.
        """
        if fcntl is None:
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("ab")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):  # else it was removed meanwhile
                self._file = file
            return self._file is not None
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError:  # a file system without locks
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            return None
        finally:
            if self._file is not file:
                file.close()
