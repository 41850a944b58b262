"""Fast versions of what a step does most, chosen by device: Triton on GPUs, numba on CPUs where it is installed.

Plain torch, in core, is what they are tested against and what runs without them: an operation here returns None where no
kernel can do it, and the caller goes on in torch. Nothing is compiled before it is first used. HF_EFCP_KERNELS=0 in the
environment turns all of them off.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

# Length of a block, entries kept in each, entries kept in a shorter last one (0: there is none).
Blocks = tuple[int, int, int]

_log = logging.getLogger("hf_efcp")
# Device type -> module, in which all operations have the same signatures.
_MODULES = {"cpu": "cpu", "cuda": "gpu"}
_LOW_RANK = {"cpu": "cpu_low_rank"}
_NEEDS = {"cpu": "numba", "cuda": "triton"}
_failed: set[str] = set()


def top_k(gradient: Tensor, error: Tensor | None, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of every block of e + g: see `BlockTopK`."""
    if _is_flat(gradient):
        return None
    return _try("top_k", gradient, gradient, error, blocks)


def dots(indices: Tensor, values: Tensor, row: tuple[Tensor, Tensor], cols: int, blocks: Blocks) -> Tensor | None:
    """Inner products of a sparse row with a sparse window, (n, m) fp64: see `SparseWindow`."""
    if _is_flat(values):
        return None
    return _try("dots", values, indices, values, row, cols, blocks)


def combine(indices: Tensor, values: Tensor, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Rows `rows` of G^T c for a sparse window: see `SparseWindow`."""
    if _is_flat(values):
        return None
    return _try("combine", values, indices, values, c, cols, blocks, rows)


def times(gradient: Tensor, error: Tensor | None, q: Tensor) -> Tensor | None:
    """(e + g) q^T: see `PowerIteration`. A GPU's libraries need no help with this and what follows."""
    return _try("times", gradient, gradient, error, q, modules=_LOW_RANK)


def transposed_times(gradient: Tensor, error: Tensor | None, p: Tensor) -> Tensor | None:
    """p (e + g): see `PowerIteration`."""
    return _try("transposed_times", gradient, gradient, error, p, modules=_LOW_RANK)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Inner products of rows in fp64: see `core.linalg.inner`."""
    return _try("inner", a, a, b, modules=_LOW_RANK)


def keep(error: Tensor, gradient: Tensor, p: Tensor, q: Tensor, bits: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """e <- e + g - p^T q, rounded: see `ErrorFeedback`. Whether it was done."""
    return bool(_try("keep", gradient, error, gradient, p, q, bits, modules=_LOW_RANK))


def _is_flat(x: Tensor) -> bool:
    """One row that is the piece of a whole model (DeepSpeed): kernels divide their work by rows."""
    return x.shape[1] == 1 and x[0].numel() > 2**20


def _try(name: str, example: Tensor, *args, modules: dict[str, str] | None = None):
    kind, modules = example.device.type, modules or _MODULES
    if not example.numel():  # a shard without rows
        return None
    if kind not in modules or kind in _failed or os.environ.get("HF_EFCP_KERNELS", "1") == "0":
        return None
    try:
        return getattr(importlib.import_module(f".{modules[kind]}", __name__), name)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own errors are of many types
        _failed.add(kind)
        if isinstance(error, ModuleNotFoundError):
            _log.info("%s is not installed: steps on %s run in plain torch, which is slower", _NEEDS[kind], kind)
        else:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning("no %s kernels, steps on %s run in plain torch: %s", _NEEDS[kind], kind, what)
        return None
