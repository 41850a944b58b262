"""The window of block top-k entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from .accumulated import Entry, SparseEntry
from .cells import ALL, Buffers, Layout, Spec
from .compressors import BlockTopK
from .linalg import chunk_bytes, chunks, inner
from .values import indices
from .windows import Window


class SparseWindow(Window):
    """Kept entries: block-relative indices and values, both (n, rows, m, k), so that a row's window is one run of memory.

    Args:
        buffers, compute_dtype: see Window.
        grid: the blocks, and how many entries each block keeps.

    Attributes:
        entry_bytes: bytes of temporaries for each kept entry, where torch does the work.
    """

    slot_dim = 2
    entry_bytes = 16

    def __init__(self, buffers: Buffers, compute_dtype: torch.dtype, grid: BlockTopK):
        super().__init__(buffers, compute_dtype)
        self.grid = grid

    @staticmethod
    def specs(layout: Layout, m: int, grid: BlockTopK, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state."""
        shape = (layout.rows, m, grid.per_row)
        return (
            Spec("window_indices", shape, torch.int16, rows=0, window=True, slot=1, values=indices(grid.blocks, grid.cols)),
            Spec("window_values", shape, dtype, rows=0, window=True, slot=1),
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, rows, m, k)."""
        n, rows, m, _ = next(iter(self.buffers.values())).shape
        return n, rows, m, self.grid.per_row

    def stage(self, entry: Entry) -> None:
        """See Window."""
        indices, values = entry.parts
        self.staged = SparseEntry(indices, values.to(self.buffers["window_values"].dtype), self.grid)

    def stored(self, slot: int) -> Entry:
        """See Window."""
        indices, values = self._read(ALL, ALL)
        return SparseEntry(indices[:, :, slot].contiguous(), values[:, :, slot].contiguous(), self.grid)

    def apply(
        self, c: Tensor, params: Sequence[Tensor], scale: float | Tensor, decay: float | Tensor, factors: kernels.Scale = None
    ) -> bool:
        """See Window."""
        c = c.to(self.compute_dtype)
        return kernels.apply(self._stored(), c, self.grid.cols, self.grid.blocks, params, scale, decay, factors)

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window."""
        n, all_rows = self.shape[:2]
        rows, c = rows or slice(0, all_rows), c.to(self.compute_dtype)
        fast = kernels.combine(self._stored(), c, self.grid.cols, self.grid.blocks, rows)
        if fast is not None:
            return fast
        out = torch.zeros(n, rows.stop - rows.start, self.grid.cols, dtype=self.compute_dtype, device=c.device)
        c = c[:, None, :, None]
        for tensors, part, columns, values in self._pieces(rows):
            weighted = values.to(self.compute_dtype) * c[tensors]
            out[tensors, part].scatter_add_(2, columns.flatten(2), weighted.flatten(2))
        return out

    def dots(self, j: Tensor) -> Tensor:
        """See Window."""
        fast = kernels.dots(self._stored(), (self._parts[0], self._parts[1]), self.grid.cols, self.grid.blocks, j)
        return super().dots(j) if fast is None else fast

    def _dots_with_window(self) -> Tensor:
        indices, values = self._parts
        fast = kernels.dots(self._stored(), (indices, values), self.grid.cols, self.grid.blocks)
        if fast is not None:
            return fast
        n, _, m, _ = self.shape
        dots = torch.zeros(n, m, dtype=torch.float64, device=values.device)
        for tensors, part, columns, window_values in self._pieces():
            shape = (*window_values.shape[:2], self.grid.cols)
            row = torch.zeros(shape, dtype=values.dtype, device=values.device)
            row.scatter_(2, self.grid.columns(indices[tensors, part]), values[tensors, part])
            met = row.gather(2, columns.flatten(2)).view_as(window_values)
            dots[tensors] += (met.double() * window_values).sum((1, 3))
        return dots

    def _staged_square(self) -> Tensor:
        values = self._parts[1].flatten(1)[:, None]
        return inner(values, values)[:, 0, 0]

    def _pieces(self, rows: slice = ALL) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Cut the window's `rows` by tensors, then by rows. A piece is (tensor slice, row slice, int64 columns, values)."""
        n, all_rows, m, k = self.shape
        start, stop, _ = rows.indices(all_rows)
        device = next(iter(self.buffers.values())).device
        row_bytes, limit = m * k * self.entry_bytes + self.grid.cols * 8, chunk_bytes(device)
        for tensors in chunks(n, (stop - start) * row_bytes, limit):
            for part in chunks(stop - start, (tensors.stop - tensors.start) * row_bytes, limit):
                indices, values = self._read(tensors, slice(start + part.start, start + part.stop))
                yield tensors, part, self.grid.columns(indices), values

    def _stored(self) -> kernels.Stored:
        """Give the buffers, for kernels."""
        return self.buffers["window_indices"], self.buffers["window_values"], None

    def _read(self, tensors: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Give indices and values of some rows of some tensors."""
        return self.buffers["window_indices"][tensors, rows], self.buffers["window_values"][tensors, rows]


def adam(buffers: Buffers, w1: Tensor, w2: Tensor, eps: float, grid: BlockTopK, rows: slice, dtype: torch.dtype) -> Tensor:
    """Give rows `rows` of m / (sqrt(v) + eps), for m = sum_i w1_i c_i and v = sum_i w2_i c_i^2 over a window's entries c_i.

    Args:
        buffers: of a plain window.
        w1, w2: (n, m) fp64.
        eps: a number > 0.
        grid: the blocks.
        rows: a run of rows.
        dtype: of the arithmetic, and of the result (n, rows, cols).
    """
    indices, values = buffers["window_indices"], buffers["window_values"]
    fast = kernels.adam((indices, values, None), w1.to(dtype), w2.to(dtype), eps, grid.cols, grid.blocks, rows)
    if fast is not None:
        return fast
    first, second = values[:, rows].to(dtype), values[:, rows].to(dtype).square()
    windows = (SparseWindow({"window_indices": indices[:, rows], "window_values": x}, dtype, grid) for x in (first, second))
    m, v = (window.combine(w) for window, w in zip(windows, (w1, w2), strict=True))
    return m.div_(v.sqrt_().add_(eps))


def move(
    buffers: Buffers,
    w1: Tensor,
    w2: Tensor,
    eps: float,
    grid: BlockTopK,
    params: Sequence[Tensor],
    scale: float,
    decay: float,
    dtype: torch.dtype,
) -> bool:
    """Compute p <- decay * p + scale * u in place by a kernel, for n matrices p, with u from `adam`; tell whether it was done."""
    stored, weights = (buffers["window_indices"], buffers["window_values"], None), (w1.to(dtype), w2.to(dtype))
    return kernels.move(stored, *weights, eps, grid.cols, grid.blocks, params, scale, decay)
