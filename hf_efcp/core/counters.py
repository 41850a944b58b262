"""What a run counts, on the device, so that nobody waits for it."""

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
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Begin a step, which `undo` can take back."""

    def undo(self) -> None:
        """Be as before a step that has ended before it wrote anything else."""

    def count(self, ok: bool | Tensor = True) -> None:
        """Count a step, as refused where it is not accepted."""
        if ok is not True:
            self.skipped += ~ok if isinstance(ok, Tensor) else 1
        if ok is not False:
            self.step += ok

    def release(self) -> None:
        """Let go of what takes memory."""

    def entries(self, number: int) -> dict[str, Tensor]:
        """Give what the state of parameter `number` may hold of the counters: name -> tensor, in their memory."""
        return {"counter": self.step, "skipped": self.skipped}
