"""Compiled functions on disk, and a log entry for who waits for the compiler.

numba's own cache has an index that processes overwrite: two processes that compile one function for two dtypes at the same time
can leave an index that gives the code of one dtype for the other, in every later run, with wrong results. The index also misses
that another file has changed whose functions are compiled in. Here each variant of a function has a file of its own, whose name
says which variant it is, and in which state the folder of kernels was.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile

from .cpu_turns import LONGEST, Turn

_log = logging.getLogger("hf_efcp.compiling")


# Seconds without the compiler, after which a user is told again: another optimizer, dtype or format compiles more functions.
_PAUSE = 15.0


class Announcement(event.Listener):
    """Listens to numba's compiler. numba reports no function whose code it finds on disk.

    Attributes:
        kept: whether compiled code can be kept on disk.
    """

    kept = True

    def __init__(self) -> None:
        self._last = -math.inf  # when the compiler was last at work

    def on_start(self, event: event.Event) -> None:
        """Log at the first function of this package, and at the first one after a pause, on one process of a machine."""
        if _is_ours(event):
            self.announce()

    def announce(self) -> None:
        """Log that functions are compiled, here or by a process for which this one waits."""
        last, self._last = self._last, time.monotonic()
        if self._last - last > _PAUSE and os.environ.get("LOCAL_RANK", "0") == "0":
            where = "they are kept on disk for later runs" if self.kept else "set NUMBA_CACHE_DIR to a folder that can keep them"
            # At the level of warnings: it is shown where nobody has set a level.
            _log.warning("compiling CPU kernels, which takes up to a minute: %s", where)

    def on_end(self, event: event.Event) -> None:
        """Note when it was. Where it failed, nothing is saved, and other processes may try."""
        if _is_ours(event):
            self.begin_pause()
        # numba's `is_failed` tells the contrary. Without the attribute, other processes may try after each function.
        failed = getattr(event, "_exc_details", True) is not None
        if failed and isinstance(cache := getattr(event.data["dispatcher"], "_cache", None), KernelCache):
            cache.end_turns()

    def begin_pause(self) -> None:
        """Note that the compiler has just been at work, here or in a process for which this one waited."""
        self._last = time.monotonic()


def _is_ours(event: event.Event) -> bool:
    """Tell whether a function of this package is compiled."""
    return (event.data["dispatcher"].py_func.__module__ or "").startswith(f"{__package__}.")


ANNOUNCEMENT = Announcement()
event.register("numba:compile", ANNOUNCEMENT)


def _hash(x: object) -> str:
    return hashlib.sha256(repr(x).encode()).hexdigest()[:16]


@functools.cache
def _state() -> str:
    """Give a hash of the state of this folder's files, any of which may be compiled into a function of another."""
    files = sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in Path(__file__).parent.glob("*.py"))
    return _hash(files)


class Files(IndexDataCacheFile):
    """A file for each variant of a function, without an index. A file appears as a whole, or not at all."""

    def load(self, key: Any) -> Any:
        """Give what was saved under a key; None if nothing was, or if it cannot be read."""
        try:
            found, data = self._load_data(self.name(key))
        except Exception:  # no file, or whatever unpickling a damaged file raises
            return None
        return data if found == key else None

    def save(self, key: Any, data: Any) -> None:
        """Save a variant, and remove variants that were compiled in another state of the folder. A full disk keeps nothing."""
        with contextlib.suppress(OSError):
            self._save_data(self.name(key), (key, data))
            self._remove(self._start + self._source_stamp)

    def flush(self) -> None:
        """Remove all variants."""
        self._remove()

    @property
    def _start(self) -> str:
        return self._index_name.removesuffix("nbi")

    def name(self, key: Any) -> str:
        """Give the name of a variant's file."""
        return f"{self._start}{self._source_stamp}.{_hash(key)}.nbc"

    def _remove(self, but: str | None = None) -> None:
        """Remove the function's files; not those whose names start with `but`."""
        for file in Path(self._cache_path).glob(f"{glob.escape(self._start)}*"):
            if but is None or not file.name.startswith(but):
                file.unlink(missing_ok=True)


class KernelCache(FunctionCache):
    """The compiled variants of a function of this folder, on disk.

    Attributes:
        waits: whether this process waits for others that compile. It does not any more after it waited for nothing: the other
            one hangs, has failed, or cannot save.

    Raises:
        RuntimeError: no folder can keep them.
    """

    waits = True

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        # Environments with different versions of numba may share an editable install.
        self._cache_file = Files(self._cache_path, f"{self._impl.filename_base}.numba{numba.__version__}", _state())
        self._turns: dict[Any, Turn] = {}  # by signature

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Give the variant from the disk. None: this process is the one to compile it."""
        found = super().load_overload(sig, target_context)
        if found is not None or not self._enabled:
            return found
        self.end_turns(sig)
        name = self._cache_file.name(self._index_key(sig, target_context.codegen()))
        self._turns[sig] = turn = Turn(Path(self._cache_path, f"{name}.lock"))
        try:
            if turn.take(ANNOUNCEMENT.announce, LONGEST if KernelCache.waits else 0.0):
                ANNOUNCEMENT.begin_pause()
                found = super().load_overload(sig, target_context)
                KernelCache.waits = found is not None
        except BaseException:
            self.end_turns(sig)
            raise
        if found is not None:
            self.end_turns(sig)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save a variant, for the processes that wait for it too."""
        try:
            super().save_overload(sig, data)
        finally:
            self.end_turns(sig)

    def end_turns(self, *signatures: Any) -> None:
        """Let other processes compile the variants of these signatures; of all, where none is given."""
        for sig in signatures or tuple(self._turns):
            if turn := self._turns.pop(sig, None):
                turn.end()
