"""Which compressor goes with which window, and when compression does not pay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.compressors import BlockTopK, PowerIteration
from ..core.windows import LowRankWindow, SparseWindow, Window
from .stacks import compute_dtype


class RowFormat:
    """What the formats share."""

    def _dtypes(self, first: Tensor) -> dict:
        dtype = compute_dtype(first)
        return {"dtype": self.options.window_dtype or dtype, "compute_dtype": dtype, "device": first.device}


class DenseRows(RowFormat):
    """Rows as they are."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> None:
        """Always a plain row."""
        return


class SparseRows(RowFormat):
    """Block top-k rows."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> tuple[BlockTopK, Window] | None:
        """Block top-k, unless indices and values take as much as the plain row."""
        if rows * cols == 0:
            return None
        itemsize = (self.options.window_dtype or compute_dtype(first)).itemsize
        compressor = BlockTopK(cols, self.options.density, self.options.block_size)
        if compressor.per_row * (itemsize + torch.int16.itemsize) >= cols * itemsize:
            return None
        offsets = compressor.offsets(first.device)
        window = SparseWindow(n, self.options.window_size, rows, cols, offsets, **self._dtypes(first))
        return compressor, window


class LowRankRows(RowFormat):
    """Rank-r rows P Q^T."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> tuple[PowerIteration, Window] | None:
        """Rank min(r, rows, cols), unless both factors take as much as the plain row: r (rows + cols) >= rows cols."""
        rank = min(self.options.rank, rows, cols)
        if rank * (rows + cols) >= rows * cols:
            return None
        q = torch.zeros(n, cols, rank, dtype=compute_dtype(first), device=first.device)
        window = LowRankWindow(n, self.options.window_size, rows, cols, rank, **self._dtypes(first))
        return PowerIteration(q, salt, self.options.power_iterations), window
