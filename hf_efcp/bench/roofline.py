"""The least that a step can cost at a machine's rates. Each method counts its own steps (`EngineOptimizer.costs`).

Counts are lower bounds for the method, not for this code: every input is read once for each pass that the data flow forces, every
output written once, and what is made and used within one tensor stays in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..engine.costs import Count


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
