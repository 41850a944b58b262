"""The operand of every method, a = e + g, and the entry c that a compressor makes of it.

    a.times(q) = a q,   a.transposed_times(p) = a^T p,   a.top_k(grid),   a.rows(rows),   a.keep(c): e <- a - c

torch forms a large a a few rows at a time; a kernel does not form it. Where each process holds some rows, a product that sums
over rows is summed over the processes. A method that uses only these operations runs in every format and on every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels
from ..kernels.devices import kind
from .cells import ALL, Cell
from .linalg import row_chunks, stacked

if TYPE_CHECKING:
    from .compressors import BlockTopK

# A dense entry with fewer rows, or columns, goes to the CPU kernels as a low-rank entry.
_THIN = 8


class Accumulated:
    """a = e + g of n tensors, (n, rows, cols) in the gradients' dtype.

    Args:
        gradients: g, n matrices (rows, cols): a list of them, or a tensor (n, rows, cols). They are not written to.
        error: e; None: e is always 0, since nothing is lost.
        absent: positions of the tensors without a gradient.
        total: where a is some rows of matrices that several processes share, sums a tensor over the processes; None: a is whole.
        scale: x (n, rows) and y (n, cols): diag(x) g diag(y) takes the place of g, see `Metric`. None: g itself.
        decay: a = decay * e + g. Only `rows` and `keep` take a decay other than 1.
        wide: whether sums in products with a may have another order: see `kernels.times`.

    Attributes:
        dtype, device: of the numbers.
    """

    def __init__(
        self,
        gradients: kernels.Matrices,
        error: Cell | None = None,
        absent: Sequence[int] = (),
        total: Callable[[Tensor], Tensor] | None = None,
        scale: kernels.Scale = None,
        decay: float = 1.0,
        wide: bool = False,
    ):
        self.wide = wide
        self.gradients, self.error, self.absent, self.total, self.scale = gradients, error, absent, total, scale
        self.decay = decay
        self.dtype, self.device = gradients[0].dtype, gradients[0].device
        self._chunks = row_chunks(gradients)
        self._formed: Tensor | None = None
        self._used = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, rows, cols), with the rows that this process has."""
        rows, cols = self.gradients[0].shape
        return len(self.gradients), rows, cols

    def rows(self, rows: slice = ALL) -> Tensor:
        """Form rows `rows` of a, (n, rows, cols). Without e, the result is a view or a copy of g."""
        a, copied = stacked(self.gradients, rows), not isinstance(self.gradients, Tensor) and len(self.gradients) > 1
        if self.scale is not None:
            x, y = self.scale
            a, copied = (a.mul_(x[:, rows, None]) if copied else a * x[:, rows, None]).mul_(y[:, None]), True
        if self.error is None:
            return a
        e = self.error.read(rows)
        return a.add_(e, alpha=self.decay) if copied else torch.add(a, e, alpha=self.decay)

    def parts(self) -> Iterable[tuple[slice, Tensor]]:
        """Give pairs (rows, these rows of a) for all rows. A large a is formed a few rows at a time, anew at each call."""
        if len(self._chunks) > 1:
            return ((rows, self.rows(rows)) for rows in self._chunks)
        if self._formed is None:
            self._formed = self.rows()
        return [(ALL, self._formed)]

    def times(self, q: Tensor) -> Tensor:
        """Give a q, (n, rows, r), for q (n, cols, r)."""
        # The factor comes first: CPU libraries are several times slower at a @ q and a.mT @ p.
        q = q.mT.contiguous()
        p = kernels.times(self.gradients, self._stored, q, self.scale, self.wide)
        return torch.cat([(q @ a.mT).mT for _, a in self.parts()], 1) if p is None else p

    def transposed_times(self, p: Tensor) -> Tensor:
        """Give a^T p, (n, cols, r), for p (n, rows, r), summed over the processes that share the rows."""
        q = kernels.transposed_times(self.gradients, self._stored, p.mT, self.scale, self.wide)
        if q is None:
            q = _sum(p[:, rows].mT @ part for rows, part in self.parts())
        return q.mT if self.total is None else self.total(q.mT.contiguous())

    def top_k(self, grid: BlockTopK) -> tuple[Tensor, Tensor]:
        """Give the largest magnitudes of every block: indices in the block, int16 (n, rows, k), and values (n, rows, k)."""
        fast = kernels.top_k(self.gradients, self._stored, grid.blocks, self.scale)
        if fast is not None:
            return fast
        n, rows, _ = self.shape
        shape = n, rows, grid.per_row
        indices = torch.empty(shape, dtype=torch.int16, device=self.device)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in self._chunks:
            grid.choose(self.rows(part), indices[:, part], values[:, part])
        return indices, values

    def extract(self, grid: BlockTopK, step: Tensor) -> SparseEntry:
        """Take the largest magnitudes of every block out of a: give them as an entry, keep the rest. `step`: see Compressor."""
        if self.error is not None and (turn := self.error.turn).ok is True and self.scale is None and self.decay == 1:
            rounding = turn.step, turn.ids, turn.origin
            fast = kernels.extract(self._stored, self.gradients, grid.blocks, rounding, self.absent)
            if fast is not None:
                self._formed, self._used = None, True
                return SparseEntry(fast[0], fast[1], grid)
        entry = grid.compress(self, step)
        self.keep(entry)
        return entry

    def keep(self, entry: Entry) -> None:
        """Compute e <- a - c for the entry c as stored, if the step is accepted. Afterwards a must not be used."""
        error = self.error
        if error is None:
            return
        turn, self._formed, self._used = error.turn, None, True
        rounding = turn.step, turn.ids, turn.origin
        if entry.keep(error.stored, self.gradients, rounding, self.absent, self.scale, self.decay, turn.ok):
            return
        in_place = turn.ok is True and error.buffer.dtype == self.dtype and not self.absent
        for part in self._chunks:
            if in_place and self.scale is None and self.decay == 1:
                entry.subtract_from_(error.buffer[:, part].add_(stacked(self.gradients, part)), part)
            else:
                error.write(entry.subtract_from_(self.rows(part), part), part)

    @property
    def _stored(self) -> kernels.Error:
        if self._used:
            raise RuntimeError("a.keep(c) has changed e, and so a: use a before")
        return None if self.error is None else self.error.stored


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Tensor | int = 0
    for term in terms:
        total = total + term
    assert isinstance(total, Tensor)
    return total


class Entry:
    """What the three kinds of entries share.

    Attributes:
        parts: the tensors that make up the entry; the first dimension is n.
    """

    parts: tuple[Tensor, ...]

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """Compute a <- a - c in place for rows `rows` of c, (n, rows, cols); return a."""
        raise NotImplementedError

    def keep(
        self,
        error: kernels.Error,
        gradients: kernels.Matrices,
        rounding: kernels.Rounding,
        absent: Sequence[int],
        scale: kernels.Scale,
        decay: float,
        accepted: bool | Tensor,
    ) -> bool:
        """Compute e <- decay * e + g - c by a kernel if `accepted`, except for tensors `absent`; tell whether it was done."""
        return False


class DenseEntry(Entry):
    """c as it is, (n, rows, cols)."""

    def __init__(self, c: Tensor):
        self.parts = (c,)

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """See Entry."""
        return a.sub_(self.parts[0][:, rows])

    def keep(
        self,
        error: kernels.Error,
        gradients: kernels.Matrices,
        rounding: kernels.Rounding,
        absent: Sequence[int],
        scale: kernels.Scale,
        decay: float,
        accepted: bool | Tensor,
    ) -> bool:
        """See Entry. On a CPU, a thin c is given to the kernel as low rank, c = I c or c I; without rounding torch is faster."""
        (c,) = self.parts
        if kind(c.device) != "cpu":
            return kernels.keep(error, gradients, (c,), rounding, absent, None, scale, decay, accepted)
        exact = error is not None and error[0].dtype == gradients[0].dtype
        shorter = min(c.shape[1:])
        if shorter >= _THIN or exact:
            return False
        one = torch.eye(shorter, dtype=c.dtype, device=c.device).expand(len(c), -1, -1).contiguous()
        factors = (one, c) if c.shape[1] == shorter else (c.mT.contiguous(), one)
        return kernels.keep(error, gradients, factors, rounding, absent, None, scale, decay, accepted)


class LowRankEntry(Entry):
    """c = P Q^T, held as P^T (n, r, rows) and Q^T (n, r, cols).

    Args:
        p, q: P^T and Q^T.
        wide: see Accumulated.
    """

    def __init__(self, p: Tensor, q: Tensor, wide: bool = False):
        self.parts, self.wide = (p, q), wide

    @classmethod
    def of(cls, p: Tensor, q: Tensor, wide: bool = False) -> LowRankEntry:
        """Make the entry of P (n, rows, r) and Q (n, cols, r)."""
        return cls(p.mT.contiguous(), q.mT.contiguous(), wide)

    def subtract_from_(self, a: Tensor, rows: slice = ALL) -> Tensor:
        """See Entry."""
        p, q = (part.to(a.dtype) for part in self.parts)
        return a.baddbmm_(p[..., rows].mT, q, alpha=-1)

    def dense(self, rows: slice = ALL) -> Tensor:
        """Form rows `rows` of c, (n, rows, cols)."""
        return self.parts[0][..., rows].mT @ self.parts[1]

    def keep(
        self,
        error: kernels.Error,
        gradients: kernels.Matrices,
        rounding: kernels.Rounding,
        absent: Sequence[int],
        scale: kernels.Scale,
        decay: float,
        accepted: bool | Tensor,
    ) -> bool:
        """See Entry."""
        p, q = self.parts
        return kernels.keep(error, gradients, (p, q), rounding, absent, None, scale, decay, accepted, self.wide)


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

    def keep(
        self,
        error: kernels.Error,
        gradients: kernels.Matrices,
        rounding: kernels.Rounding,
        absent: Sequence[int],
        scale: kernels.Scale,
        decay: float,
        accepted: bool | Tensor,
    ) -> bool:
        """See Entry."""
        blocks = self.grid.blocks
        return kernels.keep(error, gradients, (self.parts[0], self.parts[1]), rounding, absent, blocks, scale, decay, accepted)

    def dense(self) -> Tensor:
        """Form c, (n, rows, cols)."""
        indices, values = self.parts
        c = torch.zeros(*indices.shape[:2], self.grid.cols, dtype=values.dtype, device=values.device)
        return c.scatter_(2, self.grid.columns(indices), values)
