"""The Gram matrix K = G G^T of the window. A step replaces one row and one column, so that K never drifts."""

from __future__ import annotations

import torch
from torch import Tensor

from .counters import Counters
from .deferred import masked

# By how much inner products of equal entries may differ, relative to the norms, where products are in fp32.
_ROUNDING = 1e-5


class GramMatrix(Counters):
    """K and the position in the ring, for `groups` independent windows: one for the whole model, or one for each tensor.

    Args:
        groups: number of Gram matrices.
        window_size: m.
        device: where K is.

    Attributes:
        matrix: (groups, m, m) fp64.
    """

    def __init__(self, groups: int, window_size: int, device: torch.device):
        super().__init__(device)
        self.matrix = torch.zeros(groups, window_size, window_size, dtype=torch.float64, device=device)
        self._before: tuple[Tensor, ...] = ()

    def begin(self) -> None:
        """See Counters."""
        self._before = ()

    def undo(self) -> None:
        """See Counters."""
        if self._before:
            j, row, steps, skipped = self._before
            self._put(j, row)
            self._steps.copy_(steps)
            self.skipped.copy_(skipped)

    def release(self) -> None:
        """See Counters."""
        self.matrix = self.matrix.new_zeros(0, 0, 0)

    def entries(self, number: int) -> dict[str, Tensor]:
        """See Counters."""
        own = (
            {"gram": self.matrix[min(number, len(self.matrix) - 1)]} if len(self.matrix) else {}
        )  # scope="layer" without tensors
        return {**own, "step": self.step.view(()), "skipped": self.skipped.view(())}

    @property
    def window_size(self) -> int:
        """m, the number of slots."""
        return self.matrix.shape[-1]

    @property
    def filled(self) -> Tensor:
        """Give min(t, m), the number of slots written, 0-D int64."""
        return self.step.clamp_max(self.window_size)

    @property
    def filled_slots(self) -> Tensor:
        """Tell which slots are written, (m,) bool."""
        return torch.arange(self.window_size, device=self.step.device) < self.filled

    def mean_square(self) -> Tensor:
        """Give the mean squared norm of the entries, (groups,) fp64."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / self.filled

    def next_slot(self) -> Tensor:
        """Give the slot that the next entry goes into, (1,) int64: the slot of the oldest entry."""
        return (self.step % self.window_size).view(1)

    def update(self, j: Tensor, k_j: Tensor, accepted: bool | Tensor = True) -> Tensor:
        """Put k_j, the inner products of the new entry, into row and column j; give K.

        If the step is not `accepted`, it is counted as refused, and nothing else changes.

        Args:
            j: (1,) int64, the slot.
            k_j: (groups, m) fp64.
            accepted: True, or a 0-D bool tensor on the device.
        """
        row = self.matrix.index_select(1, j).squeeze(1)
        self._before = j, row, self._steps.clone(), self.skipped.clone()
        self._put(j, masked(accepted, k_j, row))
        self.count(accepted)
        return self.matrix

    def _put(self, j: Tensor, row: Tensor) -> None:
        self.matrix.index_copy_(1, j, row[:, None, :])
        self.matrix.index_copy_(2, j, row[:, :, None])

    def agrees(self, slot: int, row: Tensor) -> Tensor:
        """Tell for each Gram matrix whether `row`, (groups, m), is its row `slot`, up to rounding: (groups,) bool."""
        norms = self.matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        bound = _ROUNDING * norms * torch.maximum(norms[:, slot], row[:, slot].sqrt())[:, None]
        return ((row - self.matrix[:, slot]).abs() <= bound).all(1)

    def put(self, slot: int, row: Tensor, which: Tensor) -> None:
        """Put an entry's inner products, (groups, m), into a row and column of the Gram matrices `which`, (groups,) bool."""
        self.matrix[which, slot] = row[which]
        self.matrix[which, :, slot] = row[which]

    def ages(self, j: Tensor) -> Tensor:
        """Count how many steps ago each slot was written, (m,) int64. A slot that was never written has a larger age than these.

        Args:
            j: (1,) int64, the newest slot.
        """
        return (j - torch.arange(self.window_size, device=j.device)) % self.window_size
