"""Windows whose rows are stored in few bits. The staged row and K are those of the rows as stored; e takes the difference.

| row | stored | bytes |
|---|---|---|
| plain | int8, a scale for each 256 numbers of a matrix row | 1 |
| P of low rank | 8-bit floats (E4M3) without a scale, as its columns are orthonormal | 1 |
| Q of low rank | int8, a scale for each 256 numbers of a column | 1 |
| sparse | 10 bits of index and 6 of value; a power of two as scale for each block | 2 for each kept entry |

A scale of P's columns would be a maximum over rows that other processes may hold. All of it is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .codecs import BlockQuantizer, SparseCodec, decode_float8, encode_float8
from .linalg import chunks
from .windows import DenseWindow, LowRankWindow, SparseWindow

_INT8 = BlockQuantizer(8)


class _Coded:
    """Staging where rows are stored as codes: `_codes` is what enters the window, `_row` the same in the compute dtype."""

    _codes: tuple[Tensor, ...] | None = None

    def commit(self, j: Tensor, accepted: bool | Tensor = True) -> None:
        """See Window."""
        self._row = self._codes
        super().commit(j, accepted)

    def release(self) -> None:
        """See Window."""
        self._codes = None
        super().release()


class LowBitDenseWindow(_Coded, DenseWindow):
    """Rows in int8: codes as DenseWindow's rows, scales (n, m, rows, blocks)."""

    def __init__(self, n: int, m: int, rows: int, cols: int, *, compute_dtype, device):
        super().__init__(n, m, rows, cols, dtype=torch.int8, compute_dtype=compute_dtype, device=device)
        scales = _INT8.shapes(n, m, rows, cols)[1]
        self.state["window_rows_scale"] = torch.zeros(scales, dtype=compute_dtype, device=device)

    def stage(self, parts: tuple[Tensor, ...]) -> None:
        """Take a = e + g, a copy, which becomes the row as stored."""
        (a,) = parts
        n, rows, cols = a.shape
        codes, scale = _INT8.zeros(n, rows, cols, scale_dtype=a.dtype, device=a.device)
        for part in chunks(rows, n * cols * 24):
            codes[:, part], scale[:, part] = _INT8.encode(a[:, part])
            a[:, part] = _INT8.decode(codes[:, part], scale[:, part], cols)
        self._codes, self._row = (codes, scale), (a,)

    def _slots(self, slots: slice, rows: slice = slice(None)) -> Tensor:
        codes, scale = (buffer[:, slots, rows] for buffer in self.state.values())
        return _INT8.decode(codes, scale, codes.shape[3])

    def _dots_with_window(self) -> Tensor:
        n, m, rows, cols = self.state["window_rows"].shape
        bytes_each = 2 * n * rows * cols * self.compute_dtype.itemsize
        return torch.cat([self._dots_of(self._slots(slots)) for slots in chunks(m, bytes_each)], 1)


class LowBitLowRankWindow(_Coded, LowRankWindow):
    """Rows P Q^T: P (n, m, r, rows) in 8-bit floats, Q (n, m, r, cols) in int8 with scales (n, m, r, blocks)."""

    def __init__(self, n: int, m: int, rows: int, cols: int, rank: int, *, compute_dtype, device):
        super().__init__(n, m, rows, cols, rank, dtype=torch.uint8, compute_dtype=compute_dtype, device=device)
        q, scales = _INT8.zeros(n, m, rank, cols, scale_dtype=compute_dtype, device=device)
        self.state |= {"window_q": q, "window_q_scale": scales}

    def stage(self, parts: tuple[Tensor, ...]) -> None:
        """See LowRankWindow."""
        p, q = (part.mT.contiguous() for part in parts)
        self._codes = encode_float8(p), *_INT8.encode(q)
        self._row = self._decode(*self._codes)

    def _factors(self, slots: slice, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        p, *q = (buffer[:, slots] for buffer in self.state.values())
        return self._decode(p[..., rows], *q)

    def _decode(self, p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return decode_float8(p, self.compute_dtype), _INT8.decode(q, scale, q.shape[-1])

    def _dots_with_window(self) -> Tensor:
        n, m, rank, rows = self.state["window_p"].shape
        bytes_each = 2 * n * rank * (rows + self.state["window_q"].shape[3]) * self.compute_dtype.itemsize
        return torch.cat([self._factor_dots(*self._factors(slots)) for slots in chunks(m, bytes_each)], 1)


class LowBitSparseWindow(_Coded, SparseWindow):
    """Rows as kept entries in 16 bits: entries (n, rows, m, k) int16, scales (n, rows, m, blocks) uint8.

    Args:
        codec: of the rows' entries.
        offsets, blocks: as in SparseWindow.
    """

    entry_bytes = 40  # of temporaries

    def __init__(
        self,
        n: int,
        m: int,
        rows: int,
        cols: int,
        offsets: Tensor,
        blocks: kernels.Blocks,
        codec: SparseCodec,
        *,
        compute_dtype,
        device,
    ):
        super().__init__(n, 0, rows, cols, offsets, blocks, dtype=compute_dtype, compute_dtype=compute_dtype, device=device)
        self.codec = codec
        self.shape = (n, rows, m, len(offsets))
        self.state = {
            "window_entries": torch.zeros(self.shape, dtype=torch.int16, device=device),
            "window_scale": torch.zeros(n, rows, m, codec.blocks, dtype=torch.uint8, device=device),
        }

    def stage(self, parts: tuple[Tensor, ...]) -> None:
        """See SparseWindow."""
        self._codes = self.codec.encode(*parts)
        self._row = parts[0], self.codec.decode(*self._codes, self.compute_dtype)[1]

    def _stored(self) -> kernels.Stored:
        entries, scales = self.state.values()
        return entries, None, scales

    def _read(self, tensors: slice, rows: slice) -> tuple[Tensor, Tensor]:
        entries, scales = (buffer[tensors, rows] for buffer in self.state.values())
        return self.codec.decode(entries, scales, self.compute_dtype)
