"""Work that is due in every k-th step of a tensor only, without reading the count from a GPU at each step."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from ..core.deferred import readable


class Interval:
    """Tells for which tensors of a stack some work is due. Each kind of work has an `Interval` of its own."""

    def __init__(self) -> None:
        self._quiet = 0  # the number of coming steps in which certainly nothing is due

    def due(self, t: Tensor, absent: Container[int], steps: int, first: int = 1) -> list[int]:
        """Give the positions of the tensors whose count is `first`, or a larger multiple of `steps`.

        A GPU's counts are read when work may be due, and in the step after: the step before may turn out to be refused.

        Args:
            t: (n, 1, 1), the number of each tensor's gradients, this one included.
            absent: positions of the tensors without a gradient.
            steps: the interval.
            first: the first count.
        """
        if self._quiet:
            self._quiet -= 1
            return []
        counts = [int(count) for count in t.flatten().tolist()]
        due = [i for i, count in enumerate(counts) if count == first or (count > first and count % steps == 0)]
        if not due and not readable(t.device):
            self._quiet = min(steps - count % steps if count >= first else first - count for count in counts) - 1
        return [i for i in due if i not in absent]
