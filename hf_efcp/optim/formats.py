"""Which compressor goes with which window, and when compression does not pay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.compressors import BlockTopK, PowerIteration
from ..core.windows import LowRankWindow, SparseWindow, Window
from .stacks import compute_dtype


class DenseRows:
    """Rows as they are."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> None:
        """Always a plain row."""
        return


class SparseRows:
    """Block top-k rows."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> tuple[BlockTopK, Window] | None:
        """Block top-k, unless indices and values take as much as the plain row."""
        if rows * cols == 0:
            return None
        dtype = compute_dtype(first)
        compressor = BlockTopK(cols, self.options.density, self.options.block_size)
        if compressor.per_row * (dtype.itemsize + torch.int16.itemsize) >= cols * dtype.itemsize:
            return None
        window = SparseWindow(
            n, self.options.window_size, rows, cols, compressor.offsets(first.device),
            dtype=dtype, compute_dtype=dtype, device=first.device,
        )  # fmt: skip
        return compressor, window


class LowRankRows:
    """Rank-r rows P Q^T."""

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> tuple[PowerIteration, Window] | None:
        """Rank min(r, rows, cols), unless both factors take as much as the plain row: r (rows + cols) >= rows cols."""
        rank = min(self.options.rank, rows, cols)
        if rank * (rows + cols) >= rows * cols:
            return None
        dtype = compute_dtype(first)
        q = torch.zeros(n, cols, rank, dtype=dtype, device=first.device)
        window = LowRankWindow(
            n, self.options.window_size, rows, cols, rank, dtype=dtype, compute_dtype=dtype, device=first.device
        )
        return PowerIteration(q, salt), window
