"""Fast versions of the sparse family's operations, chosen by device: Triton on GPUs, numba on CPUs where it is installed.

Plain torch, in core, is what they are tested against and what runs without them: an operation here returns None where no
kernel can do it, and the caller goes on in torch. Nothing is compiled before it is first used. HF_EFCP_KERNELS=0 in the
environment turns all of them off.
"""

from __future__ import annotations

import importlib
import logging
import os

import torch
from torch import Tensor

# Length of a block, entries kept in each, entries kept in a shorter last one (0: there is none).
Blocks = tuple[int, int, int]

_log = logging.getLogger("hf_efcp")
# Device type -> module, in which all operations have the same signatures.
_MODULES = {"cpu": "cpu", "cuda": "gpu"}
_NEEDS = {"cpu": "numba", "cuda": "triton"}
_failed: set[str] = set()


def top_k(gradient: Tensor, error: Tensor | None, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of every block of e + g: see `BlockTopK`."""
    return _try("top_k", gradient, gradient, error, blocks)


def dots(indices: Tensor, values: Tensor, row: tuple[Tensor, Tensor], cols: int, blocks: Blocks) -> Tensor | None:
    """Inner products of a sparse row with a sparse window, (n, m) fp64: see `SparseWindow`."""
    return _try("dots", values, indices, values, row, cols, blocks)


def combine(indices: Tensor, values: Tensor, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Rows `rows` of G^T c for a sparse window: see `SparseWindow`."""
    return _try("combine", values, indices, values, c, cols, blocks, rows)


def _try(name: str, example: Tensor, *args):
    kind = example.device.type
    if not example.numel():  # a shard without rows
        return None
    if kind not in _MODULES or kind in _failed or os.environ.get("HF_EFCP_KERNELS", "1") == "0":
        return None
    try:
        return getattr(importlib.import_module(f".{_MODULES[kind]}", __name__), name)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own errors are of many types
        _failed.add(kind)
        if isinstance(error, ModuleNotFoundError):
            _log.info("%s is not installed: sparse windows run in plain torch on %s, which is slower", _NEEDS[kind], kind)
        else:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning("no %s kernels, sparse windows run in plain torch on %s: %s", _NEEDS[kind], kind, what)
        return None
