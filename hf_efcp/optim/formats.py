"""Which compressor goes with which window, and when compression does not pay."""

from __future__ import annotations

import math

import torch

from ..core.codecs import BlockQuantizer, SparseCodec
from ..core.compressors import BlockTopK, PowerIteration
from ..core.low_bit_windows import LowBitLowRankWindow, LowBitSparseWindow
from ..core.windows import LowRankWindow, SparseWindow, Window
from .stacks import Layout


class RowFormat:
    """What the formats share."""

    def _dtypes(self, layout: Layout) -> dict:
        like = {"compute_dtype": layout.dtype, "device": layout.device}
        return like if self._low_bit else {"dtype": self.options.window_dtype or layout.dtype, **like}

    @property
    def _low_bit(self) -> bool:
        return self.options.window_format == "low_bit"


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
        top = BlockTopK(cols, self.options.density, self.options.block_size)
        if self._low_bit:
            codec = SparseCodec(top.block, top.full, top.kept, top.kept_tail)
            scales = BlockQuantizer(8).shapes(cols)[1][0] * layout.dtype.itemsize
            compressed, whole = 2 * top.per_row + codec.blocks, cols + scales
        else:
            itemsize = (self.options.window_dtype or layout.dtype).itemsize
            compressed, whole = top.per_row * (itemsize + torch.int16.itemsize), cols * itemsize
        if compressed >= whole:
            return None
        sizes = layout.n, self.options.window_size, layout.rows, cols, top.offsets(layout.device)
        if self._low_bit:
            return top, LowBitSparseWindow(*sizes, top.blocks, codec, **self._dtypes(layout))
        return top, SparseWindow(*sizes, top.blocks, **self._dtypes(layout))


class LowRankRows(RowFormat):
    """Rank-r rows P Q^T."""

    def row_format(self, layout: Layout) -> tuple[PowerIteration, Window] | None:
        """Rank min(r, rows, cols), unless both factors take as much as the plain row: r (rows + cols) >= rows cols."""
        rank = min(self.options.rank, *layout.matrix)
        if rank * sum(layout.matrix) >= math.prod(layout.matrix):
            return None
        n, rows, cols = layout.n, layout.rows, layout.cols
        q = torch.zeros(n, cols, rank, dtype=layout.dtype, device=layout.device)
        make = LowBitLowRankWindow if self._low_bit else LowRankWindow
        window = make(n, self.options.window_size, rows, cols, rank, **self._dtypes(layout))
        return PowerIteration(q, layout.numbers, self.options.power_iterations, layout.reduce), window
