"""Steps that raise. If nothing has changed yet, the step is undone; if something has changed, that is remembered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .setup import Setup


class Torn:
    """Whether a step of an optimizer has ended half-way.

    Args:
        name: of the optimizer's class.
    """

    def __init__(self, name: str):
        self._name = name
        self._error: str | None = None

    def __bool__(self) -> bool:
        return self._error is not None

    @contextlib.contextmanager
    def watch(self, setup: Setup) -> Iterator[None]:
        """Undo a step that raises before it writes, or remember that it has changed a part of state and parameters."""
        setup.writing = False
        setup.counters.begin()
        try:
            yield
        except BaseException as error:
            if setup.writing:
                self._error = type(error).__name__
            else:
                setup.counters.undo()
            raise

    def refuse(self) -> None:
        """Raise RuntimeError where a step has ended half-way."""
        if self:
            raise RuntimeError(
                f"{self._name}: a step ended half-way, in {self._error}, and has changed a part of state and parameters: load a "
                "checkpoint of the model and of the optimizer (load_state_dict), or begin anew"
            )

    def mended(self) -> None:
        """Note that state and parameters are whole again."""
        self._error = None
