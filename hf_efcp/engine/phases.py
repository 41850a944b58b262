"""The phases of a step. The step names each phase where it begins, which costs nothing when nobody measures.

phase = listener()
with phase("compress"): ...
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from ..kernels.devices import constant

# Is called with a phase's name when the phase begins. The context that it returns is left when the phase ends.
Listener = Callable[[str], AbstractContextManager[object]]

# In the order of a step. Work between phases (the gate, messages between processes) belongs to no phase.
PHASES = ("compress", "dots", "feedback", "solve", "update")

# Who hears of the phases in this thread; by default nobody.
LISTENER: contextvars.ContextVar[Listener] = contextvars.ContextVar("hf_efcp_phases", default=contextlib.nullcontext)


@constant
def listener() -> Listener:
    """Give the listener that hears of the phases in this thread."""
    return LISTENER.get()


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of every phase that begins inside, in this thread."""
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)
