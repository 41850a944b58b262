"""Tells a user that a first run compiles GPU kernels, before it does. Triton keeps them on disk, and is silent."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

_log = logging.getLogger("hf_efcp.compiling")
# A kernel of every method that keeps an error. Triton's cache has a folder for each variant of a kernel.
_PROBE = "*/_keep.json"


def cache_folder() -> Path:
    """Return the folder in which Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def announce() -> None:
    """Log, on one process of a machine, that kernels will be compiled, where Triton's cache has none of ours."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreted or not torch.cuda.is_available() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        known = any(cache_folder().glob(_PROBE))
    except OSError:  # a folder that cannot be read
        known = False
    if not known:
        # At the level of warnings: it is shown where nobody has set a level.
        _log.warning("compiling GPU kernels, which takes about 20 seconds: they are kept on disk for later runs")
