"""The least that a step can cost: operations that must be done, bytes that must move. Derivation: docs/benchmarks/roofline.md.

Counts are lower bounds for the method, not for this code: every input is read once for each pass that the data flow forces, every
output written once, and what is made and used within one tensor stays in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.compressors import BlockTopK, PowerIteration
from ..engine.costs import Count
from ..optim.ggt import GGTOptions
from ..optim.stacks import Stack, compute_dtype


def count(optimizer: Any) -> dict[str, Count]:
    """Phase -> count of one step of a WindowedOptimizer with a full window, all parameters having gradients."""
    found = {phase: Count() for phase in ("compress", "dots", "feedback", "solve", "update")}
    for s in optimizer._prepare():
        for phase, part in _of_stack(s, optimizer.options).items():
            found[phase] += part
    gram = optimizer._gram.matrix
    groups, m, _ = gram.shape
    # An eigendecomposition: tridiagonal form 4/3, its eigenvectors 4/3, turning them back 2. Cholesky and two triangular systems.
    eigen, cholesky = 14 / 3 * m**3, m**3 / 3 + 2 * m**2
    operations = eigen if isinstance(optimizer.options, GGTOptions) else cholesky
    found["solve"] += Count(fp64=groups * operations, bytes=gram.nbytes + 2 * groups * m * 8)
    return found


def _of_stack(s: Stack, options: Any) -> dict[str, Count]:
    """n tensors of d = rows x cols entries, of which `full` operations of the compute dtype touch all."""
    n, (rows, cols) = len(s.pieces), s.pieces[0].shape
    m, d = options.window_size, n * rows * cols
    p = s.pieces[0].param
    window = sum(buffer.nbytes for buffer in s.window.state.values())
    row, error = window / m, 0 if s.feedback.error is None else s.feedback.error.nbytes
    momentum = 0 if s.momentum is None else s.momentum.nbytes
    compress = Count(bytes=d * p.element_size() + error)
    if options.weight_decay_mode == "l2":
        compress.bytes += d * p.element_size()
    feedback = Count(bytes=error + row)
    update = Count(bytes=window + 2 * d * p.element_size() + 2 * momentum)
    dots = Count(bytes=window - row)  # slot j is replaced; the new row is at hand
    arithmetic: tuple[float, float, float]  # operations in the compute dtype, of compress, feedback, update
    if isinstance(s.compressor, PowerIteration):
        r = s.compressor.q.shape[2]
        compress.bytes += s.compressor.q.nbytes
        feedback.bytes += s.compressor.q.nbytes
        arithmetic = (4 * d * r * s.compressor.power_iterations, 2 * d * r, 2 * d * m * r)
        dots.fp64 = 2 * m * r * r * n * (rows + cols)
    elif isinstance(s.compressor, BlockTopK):
        kept = n * rows * s.compressor.per_row
        arithmetic = (0, kept, 2 * m * kept)
        dots.fp64 = 2 * m * kept
    else:
        arithmetic = (0, 0, 2 * m * d)
        dots.fp64 = 2 * m * d
    precision = "fp64" if compute_dtype(p) == torch.float64 else "fp32"
    for part, operations in zip((compress, feedback, update), arithmetic, strict=True):
        setattr(part, precision, float(operations))
    return {"compress": compress, "dots": dots, "feedback": feedback, "update": update}


def adamw(params: Sequence[torch.Tensor]) -> dict[str, Count]:
    """AdamW in the parameters' dtype: the gradient is read; the parameter and two moments are read and written."""
    return {"update": Count(bytes=7 * sum(p.numel() * p.element_size() for p in params))}


def report(counts: Mapping[str, Count], rates: Mapping[str, float]) -> dict[str, object]:
    """Milliseconds of the whole and of its phases; the whole is max(all operations, all bytes)."""
    total = sum(counts.values(), Count())
    times = total.seconds(rates)
    return {
        "ms": 1e3 * max(times.values()),
        "bound": max(times, key=times.__getitem__),
        "compute_ms": 1e3 * times["compute"],
        "memory_ms": 1e3 * times["memory"],
        **dataclasses.asdict(total),
        "phases_ms": {phase: 1e3 * max(part.seconds(rates).values()) for phase, part in counts.items()},
    }
