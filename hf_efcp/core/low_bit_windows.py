"""Windows whose entries are stored in few bits. The staged entry and K are made of stored numbers; e takes the difference.

| entry | stored | bytes |
|---|---|---|
| plain | int8, a scale for each 256 numbers of a matrix row | 1 |
| P of low rank | 8-bit floats (E4M3) without a scale, as its columns are orthonormal | 1 |
| Q of low rank | int8, a scale for each 256 numbers of a column | 1 |
| sparse | 10 bits of index and 6 of value; a power of two as scale for each block | 2 for each kept entry |

P has no scale, because a scale would be a maximum over rows that other processes may hold. All numbers are rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .accumulated import DenseEntry, Entry, LowRankEntry, SparseEntry
from .cells import ALL, Buffers, Layout, Spec
from .codecs import BlockQuantizer, SparseCodec, decode_float8, encode_float8
from .compressors import BlockTopK
from .linalg import chunks, room_bytes
from .sparse_window import SparseWindow
from .values import FLOAT8, code_scales, sparse_codes
from .windows import DenseWindow, LowRankWindow, Weights, Window

_INT8 = BlockQuantizer(8)


class _Coded(Window):
    """Staging for entries that are stored as codes: the codes enter the window; `staged` has the decoded numbers."""

    _codes: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the window is."""
        return next(iter(self.buffers.values())).device

    def release(self) -> None:
        """See Window."""
        self._codes = ()
        super().release()

    def _parts_to_store(self) -> tuple[Tensor, ...]:
        return self._codes


class LowBitDenseWindow(_Coded, DenseWindow):
    """Entries in int8: codes (n, m, rows, cols) and scales (n, m, rows, blocks)."""

    @staticmethod
    def specs(layout: Layout, m: int, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state; `dtype`: of the scales."""
        codes, scales = _INT8.shapes(m, layout.rows, layout.cols)
        return (
            Spec("window_rows", codes, torch.int8, rows=1, window=True, slot=0),
            Spec("window_rows_scale", scales, dtype, rows=1, window=True, slot=0, values=code_scales(8)),
        )

    def stage(self, entry: Entry) -> None:
        """See Window. The entry, a copy of a = e + g, is overwritten by the decoded numbers."""
        (a,) = entry.parts
        fast = kernels.encode(a, in_place=True)
        if fast is not None:
            self._codes, self.staged = fast[:2], DenseEntry(a)
            return
        n, rows, cols = a.shape
        codes, scale = _INT8.zeros(n, rows, cols, scale_dtype=a.dtype, device=a.device)
        for part in chunks(rows, n * cols * 24, room_bytes(a.device)):
            codes[:, part], scale[:, part] = _INT8.encode(a[:, part])
            a[:, part] = _INT8.decode(codes[:, part], scale[:, part], cols)
        self._codes, self.staged = (codes, scale), DenseEntry(a)

    def dots(self, j: Tensor) -> Tensor:
        """See Window."""
        codes, scale = self.buffers.values()
        fast = kernels.dense_dots(codes, scale, self._parts[0], j)
        return super().dots(j) if fast is None else fast

    def combine(self, c: Tensor, rows: slice | None = None) -> Tensor:
        """See Window."""
        codes, scale = self.buffers.values()
        fast = kernels.dense_combine(codes, scale, c.to(self.compute_dtype), rows or slice(0, codes.shape[2]))
        return super().combine(c, rows) if fast is None else fast

    def _slots(self, slots: slice, rows: slice = ALL) -> Tensor:
        codes, scale = (buffer[:, slots, rows] for buffer in self.buffers.values())
        return _INT8.decode(codes, scale, codes.shape[3])

    def _dots_with_window(self) -> Tensor:
        n, m, rows, cols = self.buffers["window_rows"].shape
        bytes_each = 2 * n * rows * cols * self.compute_dtype.itemsize
        parts = chunks(m, bytes_each, room_bytes(self.device))
        return torch.cat([self._dots_of(self._slots(slots)) for slots in parts], 1)


class LowBitLowRankWindow(_Coded, LowRankWindow):
    """Entries P Q^T: P (n, m, r, rows) in 8-bit floats, Q (n, m, r, cols) in int8 with scales (n, m, r, blocks)."""

    @staticmethod
    def specs(layout: Layout, m: int, rank: int, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state; `dtype`: of the scales."""
        codes, scales = _INT8.shapes(m, rank, layout.cols)
        return (
            Spec("window_p", (m, rank, layout.rows), torch.uint8, rows=2, window=True, slot=0, values=FLOAT8),
            Spec("window_q", codes, torch.int8, window=True, slot=0),
            Spec("window_q_scale", scales, dtype, window=True, slot=0, values=code_scales(8)),
        )

    def stage(self, entry: Entry) -> None:
        """See Window."""
        fast_p, fast_q = kernels.encode(entry.parts[0], float8=True), kernels.encode(entry.parts[1])
        if fast_p is not None and fast_q is not None:
            (p, _, left), (q, scale, right) = fast_p, fast_q
        else:
            p, (q, scale) = encode_float8(entry.parts[0]), _INT8.encode(entry.parts[1])
            left, right = self._decode(p, q, scale)
        self._codes, self.staged = (p, q, scale), LowRankEntry(left, right)

    def _factors(self, slots: slice, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        p, q, scale = (buffer[:, slots] for buffer in self.buffers.values())
        return self._decode(p[..., rows], q, scale)

    def _weighted(self, slots: slice, rows: slice, weights: Weights, sizes: Weights) -> tuple[Tensor, Tensor]:
        p, q, scale = (buffer[:, slots] for buffer in self.buffers.values())
        dtypes = self.compute_dtype, self.update_dtype
        left = kernels.decode(p[..., rows], None, dtypes, weights[0], sizes[0])
        right = None if left is None else kernels.decode(q, scale, dtypes, weights[1], sizes[1])
        return super()._weighted(slots, rows, weights, sizes) if left is None or right is None else (left, right)

    def _decode(self, p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return decode_float8(p, self.compute_dtype), _INT8.decode(q, scale, q.shape[-1])

    def _dots_with_window(self) -> Tensor:
        n, m, rank, rows = self.buffers["window_p"].shape
        bytes_each = 2 * n * rank * (rows + self.buffers["window_q"].shape[3]) * self.compute_dtype.itemsize
        parts = chunks(m, bytes_each, room_bytes(self.device))
        return torch.cat([self._factor_dots(*self._factors(slots)) for slots in parts], 1)


class LowBitSparseWindow(_Coded, SparseWindow):
    """Kept entries in 16 bits: entries (n, rows, m, k) int16, scales (n, rows, m, blocks) uint8.

    Args:
        buffers, compute_dtype, grid: see SparseWindow.
    """

    entry_bytes = 40

    def __init__(self, buffers: Buffers, compute_dtype: torch.dtype, grid: BlockTopK):
        super().__init__(buffers, compute_dtype, grid)
        self.codec = codec_of(grid)

    @staticmethod
    def specs(layout: Layout, m: int, grid: BlockTopK, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Declare the window's state; `dtype` has no effect here."""
        codec = codec_of(grid)
        codes, scales = sparse_codes(grid.blocks, grid.cols, codec, layout.dtype)
        return (
            Spec("window_entries", (layout.rows, m, grid.per_row), torch.int16, rows=0, window=True, slot=1, values=codes),
            Spec("window_scale", (layout.rows, m, codec.blocks), torch.uint8, rows=0, window=True, slot=1, values=scales),
        )

    def stage(self, entry: Entry) -> None:
        """See Window."""
        indices, values = entry.parts
        fast = kernels.encode_sparse(indices, values, self.grid.blocks, self.grid.cols)
        if fast is None:
            entries, scales = self.codec.encode(indices, values)
            fast = entries, scales, self.codec.decode(entries, scales, self.compute_dtype)[1]
        self._codes, self.staged = fast[:2], SparseEntry(indices, fast[2], self.grid)

    def _stored(self) -> kernels.Stored:
        return self.buffers["window_entries"], None, self.buffers["window_scale"]

    def _read(self, tensors: slice, rows: slice) -> tuple[Tensor, Tensor]:
        entries, scales = (buffer[tensors, rows] for buffer in self.buffers.values())
        return self.codec.decode(entries, scales, self.compute_dtype)


def codec_of(grid: BlockTopK) -> SparseCodec:
    """Give the 16-bit format of the grid's entries."""
    return SparseCodec(grid.block, grid.full, grid.kept, grid.kept_tail)
