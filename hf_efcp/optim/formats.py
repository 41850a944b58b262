"""Which compressor goes with which window, and when compression does not pay."""

from __future__ import annotations

import math

import torch

from ..core.compressors import BlockTopK, PowerIteration
from ..core.windows import LowRankWindow, SparseWindow, Window
from .stacks import Layout


class RowFormat:
    """What the formats share."""

    def _dtypes(self, layout: Layout) -> dict:
        return {"dtype": self.options.window_dtype or layout.dtype, "compute_dtype": layout.dtype, "device": layout.device}


class DenseRows(RowFormat):
    """Rows as they are."""

    def row_format(self, layout: Layout) -> None:
        """Always a plain row."""
        return


class SparseRows(RowFormat):
    """Block top-k rows."""

    def row_format(self, layout: Layout) -> tuple[BlockTopK, Window] | None:
        """Block top-k, unless indices and values take as much as the plain row."""
        cols = layout.cols
        if math.prod(layout.matrix) == 0:
            return None
        itemsize = (self.options.window_dtype or layout.dtype).itemsize
        compressor = BlockTopK(cols, self.options.density, self.options.block_size)
        if compressor.per_row * (itemsize + torch.int16.itemsize) >= cols * itemsize:
            return None
        shape = (layout.n, self.options.window_size, layout.rows, cols)
        window = SparseWindow(*shape, compressor.offsets(layout.device), compressor.blocks, **self._dtypes(layout))
        return compressor, window


class LowRankRows(RowFormat):
    """Rank-r rows P Q^T."""

    def row_format(self, layout: Layout) -> tuple[PowerIteration, Window] | None:
        """Rank min(r, rows, cols), unless both factors take as much as the plain row: r (rows + cols) >= rows cols."""
        rank = min(self.options.rank, *layout.matrix)
        if rank * sum(layout.matrix) >= math.prod(layout.matrix):
            return None
        n, rows, cols = layout.n, layout.rows, layout.cols
        q = torch.zeros(n, cols, rank, dtype=layout.dtype, device=layout.device)
        window = LowRankWindow(n, self.options.window_size, rows, cols, rank, **self._dtypes(layout))
        return PowerIteration(q, layout.numbers, self.options.power_iterations, layout.reduce), window
