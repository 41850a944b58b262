"""Compressors: from the accumulated gradient a = e + g to the parts of a window row.

Each has `compress(a, step)`, a pure function of its arguments and its state, and `commit(accepted)`, which makes the state
that the last `compress` prepared the current one. A skipped step is one without `commit`, or one whose flag says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .deferred import masked
from .linalg import chunks, counted_noise, orthonormalize


class Identity:
    """C(a) = a."""

    def compress(self, a: Tensor, step: Tensor) -> tuple[Tensor]:
        """(a,) with a of shape (n, rows, cols)."""
        return (a,)

    def commit(self, accepted: bool | Tensor = True) -> None:
        """Nothing to keep."""


class BlockTopK:
    """The entries of largest magnitude in every block of every row (EFCP, section 4; ties as torch.topk breaks them).

    Blocks are runs of `block_size` inside one row; the last block of a row may be shorter, and keeps at least one entry too.

    Args:
        cols: length of a row.
        density: fraction of each block that is kept, in (0, 1].
        block_size: length of a block, at most 32768.
    """

    def __init__(self, cols: int, density: float, block_size: int):
        self.block = min(block_size, cols)
        self.full, self.tail = divmod(cols, self.block)
        self.kept = self._kept(self.block, density)
        self.kept_tail = self._kept(self.tail, density) if self.tail else 0

    @staticmethod
    def _kept(length: int, density: float) -> int:
        return max(1, round(density * length))

    @property
    def per_row(self) -> int:
        """k, the number of entries kept in each row."""
        return self.full * self.kept + self.kept_tail

    def offsets(self, device: torch.device) -> Tensor:
        """(k,) int64: the first column of the block that each kept entry of a row lies in."""
        full = torch.arange(self.full, device=device).repeat_interleave(self.kept) * self.block
        tail = torch.full((self.kept_tail,), self.full * self.block, device=device)
        return torch.cat([full, tail])

    def compress(self, a: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Block-relative indices (n, rows, k) int16 and values (n, rows, k) of a (n, rows, cols)."""
        n, rows, cols = a.shape
        flat = a.reshape(n * rows, cols)
        indices = torch.empty(n * rows, self.per_row, dtype=torch.int16, device=a.device)
        values = a.new_empty(n * rows, self.per_row)
        for part in chunks(n * rows, cols * (a.element_size() + 1)):
            self._compress_rows(flat[part], indices[part], values[part])
        return indices.view(n, rows, self.per_row), values.view(n, rows, self.per_row)

    def _compress_rows(self, a: Tensor, indices: Tensor, values: Tensor) -> None:
        split = self.full * self.block
        head = self.full * self.kept
        blocks = a[:, :split].unflatten(1, (self.full, self.block))
        for block, kept, out in ((blocks, self.kept, slice(0, head)), (a[:, None, split:], self.kept_tail, slice(head, None))):
            if kept:
                index = block.abs().topk(kept, dim=-1, sorted=False).indices
                indices[:, out] = index.flatten(1)
                values[:, out] = block.gather(-1, index).flatten(1)

    def commit(self, accepted: bool | Tensor = True) -> None:
        """Nothing to keep."""


class PowerIteration:
    """Rank-r approximation P Q^T of a by warm-started subspace iteration (PowerSGD, arXiv 1905.13727).

        P <- orth(a Q),  Q <- a^T P          power_iterations times, from the Q of the step before

    P has orthonormal columns. A column of Q that died (a zero gradient; at the start all of them) is redrawn from numbers
    counted by (step, tensor, column), never from the weights: LoRA's B starts at zero.

    Args:
        q: (n, cols, r) zeros, the warm start; changed in place by `commit`.
        salt: (n,) int64, a number per tensor.
        power_iterations: rounds per step.
        reduce: where a is rows of a matrix that several processes share: sums a tensor over them.
    """

    def __init__(self, q: Tensor, salt: Tensor, power_iterations: int = 1, reduce: Callable[[Tensor], Tensor] | None = None):
        self.q = q
        self.salt = salt
        self.power_iterations = power_iterations
        self.reduce = reduce
        self._next: Tensor | None = None

    def compress(self, a: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """P (n, rows, r) and Q (n, cols, r) of a (n, rows, cols)."""
        q = self.start(step).to(a.dtype)
        for i in range(self.power_iterations):
            p = orthonormalize(a @ (unit_columns(q) if i else q), self.reduce)
            q = a.mT @ p if self.reduce is None else self.reduce(a.mT @ p)
        self.prepare(q)
        return p, q

    def prepare(self, q: Tensor) -> None:
        """Take the Q of this step, (n, cols, r), for `commit`."""
        self._next = q

    def commit(self, accepted: bool | Tensor = True) -> None:
        """Q becomes the next step's warm start; a tensor whose Q is all zero (no gradient) keeps the one it has."""
        alive = self._next.ne(0).any(dim=(1, 2), keepdim=True)
        self.q.copy_(masked(accepted, torch.where(alive, self._next, self.q), self.q))
        self._next = None

    def start(self, step: Tensor) -> Tensor:
        """The Q that this step starts from, (n, cols, r): unit columns of the last one, dead ones redrawn."""
        norms = _column_norms(self.q)
        dead = norms <= torch.finfo(self.q.dtype).eps * norms.amax(dim=-1, keepdim=True)
        fresh = counted_noise(step, self.salt, self.q.shape[2], self.q.shape[1]).mT.to(self.q.dtype)
        return torch.where(dead, fresh, unit_columns(self.q))


def _column_norms(q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)


def unit_columns(q: Tensor) -> Tensor:
    """Only the columns' directions matter, and products of huge or tiny ones would leave fp32's range."""
    norms = _column_norms(q)
    return (q / torch.where(norms > 0, norms, 1.0)).to(q.dtype)
