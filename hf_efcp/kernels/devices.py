"""The kind of a device, on which the way of a step depends; and pretending to another, to count what a GPU would do."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

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
