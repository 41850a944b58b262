"""Entries c of a window, for n tensors at once, as compressors make them and as windows store them.

The error feedback takes the entry as stored: e <- a - c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels

if TYPE_CHECKING:
    from .compressors import BlockTopK

ALL = slice(None)


class Entry:
    """What the three kinds share.

    Attributes:
        parts: the tensors that make up the entry; the first dimension is n.
    """

    parts: tuple[Tensor, ...]

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """Compute a <- a - c in place for rows `rows` of c, (n, rows, cols); return a."""
        raise NotImplementedError

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """Compute e <- e + g - c in place by a kernel, but for the tensors `absent`; tell whether it was done."""
        return False


class DenseEntry(Entry):
    """c as it is, (n, rows, cols)."""

    def __init__(self, c: Tensor):
        self.parts = (c,)

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """See Entry."""
        return a.sub_(self.parts[0][:, rows])


class LowRankEntry(Entry):
    """c = P Q^T, held as P^T (n, r, rows) and Q^T (n, r, cols)."""

    def __init__(self, p: Tensor, q: Tensor):
        self.parts = (p, q)

    @classmethod
    def of(cls, p: Tensor, q: Tensor) -> LowRankEntry:
        """Take P (n, rows, r) and Q (n, cols, r)."""
        return cls(p.mT.contiguous(), q.mT.contiguous())

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """See Entry."""
        p, q = (part.to(a.dtype) for part in self.parts)
        return a.baddbmm_(p[..., rows].mT, q, alpha=-1)

    def rows(self, rows: slice = ALL) -> Tensor:
        """Form rows `rows` of c, (n, rows, cols)."""
        return self.parts[0][..., rows].mT @ self.parts[1]

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """See Entry."""
        return kernels.keep_low_rank(error, gradients, (self.parts[0], self.parts[1]), rounding, absent)


class SparseEntry(Entry):
    """The kept entries of every row: indices in their block, int16 (n, rows, k), and values (n, rows, k).

    Args:
        indices, values: as above.
        grid: the blocks.
    """

    def __init__(self, indices: Tensor, values: Tensor, grid: BlockTopK):
        self.parts, self.grid = (indices, values), grid

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """See Entry."""
        indices, values = (part[:, rows] for part in self.parts)
        return a.scatter_add_(2, self.grid.columns(indices), -values.to(a.dtype))

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """See Entry."""
        return kernels.keep_sparse(error, gradients, (self.parts[0], self.parts[1]), self.grid.blocks, rounding, absent)

    def dense(self) -> Tensor:
        """Form c, (n, rows, cols)."""
        indices, values = self.parts
        c = torch.zeros(*indices.shape[:2], self.grid.cols, dtype=values.dtype, device=values.device)
        return c.scatter_(2, self.grid.columns(indices), values)
