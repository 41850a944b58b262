"""Windows: the last m compressed gradients of n tensors of one shape, as a ring buffer.

The data flow of a step: `stage(entry)` takes the new entry in storage precision. `dots(j)` gives its inner products with the
window as it will be. `commit(j)` writes it into slot j. `combine(c)` gives G^T c. The state does not change before `commit`, so
that a step can still be refused. K is always computed from entries as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels.devices import kind
from .accumulated import DenseEntry, Entry, LowRankEntry
from .cells import ALL, Buffers, Layout, Spec
from .deferred import masked
from .linalg import add_scaled_, chunk_bytes, chunks, inner, room_bytes

# What scales P, and what scales Q; None: nothing.
Weights = tuple[Tensor | None, Tensor | None]


class Window:
    """What all window formats share: staging and the ring.

    Args:
        buffers: name -> (n, ...), as `specs` declares them.
        compute_dtype: dtype of gradients, errors and updates.
        update_dtype: dtype of the numbers that enter the product G^T c, and of its result; None: the compute dtype. A window that
            gains nothing from it ignores it.

    Attributes:
        staged: the new entry as the window stores it, decoded; None: there is no staged entry.
    """

    slot_dim = 1  # of the buffers

    def __init__(self, buffers: Buffers, compute_dtype: torch.dtype, update_dtype: torch.dtype | None = None):
        self.buffers = buffers
        self.compute_dtype = compute_dtype
        self.update_dtype = update_dtype or compute_dtype
        self.staged: Entry | None = None

    def stage(self, entry: Entry) -> None:
        """Take the new entry, rounded as the window stores it."""
        raise NotImplementedError

    def stored(self, slot: int) -> Entry:
        """Give the entry in a slot, in the form in which it was staged."""
        raise NotImplementedError

    def dots(self, j: Tensor) -> Tensor:
        """Give the inner products of the staged entry with all entries, (n, m) fp64. Slot j counts as the staged entry itself."""
        dots = self._dots_with_window()
        return dots.index_copy_(1, j, self._staged_square()[:, None])

    def commit(self, j: Tensor, ok: bool | Tensor = True) -> None:
        """Write the staged entry into slot j, a (1,) int64 tensor, if the step is accepted; then release it."""
        for buffer, part in zip(self.buffers.values(), self._parts_to_store(), strict=True):
            if kernels.store(buffer, part, self.slot_dim, j, ok):
                continue
            part = part.unsqueeze(self.slot_dim)
            if ok is not True:
                part = masked(ok, part, buffer.index_select(self.slot_dim, j))
            buffer.index_copy_(self.slot_dim, j, part)
        self.release()

    def release(self) -> None:
        """Drop the staged entry, which may share memory with a gradient."""
        self.staged = None

    def apply(
        self, c: Tensor, params: Sequence[Tensor], scale: float | Tensor, decay: float | Tensor, factors: kernels.Scale = None
    ) -> bool:
        """Compute p <- decay * p + scale * u in place, u = diag(x) G^T c diag(y), for n matrices in the compute dtype.

        Args:
            c: (n, m) fp64.
            params: the matrices, (rows, cols) each.
            scale, decay: numbers; on a GPU perhaps 0-D tensors.
            factors: x (n, rows) and y (n, cols) in the compute dtype; None: u = G^T c.

        Returns:
            Whether it was done. If not, the caller uses `combine`.
        """
        return False

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """Give G^T c, or rows `rows` of it, (n, rows, cols) in the compute dtype, for coefficients c (n, m) fp64."""
        raise NotImplementedError

    def product(self, c: Tensor, rows: slice) -> Tensor:
        """Give rows `rows` of G^T c, in any dtype: the caller's addition takes the matrix product's dtype too."""
        return self.combine(c, rows)

    def _parts_to_store(self) -> tuple[Tensor, ...]:
        return self._parts

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        """The tensors of the staged entry."""
        assert self.staged is not None, "stage comes first"
        return self.staged.parts

    def _dots_with_window(self) -> Tensor:
        raise NotImplementedError

    def _staged_square(self) -> Tensor:
        raise NotImplementedError


class DenseWindow(Window):
    """Entries as they are: (n, m, rows, cols).

    G^T c has one row of coefficients and reads each number once, so that memory limits its speed. So `update_dtype` has an effect
    only where entries are stored in it, and nothing is converted. c then enters as two numbers, c = high + low, which keeps its
    precision.
    """

    @staticmethod
    def specs(layout: Layout, m: int, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state."""
        return (Spec("window_rows", (m, layout.rows, layout.cols), dtype, rows=1, window=True, slot=0),)

    def stage(self, entry: Entry) -> None:
        """See Window."""
        self.staged = DenseEntry(entry.parts[0].to(self.buffers["window_rows"].dtype))

    def stored(self, slot: int) -> Entry:
        """See Window."""
        return DenseEntry(self._slots(slice(slot, slot + 1))[:, 0].contiguous())

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window."""
        n, m, all_rows, cols = self.buffers["window_rows"].shape
        rows = rows or slice(0, all_rows)
        length, stored = (rows.stop - rows.start) * cols, self.buffers["window_rows"].dtype
        if stored == self.update_dtype != self.compute_dtype:
            high = c.to(stored)
            product = torch.stack([high, (c - high).to(stored)], 1) @ self._slots(ALL, rows).flatten(2)
            return product.to(self.compute_dtype).sum(1).view(n, rows.stop - rows.start, cols)
        same = stored == self.compute_dtype
        if same and kind(c.device) != "cpu":
            return (c.to(stored)[:, None] @ self._slots(ALL, rows).flatten(2)).view(n, rows.stop - rows.start, cols)
        out = torch.zeros(n, 1, length, dtype=self.compute_dtype, device=c.device)
        c = c.to(self.compute_dtype)[:, None]
        for slots in chunks(m, 0 if same else n * length * out.element_size(), room_bytes(c.device)):
            out.baddbmm_(c[..., slots], self._slots(slots, rows).flatten(2).to(self.compute_dtype))
        return out.view(n, rows.stop - rows.start, cols)

    def _dots_with_window(self) -> Tensor:
        return self._dots_of(self.buffers["window_rows"])

    def _slots(self, slots: slice, rows: slice = ALL) -> Tensor:
        """Give the numbers of some slots and rows, (n, slots, rows, cols)."""
        return self.buffers["window_rows"][:, slots, rows]

    def _dots_of(self, entries: Tensor) -> Tensor:
        return inner(entries.flatten(2), self._parts[0].flatten(1)[:, None]).squeeze(2)

    def _staged_square(self) -> Tensor:
        entry = self._parts[0].flatten(1)[:, None]
        return inner(entry, entry)[:, 0, 0]


class LowRankWindow(Window):
    """Entries P Q^T: P (n, m, r, rows), Q (n, m, r, cols).

    <P_i Q_i^T, P_j Q_j^T> = sum of (P_i^T P_j) o (Q_i^T Q_j), so that nothing of size rows x cols is formed.
    With an `update_dtype`, c_i scales a factor in the compute dtype. Both factors are then rounded once.
    """

    @staticmethod
    def specs(layout: Layout, m: int, rank: int, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state."""
        return (
            Spec("window_p", (m, rank, layout.rows), dtype, rows=2, window=True, slot=0),
            Spec("window_q", (m, rank, layout.cols), dtype, window=True, slot=0),
        )

    def stage(self, entry: Entry) -> None:
        """See Window."""
        p, q = entry.parts
        self.staged = LowRankEntry(p.to(self.buffers["window_p"].dtype), q.to(self.buffers["window_q"].dtype))

    def stored(self, slot: int) -> Entry:
        """See Window."""
        p, q = self._factors(slice(slot, slot + 1))
        return LowRankEntry(p[:, 0].contiguous(), q[:, 0].contiguous())

    def dots(self, j: Tensor) -> Tensor:
        """See Window."""
        fast = kernels.factor_dots(tuple(self.buffers.values()), self._parts, j)
        return super().dots(j) if fast is None else fast

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window. c scales the shorter factor, a few slots at a time."""
        part = rows or slice(0, self.buffers["window_p"].shape[3])
        n, cols = len(c), self.buffers["window_q"].shape[3]
        out = torch.zeros(n, part.stop - part.start, cols, dtype=self.compute_dtype, device=c.device)
        for left, right in self._products(c, part):
            if right.dtype == out.dtype:
                out.baddbmm_(left.mT, right)
            else:
                out.add_(left.mT @ right)
        return out

    def product(self, c: Tensor, rows: slice) -> Tensor:
        """See Window. A sum of several products is in the compute dtype."""
        u: Tensor | None = None
        for left, right in self._products(c, rows):
            u = left.mT @ right if u is None else u.to(self.compute_dtype).add_(left.mT @ right)
        return self.combine(c, rows) if u is None else u

    def apply(
        self, c: Tensor, params: Sequence[Tensor], scale: float | Tensor, decay: float | Tensor, factors: kernels.Scale = None
    ) -> bool:
        """See Window. Products are added to p itself, and G^T c is not formed."""
        if isinstance(scale, Tensor) or isinstance(decay, Tensor) or kind(c.device) != "cpu":
            # A GPU goes this way: there a launch takes longer than a pass.
            for i, (left, right) in enumerate(self._products(c, slice(0, len(params[0])), factors)):
                _add_products(params, left, right, scale, 1.0 if i else decay)
            return True
        if factors is not None and self.update_dtype == self.compute_dtype:
            self._apply_scaled(c.to(self.compute_dtype), params, scale, decay, factors)
            return True
        for i, (left, right) in enumerate(self._products(c, slice(0, len(params[0])), factors)):
            beta = 1.0 if i else decay
            if right.dtype != self.compute_dtype:
                _add_products(params, left, right, scale, beta)
                continue
            for p, x, y in zip(params, left, right, strict=True):
                p.addmm_(x.mT, y, beta=beta, alpha=scale)
        return True

    def _apply_scaled(
        self, c: Tensor, params: Sequence[Tensor], scale: float, decay: float, factors: tuple[Tensor, Tensor]
    ) -> None:
        """`apply` with factors: P and Q are scaled for one tensor at a time, into memory that stays in the cache."""
        rows, cols = params[0].shape
        if not rows:  # a shard without rows
            return
        for i, slots in enumerate(self._slots_at_once(rows, cols)):
            left, right = self._factors(slots)
            length, beta = left.shape[1] * left.shape[2], 1.0 if i else decay
            parts = list(chunks(rows, length * c.element_size(), chunk_bytes(c.device)))
            room_p, room_q = c.new_empty(length * (parts[0].stop - parts[0].start)), c.new_empty(right.shape[1:])
            for t, p in enumerate(params):
                x, y = left[t].flatten(0, 1), room_q.flatten(0, 1)
                torch.mul(right[t], (c[t, slots, None] * factors[1][t])[:, None], out=room_q)
                for part in parts:
                    some = room_p[: length * (part.stop - part.start)].view(length, -1)
                    p[part].addmm_(torch.mul(x[:, part], factors[0][t, part], out=some).mT, y, beta=beta, alpha=scale)

    def _slots_at_once(self, rows: int, cols: int) -> Iterator[slice]:
        n, m, rank, _ = self.buffers["window_p"].shape
        window_p = self.buffers["window_p"]
        converted = rows + cols if window_p.dtype != self.update_dtype else min(rows, cols)
        return chunks(m, n * rank * converted * self.update_dtype.itemsize, room_bytes(window_p.device))

    def _products(self, c: Tensor, part: slice, factors: tuple[Tensor, Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Give pairs X (n, slots r, rows), Y (n, slots r, cols) for some slots each. The sum of X^T Y is rows `part` of u."""
        rows, cols = part.stop - part.start, self.buffers["window_q"].shape[3]
        c, ends = c.to(self.compute_dtype), self.update_dtype
        sizes: Weights = (None, None) if factors is None else (factors[0][:, part], factors[1])
        for slots in self._slots_at_once(rows, cols):
            weights = (c[:, slots], None) if rows <= cols else (None, c[:, slots])
            left, right = self._weighted(slots, part, weights, sizes)
            yield left.to(ends).flatten(1, 2), right.to(ends).flatten(1, 2)

    def _weighted(self, slots: slice, rows: slice, weights: Weights, sizes: Weights) -> tuple[Tensor, Tensor]:
        """Give P, for some rows of the matrix, and Q, each times its weights and diag(sizes): see `_scaled`."""
        p, q = self._factors(slots, rows)
        return self._scaled(p, weights[0], sizes[0]), self._scaled(q, weights[1], sizes[1])

    def _scaled(self, factor: Tensor, c: Tensor | None, sizes: Tensor | None) -> Tensor:
        """Give c_i * factor_i diag(sizes). It is rounded to bf16 if the product is in bf16 and there is a kernel."""
        if c is None and sizes is None:
            return factor
        fast = kernels.scaled(factor, c, sizes) if self.update_dtype == torch.bfloat16 else None
        if fast is not None:
            return fast
        weights = torch.ones_like(sizes[:, :1]) if c is None else c  # type: ignore[index]
        weights = weights[:, :, None] if sizes is None else weights[:, :, None] * sizes[:, None]
        return factor.to(self.compute_dtype) * weights[:, :, None]

    def _dots_with_window(self) -> Tensor:
        return self._factor_dots(*self._factors(ALL))

    def _factors(self, slots: slice, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """Give the numbers of P, for some rows of the matrix, and of Q."""
        return self.buffers["window_p"][:, slots, :, rows], self.buffers["window_q"][:, slots]

    def _staged_square(self) -> Tensor:
        p, q = self._parts
        return self._factor_dots(p[:, None], q[:, None])[:, 0]

    def _factor_dots(self, p: Tensor, q: Tensor) -> Tensor:
        gram_p = inner(p.flatten(1, 2), self._parts[0])
        gram_q = inner(q.flatten(1, 2), self._parts[1])
        return gram_p.mul_(gram_q).unflatten(1, p.shape[1:3]).sum((2, 3))


def _add_products(params: Sequence[Tensor], x: Tensor, y: Tensor, scale: float | Tensor, decay: float | Tensor) -> None:
    """Compute p <- decay * p + scale * X^T Y in place. X^T Y has the dtype of X and Y.

    X^T Y is formed for some tensors at a time, or for some rows of one, so that it is still in the cache when it is added.

    Args:
        params: p, n matrices (rows, cols).
        x, y: (n, L, rows) and (n, L, cols).
        scale, decay: numbers or 0-D tensors.
    """
    rows, cols = params[0].shape
    limit = chunk_bytes(x.device)
    for tensors in chunks(len(params), rows * cols * x.element_size(), limit):
        left, right = x[tensors].mT, y[tensors]
        some = params if len(left) == len(params) else params[tensors]
        for part in chunks(rows, len(some) * cols * x.element_size(), limit):
            # CPU libraries are slower at a batch of one than at a product.
            product = left[:, part] @ right if len(some) > 1 else (left[0, part] @ right[0])[None]
            parts = some if product.shape[1] == rows else [p[part] for p in some]
            if not kernels.add(parts, product, scale, decay):
                for p, u in zip(parts, product, strict=True):
                    add_scaled_(p.mul_(decay) if isinstance(decay, Tensor) or decay != 1 else p, u, scale)
