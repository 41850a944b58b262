"""Windows: the last m compressed gradients of a stack of n tensors, as a ring buffer.

Data flow of a step: `stage(parts)` takes the new row in storage precision, `dots(j)` gives its inner products with the
window as it will be, `commit(j)` writes it into slot j, `combine(c)` gives G^T c. Until `commit` the state is untouched, so a
step can still be skipped. K is always computed from rows as stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from .deferred import masked
from .linalg import chunk_bytes, chunks, inner


class Window:
    """What the three formats share: staging and the ring.

    Args:
        state: name -> buffer of zeros, (n, m, ...) with the slot in dimension `slot_dim`.
        compute_dtype: dtype of gradients, errors and updates.
    """

    slot_dim = 1

    def __init__(self, state: dict[str, Tensor], compute_dtype: torch.dtype):
        self.state = state
        self.compute_dtype = compute_dtype
        self._row: tuple[Tensor, ...] | None = None

    def stage(self, parts: tuple[Tensor, ...]) -> None:
        """Take the new row (the compressor's parts), rounded as the window stores it."""
        self._row = tuple(p.to(b.dtype) for p, b in zip(parts, self.state.values(), strict=True))

    def dots(self, j: Tensor) -> Tensor:
        """(n, m) fp64: inner products of the staged row with every row, slot j counted as the staged row itself."""
        dots = self._dots_with_window()
        return dots.index_copy_(1, j, self._staged_square()[:, None])

    def commit(self, j: Tensor, accepted: bool | Tensor = True) -> None:
        """Write the staged row into slot j, a (1,) int64 tensor, where `accepted`; forget it."""
        for buffer, part in zip(self.state.values(), self._row, strict=True):
            part = part.unsqueeze(self.slot_dim)
            if accepted is not True:
                part = masked(accepted, part, buffer.index_select(self.slot_dim, j))
            buffer.index_copy_(self.slot_dim, j, part)
        self.release()

    def release(self) -> None:
        """Forget the staged row: it may share memory with a gradient."""
        self._row = None

    def subtract_row_(self, a: Tensor, rows: slice = slice(None)) -> Tensor:
        """a <- a - c with c the staged row, (n, rows, cols), or rows `rows` of it, in place."""
        raise NotImplementedError

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """e <- e + g - c in place with c the staged row, by a kernel, but for the tensors `absent`: see `ErrorFeedback.keep`.

        Returns:
            Whether it was done; else the caller does it in torch.
        """
        return False

    def apply(self, c: Tensor, params: Sequence[Tensor], scale: float, decay: float) -> bool:
        """p <- decay * p + scale * G^T c in place for n matrices (rows, cols) in the compute dtype; `c` as in `combine`.

        Returns:
            Whether it was done; else the caller goes by `combine`.
        """
        return False

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """G^T c: (n, rows, cols) in the compute dtype, for coefficients c (n, m) fp64; or rows `rows` of it."""
        raise NotImplementedError

    def _dots_with_window(self) -> Tensor:
        raise NotImplementedError

    def _staged_square(self) -> Tensor:
        raise NotImplementedError


class DenseWindow(Window):
    """Rows as they are: (n, m, rows, cols)."""

    def __init__(self, n: int, m: int, rows: int, cols: int, *, dtype, compute_dtype, device):
        super().__init__({"window_rows": torch.zeros(n, m, rows, cols, dtype=dtype, device=device)}, compute_dtype)

    def subtract_row_(self, a: Tensor, rows: slice = slice(None)) -> Tensor:
        """See Window."""
        return a.sub_(self._row[0][:, rows])

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window."""
        n, m, all_rows, cols = self.state["window_rows"].shape
        rows = rows or slice(0, all_rows)
        length, same = (rows.stop - rows.start) * cols, self.state["window_rows"].dtype == self.compute_dtype
        out = torch.zeros(n, 1, length, dtype=self.compute_dtype, device=c.device)
        c = c.to(self.compute_dtype)[:, None]
        for slots in chunks(m, 0 if same else n * length * out.element_size()):
            out.baddbmm_(c[..., slots], self._slots(slots, rows).flatten(2).to(self.compute_dtype))
        return out.view(n, rows.stop - rows.start, cols)

    def _dots_with_window(self) -> Tensor:
        return self._dots_of(self.state["window_rows"])

    def _slots(self, slots: slice, rows: slice = slice(None)) -> Tensor:
        """The numbers of some slots and rows, (n, slots, rows, cols)."""
        return self.state["window_rows"][:, slots, rows]

    def _dots_of(self, rows: Tensor) -> Tensor:
        return inner(rows.flatten(2), self._row[0].flatten(1)[:, None]).squeeze(2)

    def _staged_square(self) -> Tensor:
        row = self._row[0].flatten(1)[:, None]
        return inner(row, row)[:, 0, 0]


class LowRankWindow(Window):
    """Rows P Q^T: P (n, m, r, rows), Q (n, m, r, cols).

    <P_i Q_i^T, P_j Q_j^T> = sum of (P_i^T P_j) o (Q_i^T Q_j): nothing of size rows x cols is formed.
    """

    def __init__(self, n: int, m: int, rows: int, cols: int, rank: int, *, dtype, compute_dtype, device):
        new = {"dtype": dtype, "device": device}
        state = {"window_p": torch.zeros(n, m, rank, rows, **new), "window_q": torch.zeros(n, m, rank, cols, **new)}
        super().__init__(state, compute_dtype)

    def stage(self, parts: tuple[Tensor, ...]) -> None:
        """Take P (n, rows, r) and Q (n, cols, r)."""
        super().stage(tuple(part.mT.contiguous() for part in parts))

    def subtract_row_(self, a: Tensor, rows: slice = slice(None)) -> Tensor:
        """See Window."""
        p, q = (part.to(a.dtype) for part in self._row)
        return a.baddbmm_(p[..., rows].mT, q, alpha=-1)

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """See Window."""
        return kernels.keep(error, gradients, self._row, rounding, absent)

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window. c scales the shorter factor, a few slots at a time."""
        part = rows or slice(0, self.state["window_p"].shape[3])
        n, cols = len(c), self.state["window_q"].shape[3]
        out = torch.zeros(n, part.stop - part.start, cols, dtype=self.compute_dtype, device=c.device)
        for left, right in self._products(c, part):
            out.baddbmm_(left.mT, right)
        return out

    def apply(self, c: Tensor, params: Sequence[Tensor], scale: float, decay: float) -> bool:
        """See Window. Products that are added to p itself: G^T c is not formed."""
        for i, (left, right) in enumerate(self._products(c, slice(0, len(params[0])))):
            for p, x, y in zip(params, left, right, strict=True):
                p.addmm_(x.mT, y, beta=1.0 if i else decay, alpha=scale)
        return True

    def _products(self, c: Tensor, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """(X, Y), (n, slots r, rows) and (n, slots r, cols), whose X^T Y make up rows `part` of G^T c: some slots at a time."""
        (n, m, rank, _), cols, dtype = self.state["window_p"].shape, self.state["window_q"].shape[3], self.compute_dtype
        rows, c = part.stop - part.start, c.to(dtype)[:, :, None, None]
        converted = rows + cols if self.state["window_p"].dtype != dtype else min(rows, cols)
        for slots in chunks(m, n * rank * converted * dtype.itemsize):
            left, right = (factor.to(dtype) for factor in self._factors(slots, part))
            left, right = (left * c[:, slots], right) if rows <= cols else (left, right * c[:, slots])
            yield left.flatten(1, 2), right.flatten(1, 2)

    def _dots_with_window(self) -> Tensor:
        return self._factor_dots(*self._factors(slice(None)))

    def _factors(self, slots: slice, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The numbers of P, of some rows of the matrix, and of Q."""
        return self.state["window_p"][:, slots, :, rows], self.state["window_q"][:, slots]

    def _staged_square(self) -> Tensor:
        return self._factor_dots(*(part[:, None] for part in self._row))[:, 0]

    def _factor_dots(self, p: Tensor, q: Tensor) -> Tensor:
        gram_p = inner(p.flatten(1, 2), self._row[0])
        gram_q = inner(q.flatten(1, 2), self._row[1])
        return gram_p.mul_(gram_q).unflatten(1, p.shape[1:3]).sum((2, 3))


class SparseWindow(Window):
    """Rows as kept entries: block-relative indices and values, both (n, rows, m, k), so that one row's window is one run.

    Args:
        offsets: (k,) int64, first column of the block of each entry.
        blocks: length of a block, entries in each, and in a shorter last one.

    Attributes:
        shape: (n, rows, m, k).
        entry_bytes: what `_pieces` takes for an entry.
    """

    slot_dim = 2
    entry_bytes = 16

    def __init__(
        self,
        n: int,
        m: int,
        rows: int,
        cols: int,
        offsets: Tensor,
        blocks: kernels.Blocks,
        *,
        dtype,
        compute_dtype,
        device,
    ):
        self.shape = (n, rows, m, len(offsets))
        state = {
            "window_indices": torch.zeros(self.shape, dtype=torch.int16, device=device),
            "window_values": torch.zeros(self.shape, dtype=dtype, device=device),
        }
        super().__init__(state, compute_dtype)
        self.cols = cols
        self.offsets = offsets
        self.blocks = blocks

    def subtract_row_(self, a: Tensor, rows: slice = slice(None)) -> Tensor:
        """See Window."""
        indices, values = (part[:, rows] for part in self._row)
        return a.scatter_add_(2, self._columns(indices), -values.to(a.dtype))

    def keep(self, error: kernels.Error, gradients: Sequence[Tensor], rounding: kernels.Rounding, absent: Sequence[int]) -> bool:
        """See Window."""
        return kernels.keep(error, gradients, self._row, rounding, absent, self.blocks)

    def apply(self, c: Tensor, params: Sequence[Tensor], scale: float, decay: float) -> bool:
        """See Window."""
        c = c.to(self.compute_dtype)
        return kernels.apply(self._stored(), c, self.cols, self.blocks, params, scale, decay)

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window."""
        n, all_rows = self._rows_shape()
        rows, c = rows or slice(0, all_rows), c.to(self.compute_dtype)
        fast = kernels.combine(self._stored(), c, self.cols, self.blocks, rows)
        if fast is not None:
            return fast
        out = torch.zeros(n, rows.stop - rows.start, self.cols, dtype=self.compute_dtype, device=c.device)
        c = c[:, None, :, None]
        for tensors, part, indices, values in self._pieces(rows):
            weighted = values.to(self.compute_dtype) * c[tensors]
            out[tensors, part].scatter_add_(2, indices.flatten(2), weighted.flatten(2))
        return out

    def _dots_with_window(self) -> Tensor:
        fast = kernels.dots(self._stored(), self._row, self.cols, self.blocks)
        if fast is not None:
            return fast
        indices, values = self._row
        n, _, m, _ = self.shape
        dots = torch.zeros(n, m, dtype=torch.float64, device=values.device)
        for tensors, part, window_indices, window_values in self._pieces():
            shape = (*window_values.shape[:2], self.cols)
            row = torch.zeros(shape, dtype=values.dtype, device=values.device)
            row.scatter_(2, self._columns(indices[tensors, part]), values[tensors, part])
            met = row.gather(2, window_indices.flatten(2)).view_as(window_values)
            dots[tensors] += (met.double() * window_values).sum((1, 3))
        return dots

    def _staged_square(self) -> Tensor:
        return self._row[1].double().square().sum((1, 2))

    def _columns(self, indices: Tensor) -> Tensor:
        return indices.long() + self.offsets

    def _rows_shape(self) -> tuple[int, int]:
        return self.shape[:2]

    def _pieces(self, rows: slice = slice(None)):
        """The window's `rows` cut by tensors, then rows: (tensor slice, row slice, int64 columns, values) of limited size."""
        n, all_rows, m, k = self.shape
        start, stop, _ = rows.indices(all_rows)
        row_bytes, limit = m * k * self.entry_bytes + self.cols * 8, chunk_bytes(self.offsets.device)
        for tensors in chunks(n, (stop - start) * row_bytes, limit):
            for part in chunks(stop - start, (tensors.stop - tensors.start) * row_bytes, limit):
                indices, values = self._read(tensors, slice(start + part.start, start + part.stop))
                yield tensors, part, self._columns(indices), values

    def _stored(self) -> kernels.Stored:
        """The buffers, for kernels."""
        return *self.state.values(), None

    def _read(self, tensors: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Indices and values of some rows of some tensors."""
        return self.state["window_indices"][tensors, rows], self.state["window_values"][tensors, rows]
