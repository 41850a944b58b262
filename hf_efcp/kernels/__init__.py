"""Fast versions of what a step does most, chosen by device: Triton on GPUs, numba on CPUs where it is installed.

Plain torch, in core, is what they are tested against and what runs without them: an operation here returns None where no
kernel can do it, and the caller goes on in torch. Nothing is compiled before it is first used. HF_EFCP_KERNELS=0 in the
environment turns all of them off.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# Length of a block, entries kept in each, entries kept in a shorter last one (0: there is none).
Blocks = tuple[int, int, int]
# A sparse window: indices and values (n, rows, m, k), and None; or, in 16 bits (`codecs.SparseCodec`), entries, None, and scales
# (n, rows, m, blocks).
Stored = tuple[Tensor, Tensor | None, Tensor | None]
# The error feedback: (n, rows, cols) and None, or codes and their scales (`codecs.BlockQuantizer`); None: there is none.
Error = tuple[Tensor, Tensor | None] | None
# The step, a number per tensor, and the row and column at which the tensors begin: see `core.linalg.counted_bits`.
Rounding = tuple[Tensor, Tensor, tuple[int, int]]

_log = logging.getLogger("hf_efcp")
# Device type -> module, in which all operations have the same signatures.
_SPARSE = {"cpu": "cpu_sparse", "cuda": "gpu_sparse"}
_LOW_RANK = {"cpu": "cpu_low_rank"}  # a GPU's libraries need no help with these
_NEEDS = {"cpu": "numba", "cuda": "triton"}
_failed: set[str] = set()

# What follows takes the gradients of n tensors of one shape as a sequence of matrices (rows, cols): nobody has to copy them
# together. A tensor (n, rows, cols) is one too.


def top_k(gradients: Sequence[Tensor], error: Error, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of every block of e + g: see `BlockTopK`."""
    return _try(_SPARSE, "top_k", gradients[0], gradients, error, blocks)


def dots(stored: Stored, row: tuple[Tensor, Tensor], cols: int, blocks: Blocks) -> Tensor | None:
    """Inner products of a sparse row with a sparse window, (n, m) fp64: see `SparseWindow`."""
    return _try(_SPARSE, "dots", stored[0][0], stored, row, cols, blocks)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Rows `rows` of G^T c for a sparse window: see `SparseWindow`."""
    return _try(_SPARSE, "combine", stored[0][0], stored, c, cols, blocks, rows)


def apply(stored: Stored, c: Tensor, cols: int, blocks: Blocks, params: Sequence[Tensor], scale: float, decay: float) -> bool:
    """p <- decay * p + scale * G^T c for a sparse window, in place: see `SparseWindow`. Whether it was done."""
    return bool(_try(_SPARSE, "apply", stored[0][0], stored, c, cols, blocks, params, scale, decay))


def keep_sparse(
    error: Error,
    gradients: Sequence[Tensor],
    row: tuple[Tensor, Tensor],
    blocks: Blocks,
    rounding: Rounding,
    absent: Sequence[int],
) -> bool:
    """e <- e + g - c, rounded, for a sparse row c: see `ErrorFeedback`. Whether it was done."""
    return bool(_try(_SPARSE, "keep_sparse", gradients[0], error, gradients, row, blocks, rounding, absent))


def times(gradients: Sequence[Tensor], error: Error, q: Tensor) -> Tensor | None:
    """(e + g) q^T: see `PowerIteration`."""
    return _try(_LOW_RANK, "times", q[0], gradients, error, q)


def transposed_times(gradients: Sequence[Tensor], error: Error, p: Tensor) -> Tensor | None:
    """p (e + g): see `PowerIteration`."""
    return _try(_LOW_RANK, "transposed_times", p[0], gradients, error, p)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Inner products of rows in fp64: see `core.linalg.inner`."""
    return _try(_LOW_RANK, "inner", a, a, b)


def keep_low_rank(
    error: Error, gradients: Sequence[Tensor], row: tuple[Tensor, Tensor], rounding: Rounding, absent: Sequence[int]
) -> bool:
    """e <- e + g - p^T q, rounded, for the row (p, q): see `ErrorFeedback`. Whether it was done."""
    return bool(_try(_LOW_RANK, "keep_low_rank", gradients[0], error, gradients, row, rounding, absent))


def _try(modules: dict[str, str], name: str, example: Tensor, *args):
    """The operation by the device of `example`; None where there is no rows' work to divide, or no kernel."""
    kind = example.device.type
    if not example.numel():  # a shard without rows
        return None
    if modules is _SPARSE and len(example) == 1 and example.numel() > 2**20:
        return None  # a piece of a whole model (DeepSpeed) as one row, and kernels divide their work by rows
    if kind not in modules or kind in _failed or os.environ.get("HF_EFCP_KERNELS", "1") == "0":
        return None
    try:
        operation = getattr(importlib.import_module(f".{modules[kind]}", __name__), name, None)
        return None if operation is None else operation(*args)
    except (torch.OutOfMemoryError, MemoryError):  # of one that writes in place, a part may be done
        raise
    except Exception as error:  # the compiler's own errors are of many types
        _failed.add(kind)
        if isinstance(error, ModuleNotFoundError):
            _log.info("%s is not installed: steps on %s run in plain torch, which is slower", _NEEDS[kind], kind)
        else:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning("no %s kernels, steps on %s run in plain torch: %s", _NEEDS[kind], kind, what)
        return None
