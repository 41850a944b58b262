"""Tells a user that a first run compiles GPU kernels. Triton is silent, and keeps them on disk."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("hf_efcp.compiling")
# Seconds of the host that a launch never takes, unless its kernel is compiled first. A kernel from the disk takes 0.05.
_COMPILED = 0.5


class Announcement:
    """Says once a process that kernels are being compiled, on one process of a machine."""

    def __init__(self) -> None:
        self._said = os.environ.get("LOCAL_RANK", "0") != "0"

    def first_launch(self, seconds: float) -> None:
        """Hear how long the host took for the first launch of a kernel."""
        if self._said or seconds < _COMPILED:
            return
        self._said = True
        # At the level of warnings: it is shown where nobody has set a level.
        _log.warning(
            "compiling GPU kernels, which takes about 20 seconds in a first run: Triton's cache keeps them for later runs"
        )


ANNOUNCEMENT = Announcement()
