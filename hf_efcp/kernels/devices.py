"""The kind of a device, which decides how a step runs. One can pretend another kind, to count what a GPU would do."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class _Written(threading.local):
    """How much CPU kernels that this thread called have done. Torch must not repeat work that is partly done.

    Attributes:
        turns: the number of parts of their work that are done.
    """

    turns = 0


WRITTEN = _Written()
_PRETENDED: contextvars.ContextVar[str | None] = contextvars.ContextVar("hf_efcp_device", default=None)


def constant(function: Function) -> Function:
    """Mark a function so that torch.compile takes its result for a constant: it cannot look into a context variable.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler, whether anybody compiles or not.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def kind(device: torch.device) -> str:
    """Give the device's type, "cpu" or "cuda", or the one that `pretending` names."""
    return _PRETENDED.get() or device.type


def is_plain(x: Tensor) -> bool:
    """Tell whether a kernel can write to x itself, rather than to a copy: contiguous, and not a lazy negative."""
    return x.is_contiguous() and (torch.compiler.is_compiling() or not x.is_neg())  # dynamo knows no is_neg


@contextlib.contextmanager
def pretending(type: str) -> Iterator[None]:
    """Let `kind` give this type for every device inside, in this thread: fake tensors on a CPU then go the way of a GPU."""
    token = _PRETENDED.set(type)
    try:
        yield
    finally:
        _PRETENDED.reset(token)
