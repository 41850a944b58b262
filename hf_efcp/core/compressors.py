"""Compressors: from the accumulated gradient a = e + g to an entry of the window.

A compressor has `compress(a, step)`, a pure function of its arguments and of the compressor's state. `commit()` then makes the
state that `compress` has prepared the current state. A refused step has no `commit`, or has a flag in the cells' turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .accumulated import Accumulated, DenseEntry, Entry, LowRankEntry, SparseEntry
from .cells import Cell
from .deferred import readable
from .linalg import orthonormalize
from .random import counted_noise

# A column of Q is nothing but rounding errors if it is at most this many times eps as long as the longest column.
DEAD = 32


class Compressor:
    """What every compressor offers."""

    def compress(self, a: Accumulated, step: Tensor) -> Entry:
        """Make the entry of a, which is zero for tensors without a gradient. `step`: the number of the step, 0-D int64."""
        raise NotImplementedError

    def commit(self) -> None:
        """Keep the state that `compress` has prepared for the next step, if this step is accepted."""


class Identity(Compressor):
    """C(a) = a."""

    def compress(self, a: Accumulated, step: Tensor) -> DenseEntry:
        """See Compressor."""
        c = a.rows()
        for i in a.absent:
            c[i] = 0
        return DenseEntry(c)


class BlockTopK(Compressor):
    """The entries of largest magnitude in every block of every row (EFCP, section 4). Which of equal ones are kept is open.

    A block is a run of `block_size` entries in a row. The last block of a row may be shorter, and keeps at least one entry too.

    Args:
        cols: length of a row.
        density: fraction of each block that is kept, in (0, 1].
        block_size: length of a block, at most 32768.
    """

    def __init__(self, cols: int, density: float, block_size: int):
        self.cols = cols
        self.block = max(1, min(block_size, cols))
        self.full, self.tail = divmod(cols, self.block)
        self.kept = self._kept(self.block, density)
        self.kept_tail = self._kept(self.tail, density) if self.tail else 0
        self._offsets: dict[torch.device, Tensor] = {}

    @staticmethod
    def _kept(length: int, density: float) -> int:
        return max(1, round(density * length))

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Length of a block, entries kept in each block, entries kept in a shorter last block (0: there is none)."""
        return self.block, self.kept, self.kept_tail

    @property
    def per_row(self) -> int:
        """k, the number of entries kept in each row."""
        return self.full * self.kept + self.kept_tail

    def offsets(self, device: torch.device) -> Tensor:
        """Give the first column of the block that each kept entry of a row lies in, (k,) int64."""
        if device not in self._offsets:
            full = torch.arange(self.full, device=device).repeat_interleave(self.kept) * self.block
            tail = torch.full((self.kept_tail,), self.full * self.block, device=device)
            offsets = torch.cat([full, tail])
            if type(offsets) is not Tensor:  # a tensor without numbers, in a step that is only counted
                return offsets
            self._offsets[device] = offsets
        return self._offsets[device]

    def columns(self, indices: Tensor) -> Tensor:
        """Give the columns (..., k) int64 of block-relative indices (..., k)."""
        return indices.long() + self.offsets(indices.device)

    def compress(self, a: Accumulated, step: Tensor) -> SparseEntry:
        """See Compressor: block-relative indices (n, rows, k) int16, and values (n, rows, k)."""
        indices, values = a.top_k(self)
        for i in a.absent:
            values[i] = 0
        return SparseEntry(indices, values, self)

    def choose(self, a: Tensor, indices: Tensor, values: Tensor) -> None:
        """Write the kept entries of a (n, rows, cols) to `indices`, int16 (n, rows, k), and `values`, (n, rows, k)."""
        split = self.full * self.block
        head = self.full * self.kept
        blocks = a[..., :split].unflatten(2, (self.full, self.block))
        tail = a[..., None, split:]
        for block, kept, out in ((blocks, self.kept, slice(0, head)), (tail, self.kept_tail, slice(head, None))):
            if kept:
                index = block.abs().topk(kept, dim=-1, sorted=False).indices
                indices[..., out] = index.flatten(2)
                values[..., out] = block.gather(-1, index).flatten(2)


class PowerIteration(Compressor):
    """Rank-r approximation P Q^T of a by warm-started subspace iteration (PowerSGD, arXiv 1905.13727).

        P <- orth(a Q),  Q <- a^T P          power_iterations times, from the Q of the step before

    P has orthonormal columns. A column of Q is dead if it is 0 but for rounding: all are at the start, or after a zero gradient.
    Dead columns are redrawn from random numbers counted by (step, tensor, column). They are not taken from the weights, since
    LoRA's B starts at zero.

    Args:
        warm_start: Q of the step before, a cell of (n, cols, r) with zeros at the start.
        power_iterations: rounds per step.
    """

    def __init__(self, warm_start: Cell, power_iterations: int = 1):
        self.warm_start = warm_start
        self.power_iterations = power_iterations
        self._next: Tensor | None = None

    def compress(self, a: Accumulated, step: Tensor) -> LowRankEntry:
        """See Compressor. In torch, a large a is formed anew for each product."""
        q = self.start(step).to(a.dtype)
        for i in range(self.power_iterations):
            p = orthonormalize(a.times(unit_columns(q) if i else q), a.total)
            q = a.transposed_times(p)
        for i in a.absent:
            q[i] = 0
        self.prepare(q)
        return LowRankEntry.of(p, q)

    def prepare(self, q: Tensor) -> None:
        """Take this step's Q, (n, cols, r), for `commit`."""
        self._next = q

    def commit(self) -> None:
        """Make Q the next step's warm start. A tensor whose Q is all zero (no gradient) keeps its warm start."""
        assert self._next is not None, "compress comes before commit"
        warm = self.warm_start
        alive = torch.linalg.vector_norm(self._next, torch.inf, dim=(1, 2), keepdim=True)
        if warm.turn.absent or not kernels.remember(warm.buffer, self._next, alive, warm.turn.ok):
            self._write(alive)
        self._next = None

    def _write(self, alive: Tensor) -> None:
        assert self._next is not None
        self.warm_start.write(torch.where(alive != 0, self._next, self.warm_start.read()))

    def start(self, step: Tensor) -> Tensor:
        """Give the Q that this step starts from, (n, cols, r): the last Q with unit columns; dead columns are redrawn."""
        last, ids = self.warm_start.read(), self.warm_start.turn.ids
        fast = kernels.start(last, step, ids, DEAD * torch.finfo(last.dtype).eps)
        if fast is not None:
            return fast
        norms = _column_norms(last)
        dead = norms <= DEAD * torch.finfo(last.dtype).eps * norms.amax(dim=-1, keepdim=True)
        if readable(dead.device) and not dead.any():
            return unit_columns(last)
        fresh = counted_noise(step, ids, last.shape[2], last.shape[1]).mT.to(last.dtype)
        return torch.where(dead, fresh, unit_columns(last))


def _column_norms(q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)


def unit_columns(q: Tensor) -> Tensor:
    """Scale the columns of q (n, cols, r) to length 1: products of huge or tiny columns would leave fp32's range."""
    norms = _column_norms(q)
    return (q / torch.where(norms > 0, norms, 1.0)).to(q.dtype)
