"""The counters of a run, kept on the device, so that counting does not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Counters:
    """Steps taken and refused.

    Attributes:
        step: 0-D int64, the number of accepted steps so far.
        skipped: 0-D int64, the number of steps that were refused for a gradient that is not finite.
    """

    def __init__(self, device: torch.device):
        # The state's entry, and a copy of it that is counted too, but that nobody else can write to.
        self._steps = torch.zeros(2, dtype=torch.int64, device=device)
        self.step = self._steps[0]
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Begin a step, which `undo` can take back."""

    def undo(self) -> None:
        """Take back a step that ended before it wrote anything else."""

    def count(self, ok: bool | Tensor = True) -> None:
        """Count a step as accepted or as refused."""
        if ok is not True:
            self.skipped += ~ok if isinstance(ok, Tensor) else 1
        if ok is not False:
            self._steps += ok

    def zeroed(self) -> bool:
        """Tell whether somebody else has set the number of steps to zero."""
        return bool(self.step == 0) and bool(self._steps[1] > 0)

    def restore(self) -> None:
        """Set the number of steps in the state to the copy's."""
        self.step.copy_(self._steps[1])

    def believe(self) -> None:
        """Set the copy to the number of steps in the state."""
        self._steps[1] = self.step

    def go_on(self, before: Counters) -> None:
        """Continue the counts of other counters."""
        self._steps.copy_(before._steps[1])
        self.skipped.copy_(before.skipped)

    def release(self) -> None:
        """Free the memory."""

    def entries(self, number: int) -> dict[str, Tensor]:
        """Give the counters that the state of parameter `number` may hold: name -> tensor, which shares their memory.

        The tensors are new objects, so that `t.data = ...` on one of them does not move the counters.
        """
        return {"counter": self.step.view(()), "skipped": self.skipped.view(())}
