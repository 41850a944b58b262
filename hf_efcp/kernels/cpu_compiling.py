"""Logs once that a step waits for the compiler, which takes up to a minute. With the code on disk there is nothing to log."""

from __future__ import annotations

import logging
import os

from numba.core import event

_log = logging.getLogger("hf_efcp.compiling")


class Announcement(event.Listener):
    """Listens to numba's compiler. numba reports no function whose code it finds on disk.

    Attributes:
        kept: whether compiled code can be kept on disk.
    """

    kept = True

    def __init__(self) -> None:
        self._said = False

    def on_start(self, event: event.Event) -> None:
        """Log at the first function of this package, on one process of a machine."""
        ours = event.data["dispatcher"].py_func.__module__.startswith(f"{__package__}.")
        if not ours or self._said:
            return
        self._said = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            where = "they are kept on disk for later runs" if self.kept else "set NUMBA_CACHE_DIR to a folder that can keep them"
            # At the level of warnings: it is shown where nobody has set a level.
            _log.warning("compiling CPU kernels, which takes up to a minute: %s", where)

    def on_end(self, event: event.Event) -> None:
        """Do nothing."""


ANNOUNCEMENT = Announcement()
event.register("numba:compile", ANNOUNCEMENT)
