"""The kind of a device, on which the way of a step depends; pretending to another, to count what a GPU would do.

And tables of addresses on a device, which have to live as long as a CUDA graph that reads them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

# Where kernels put the tables that they read; None: nobody wants them.
TABLES: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("hf_efcp_tables", default=None)
_PRETENDED: contextvars.ContextVar[str | None] = contextvars.ContextVar("hf_efcp_device", default=None)


def kind(device: torch.device) -> str:
    """Give the device's type, "cpu" or "cuda", or the one that `pretending` names."""
    return _PRETENDED.get() or device.type


@contextlib.contextmanager
def pretending(type: str) -> Iterator[None]:
    """Let all devices be of this type inside, in this thread: fake tensors on a CPU then go the way of a GPU."""
    token = _PRETENDED.set(type)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


@contextlib.contextmanager
def keeping(tables: list[Tensor]) -> Iterator[None]:
    """Let kernels add the tables of addresses that they read to this list inside, in this thread."""
    token = TABLES.set(tables)
    try:
        yield
    finally:
        TABLES.reset(token)
