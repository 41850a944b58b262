"""Phases of a step, named where they are: `with phase("compress"): ...`, which costs nothing when nobody measures."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# What is called with a phase's name when the phase begins; the context that it returns is left when the phase ends.
Listener = Callable[[str], AbstractContextManager[object]]

# In the order of a step. What lies between phases (the gate, messages between processes) is in none of them.
PHASES = ("compress", "dots", "feedback", "solve", "update")

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("hf_efcp_phases", default=None)
_UNHEARD: AbstractContextManager[object] = contextlib.nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """Mark a phase of the step; `name` is one of PHASES."""
    listener = _listener.get()
    return _UNHEARD if listener is None else listener(name)


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of every phase that begins inside, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
