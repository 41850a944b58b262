"""Finds the kernel of an operation for a device and calls it. A kernel that fails is logged, and not called again."""

from __future__ import annotations

import importlib
import logging
import os
import time
from typing import Any

import torch
from torch import Tensor

from .devices import WRITTEN, kind
from .gpu_compiling import ANNOUNCEMENT
from .tables import TABLES

_log = logging.getLogger("hf_efcp")
_loaded: dict[str, Any] = {}
# Operation -> device type -> module.
MODULES = {
    "squares": {"cpu": "cpu_metric", "cuda": "gpu_metric"},
    "measure": {"cpu": "cpu_metric", "cuda": "gpu_metric"},
    "measure_vectors": {"cuda": "gpu_state"},
    "remember_factored": {"cuda": "gpu_state"},
    "remember_diagonal": {"cuda": "gpu_state"},
    "remember": {"cuda": "gpu_state"},
    "top_k": {"cpu": "cpu_top_k", "cuda": "gpu_sparse"},
    "extract": {"cpu": "cpu_extract"},
    "dots": {"cpu": "cpu_sparse", "cuda": "gpu_sparse"},
    "combine": {"cpu": "cpu_sparse", "cuda": "gpu_sparse"},
    "apply": {"cpu": "cpu_sparse", "cuda": "gpu_sparse"},
    "adam": {"cpu": "cpu_moments"},
    "move": {"cpu": "cpu_moments"},
    "adamw": {"cpu": "cpu_adamw"},
    "keep": {"cpu": "cpu_keep", "cuda": "gpu_keep"},
    "square": {"cpu": "cpu_keep", "cuda": "gpu_update"},
    "add_kept": {"cpu": "cpu_keep", "cuda": "gpu_update"},
    "add": {"cpu": "cpu_low_rank", "cuda": "gpu_update"},
    "start": {"cuda": "gpu_basis"},
    "times": {"cpu": "cpu_low_rank", "cuda": "gpu_low_rank"},
    "orthonormal": {"cuda": "gpu_basis"},
    "transposed_times": {"cpu": "cpu_low_rank", "cuda": "gpu_low_rank"},
    "inner": {"cpu": "cpu_low_rank", "cuda": "gpu_windows"},
    "factor_dots": {"cuda": "gpu_windows"},
    "store": {"cuda": "gpu_windows"},
    "scaled": {"cpu": "cpu_low_rank", "cuda": "gpu_windows"},
    "decode": {"cuda": "gpu_windows"},
    "encode": {"cuda": "gpu_codes"},
    "encode_sparse": {"cuda": "gpu_codes"},
    "dense_dots": {"cuda": "gpu_codes"},
    "dense_combine": {"cuda": "gpu_codes"},
}
_NEEDS = {"cpu": "numba", "cuda": "triton"}
# (device type, operation) of kernels that failed, which are not called again; and of kernels that worked.
FAILED: set[tuple[str, str]] = set()
_WORKED: set[tuple[str, str]] = set()
# Operations that write to state or parameters.
_IN_PLACE = {
    "remember_factored",
    "remember_diagonal",
    "remember",
    "apply",
    "keep",
    "add_kept",
    "add",
    "store",
    "encode",
    "extract",
    "move",
    "adamw",
}


def attempt(name: str, example: Tensor, *args: Any) -> Any:
    """Call the kernel of an operation for the device of `example`; None where there is nothing to do, or no kernel.

    Raises:
        Exception: what the kernel raised, if it may have written something already; if memory ran out; or if a CUDA graph is
            being made.
    """
    type = kind(example.device)
    if not example.numel():  # a shard without rows
        return None
    if type not in MODULES[name] or (type, name) in FAILED or os.environ.get("HF_EFCP_KERNELS", "1") == "0":
        return None
    written = WRITTEN.turns
    try:
        module = MODULES[name][type]
        if module not in _loaded:
            _loaded[module] = importlib.import_module(f".{module}", __package__)
        begin = time.perf_counter()
        result = getattr(_loaded[module], name)(*args)
        if (type, name) not in _WORKED:
            _WORKED.add((type, name))
            if example.is_cuda:
                ANNOUNCEMENT.first_launch(time.perf_counter() - begin)
        return result
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the compiler's own errors are of many types
        if (tables := TABLES.get()) is not None and tables.fixed:  # the kernel worked in an earlier step: the graph is at fault
            raise
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == _NEEDS[type]:
            FAILED.update((type, operation) for operation in MODULES)
            _log.info("%s is not installed: steps on %s run in plain torch, which is slower", _NEEDS[type], type)
            return None
        FAILED.add((type, name))
        _log.warning(
            "no %s kernel for `%s`: this part of a step on %s runs in plain torch: %s",
            *(_NEEDS[type], name, type, f"{error.__class__.__name__}: {error}"),
        )
        if name in _IN_PLACE and (WRITTEN.turns > written or _launched(type, name, error)):
            raise  # torch must not write a second time what the kernel has written
        return None


def _launched(type: str, name: str, error: Exception) -> bool:
    """Tell whether a GPU kernel may have begun to write: it worked before, and the error is not one of Triton's compiler."""
    return type != "cpu" and (type, name) in _WORKED and not error.__class__.__module__.startswith("triton")
