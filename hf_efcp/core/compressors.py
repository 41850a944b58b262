"""Compressors: from the accumulated gradient a = e + g to the parts of a window row.

Each has `compress(gradients, step, feedback)`, a pure function of its arguments and its state, and `commit(accepted)`, which
makes the state that the last `compress` prepared the current one. A skipped step is one without `commit`, or one whose flag
says so. Gradients are n matrices (rows, cols), a list of them or a tensor (n, rows, cols). Without `feedback`, a is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import kernels
from .deferred import masked, readable
from .error_feedback import ErrorFeedback
from .linalg import orthonormalize, row_chunks
from .random import counted_noise

NONE = ErrorFeedback(None)
# A column of Q this many rounding errors long, beside the longest, is made of nothing else.
_DEAD = 32


class Identity:
    """C(a) = a."""

    def compress(self, gradients: Sequence[Tensor], step: Tensor, feedback: ErrorFeedback = NONE) -> tuple[Tensor]:
        """(a,) with a of shape (n, rows, cols)."""
        return (feedback.accumulate(gradients),)

    def commit(self, accepted: bool | Tensor = True) -> None:
        """Nothing to keep."""


class BlockTopK:
    """The entries of largest magnitude in every block of every row (EFCP, section 4; which of equal ones is open).

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
    def blocks(self) -> tuple[int, int, int]:
        """Length of a block, entries kept in each, entries kept in a shorter last one (0: there is none)."""
        return self.block, self.kept, self.kept_tail

    @property
    def per_row(self) -> int:
        """k, the number of entries kept in each row."""
        return self.full * self.kept + self.kept_tail

    def offsets(self, device: torch.device) -> Tensor:
        """(k,) int64: the first column of the block that each kept entry of a row lies in."""
        full = torch.arange(self.full, device=device).repeat_interleave(self.kept) * self.block
        tail = torch.full((self.kept_tail,), self.full * self.block, device=device)
        return torch.cat([full, tail])

    def compress(self, gradients: Sequence[Tensor], step: Tensor, feedback: ErrorFeedback = NONE) -> tuple[Tensor, Tensor]:
        """Block-relative indices (n, rows, k) int16 and values (n, rows, k) of a (n, rows, cols)."""
        fast = kernels.top_k(gradients, feedback.stored(), self.blocks)
        if fast is not None:
            return fast
        first = gradients[0]
        shape = (len(gradients), len(first), self.per_row)
        indices, values = torch.empty(shape, dtype=torch.int16, device=first.device), first.new_empty(shape)
        for rows in row_chunks(gradients):
            self._compress_rows(feedback.accumulate(gradients, rows), indices[:, rows], values[:, rows])
        return indices, values

    def _compress_rows(self, a: Tensor, indices: Tensor, values: Tensor) -> None:
        split = self.full * self.block
        head = self.full * self.kept
        blocks = a[..., :split].unflatten(2, (self.full, self.block))
        tail = a[..., None, split:]
        for block, kept, out in ((blocks, self.kept, slice(0, head)), (tail, self.kept_tail, slice(head, None))):
            if kept:
                index = block.abs().topk(kept, dim=-1, sorted=False).indices
                indices[..., out] = index.flatten(2)
                values[..., out] = block.gather(-1, index).flatten(2)

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

    def compress(self, gradients: Sequence[Tensor], step: Tensor, feedback: ErrorFeedback = NONE) -> tuple[Tensor, Tensor]:
        """P (n, rows, r) and Q (n, cols, r) of a (n, rows, cols). Of a large tensor, a is formed anew for each product."""
        sums, error = _sums(gradients, feedback), feedback.stored()
        q = self.start(step).to(gradients[0].dtype)
        for i in range(self.power_iterations):
            # The factor first: CPU libraries are several times slower at a @ q and a.mT @ p.
            q = (unit_columns(q) if i else q).mT.contiguous()
            p = kernels.times(gradients, error, q)
            p = torch.cat([(q @ a.mT).mT for _, a in sums()], 1) if p is None else p
            p = orthonormalize(p, self.reduce)
            q = kernels.transposed_times(gradients, error, p.mT)
            q = sum(p[:, rows].mT @ a for rows, a in sums()) if q is None else q
            q = q.mT.contiguous()
            q = q if self.reduce is None else self.reduce(q)
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
        dead = norms <= _DEAD * torch.finfo(self.q.dtype).eps * norms.amax(dim=-1, keepdim=True)
        if readable(dead.device) and not dead.any():
            return unit_columns(self.q)
        fresh = counted_noise(step, self.salt, self.q.shape[2], self.q.shape[1]).mT.to(self.q.dtype)
        return torch.where(dead, fresh, unit_columns(self.q))


def _sums(gradients: Sequence[Tensor], feedback: ErrorFeedback) -> Callable[[], Iterable[tuple[slice, Tensor]]]:
    """What gives (rows, a) with a = e + g, all of it; of a large tensor a few rows at a time, formed anew at each call."""
    parts, whole = row_chunks(gradients), []

    def sums() -> Iterable[tuple[slice, Tensor]]:
        if len(parts) > 1:
            return ((rows, feedback.accumulate(gradients, rows)) for rows in parts)
        if not whole:
            whole.append((slice(None), feedback.accumulate(gradients)))
        return whole

    return sums


def _column_norms(q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)


def unit_columns(q: Tensor) -> Tensor:
    """Only the columns' directions matter, and products of huge or tiny ones would leave fp32's range."""
    norms = _column_norms(q)
    return (q / torch.where(norms > 0, norms, 1.0)).to(q.dtype)
