"""The columns of a fixed basis that a matrix lies along most: their choice, and products with them (arXiv 2505.17967).

A (long x short) is a, or a^T where a has fewer rows than columns. D is the cosine basis of the short side (`core/dct.py`).

    S = A D,   i = the r columns of S of largest norm, in ascending order,   D_i = D[:, i],   h = A D_i = S[:, i]
    a's entry of h: h D_i^T, or its transpose;   |A - h D_i^T|^2 = |S|^2 - |h|^2, as D is orthonormal

Where each process holds some rows of a, S or its norms are summed over the processes, so that all choose the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .accumulated import Accumulated, LowRankEntry
from .cells import ALL, Layout, Spec
from .dct import basis, transform
from .linalg import chunk_bytes, chunks, room_bytes
from .values import Values

# Norms that differ by less than this many rounding errors count as equal. Of equal ones, the first is chosen, on any number of
# processes.
_ALIKE = 256


class Columns:
    """Chooses r columns for matrices of one shape.

    Args:
        layout: of the whole matrices.
        rank: the largest r. r is clamped to the shorter side.
        ell_norm: 1 or 2, the norm by which columns are chosen.
        method: how S is formed, see `dct.transform`.
        here: the rows that this process holds, where each process holds some rows.
        total: sums a tensor in place over those processes; None: the matrices are whole.

    Attributes:
        left: whether the rows are the shorter side.
        short, long: sides of the whole matrix.
        rank: r.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        ell_norm: int = 1,
        method: str = "auto",
        here: slice = ALL,
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        self.layout, self.left = layout, layout.rows < layout.cols
        self.short, self.long = (layout.rows, layout.cols) if self.left else (layout.cols, layout.rows)
        self.rank = min(rank, self.short)
        self._ell, self._method, self._here, self._total = ell_norm, method, here, total

    @classmethod
    def of(cls, s: Any, o: Any) -> Columns:
        """Make the object for a stack and the options of `ColumnsOptions`."""
        start = s.turn.origin[0]
        return cls(s.layout, o.rank, o.ell_norm, o.dct_method, slice(start, start + s.shape[0]), s.total)

    def spec(self) -> Spec:
        """Declare i, (r,) int32, the same on every process."""
        last = self.short - 1

        def sure(x: Tensor) -> Tensor:
            return (x[:, 1:] > x[:, :-1]).all() & (x[:, 0] >= 0).all() & (x[:, -1] <= last).all()

        def exact(entry: Mapping[str, Tensor]) -> Tensor:
            return ~entry["indices"].any() & (entry["step"] == 0).all()  # indices before the first step are 0

        return Spec("indices", (self.rank,), torch.int32, values=Values(f"indices 0 ... {last}, ascending", sure, exact))

    def follows(self) -> int | None:
        """Give the dimension of entries (long, r) that goes with the matrix's rows."""
        return None if self.left else 0

    def choose(self, a: Accumulated) -> tuple[Tensor, Tensor]:
        """Give i (n, r) int64, and h (n, long, r). If a's rows are the long side, h has the rows that this process holds."""
        parts = self._transformed(a)
        s = next(parts)
        norms, one = self._norms(s), True
        for s in parts:
            norms, one = norms + self._norms(s), False
        if not self.left and self._total is not None:
            norms = self._total(norms)
        i = self._best(norms)
        return i, picked(s, i) if one else self.times(a, self.vectors(i))

    def _transformed(self, a: Accumulated) -> Iterator[Tensor]:
        """Give S, (n, long, short), some of its rows at a time, so that it takes little memory beside a."""
        if not self.left:
            for _, part in a.parts():
                yield transform(part, self._method)
            return
        whole = a.rows().mT
        n, long, _ = whole.shape
        room = chunk_bytes(a.device) if self._total is None else room_bytes(a.device)  # each part is a sum over processes
        d = basis(self.short, a.dtype, a.device)[self._here].expand(n, -1, -1)
        for some in chunks(long, n * self.short * a.dtype.itemsize, room):
            if self._total is None:
                yield transform(whole[:, some], self._method)
            else:
                yield self._total(torch.bmm(whole[:, some], d))

    def _norms(self, s: Tensor) -> Tensor:
        """Give the columns' 1-norms, or the squares of their 2-norms, (n, short) fp64."""
        if self._ell == 1:
            return s.abs().sum(1).double()
        return torch.linalg.vector_norm(s, dim=1, dtype=torch.float64).square()  # squares would leave fp32's range

    def _best(self, norms: Tensor) -> Tensor:
        unit = norms.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) * torch.finfo(self.layout.dtype).eps
        order = (norms / (_ALIKE * unit)).round().sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.rank].sort(dim=1).values

    def vectors(self, i: Tensor) -> Tensor:
        """Give D_i^T, (n, r, short). If a's rows are the short side, it is for the rows that this process holds."""
        d = basis(self.short, self.layout.dtype, i.device)
        return (d[self._here] if self.left else d).mT[i]

    def times(self, a: Accumulated, vectors: Tensor) -> Tensor:
        """Give h = A D_i, (n, long, r)."""
        return a.transposed_times(vectors.mT) if self.left else a.times(vectors.mT)

    def entry(self, vectors: Tensor, h: Tensor) -> LowRankEntry:
        """Make a's entry from D_i^T and h: h D_i^T or its transpose."""
        h = h.mT.contiguous()
        return LowRankEntry(vectors, h, wide=True) if self.left else LowRankEntry(h, vectors, wide=True)


def picked(x: Tensor, i: Tensor) -> Tensor:
    """Give columns i (n, r) of x (n, long, size)."""
    return x.gather(2, i[:, None].expand(-1, x.shape[1], -1))


def carried(x: Tensor, old: Tensor, new: Tensor, size: int) -> Tensor:
    """Give x (n, long, r), whose columns belong to the basis columns `old` (n, r), for the basis columns `new` (n, r).

    A basis column that was not in `old` gets 0. The result is x D_old^T D_new, since the basis of `size` columns is orthonormal.
    """
    slots = torch.arange(old.shape[1], device=old.device).expand_as(old)
    place = torch.full((len(old), size), -1, device=old.device).scatter_(1, old, slots).gather(1, new)
    return torch.where((place >= 0)[:, None], picked(x, place.clamp_min(0)), 0.0)
