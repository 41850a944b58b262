"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from .codecs import BlockQuantizer
from .deferred import masked
from .linalg import row_chunks, stacked
from .random import counted_uniform, stochastic_round


class ErrorFeedback:
    """The error e of a stack of tensors, in a float dtype.

    Args:
        error: (n, rows, cols), zeros at the start; None where rows are stored exactly, so that e is always 0. In bf16 it is
            rounded stochastically, by numbers counted by step and tensor.
        salt: (n,) int64, a number per tensor.
        first: where the tensors are parts of larger ones, the row and the column at which they begin there.
    """

    def __init__(self, error: Tensor | None, salt: Tensor | None = None, first: tuple[int, int] = (0, 0)):
        self.error = error
        self.salt = salt
        self.first = first

    def state(self) -> dict[str, Tensor]:
        """State name -> buffer (n, ...)."""
        return {} if self.error is None else {"error": self.error}

    def stored(self) -> kernels.Error:
        """The buffers, for kernels."""
        return None if self.error is None else (self.error, None)

    def accumulate(self, gradients: Sequence[Tensor], rows: slice = slice(None)) -> Tensor:
        """Rows `rows` of a = e + g, (n, rows, cols), in the gradients' dtype; without e, g itself, a view or a copy.

        Args:
            gradients: g, n matrices (rows, cols): a list of them, or a tensor (n, rows, cols).
            rows: which.
        """
        a = stacked(gradients, rows)
        if self.error is None:
            return a
        copied = not isinstance(gradients, Tensor) and len(gradients) > 1
        return a.add_(self._read(rows, a.dtype)) if copied else a + self._read(rows, a.dtype)

    def keep(
        self, gradients: Sequence[Tensor], window, step: Tensor, accepted: bool | Tensor = True, absent: Sequence[int] = ()
    ) -> None:
        """e <- (e + g) - c where `accepted`, with c the row that `window` has staged.

        Args:
            gradients: g, as for `accumulate`, which stay as they are.
            window: with the staged row.
            step: the number of the step, that rounding is counted by.
            accepted: whether to write at all.
            absent: tensors of the stack that have no gradient and a row of zeros: what is stored of them stays, bit for bit.
        """
        if self.error is None:
            return
        rounding = step, self.salt, self.first
        if accepted is True and window.keep(self.stored(), gradients, rounding, absent):
            return
        for part in row_chunks(gradients):
            if accepted is True and self.error.dtype == gradients[0].dtype:
                window.subtract_row_(self.error[:, part].add_(stacked(gradients, part)), part)
            else:
                a = window.subtract_row_(self.accumulate(gradients, part), part)
                self._write(part, a, step, accepted, absent)

    def square(self) -> Tensor | float:
        """|e|^2, summed in fp64."""
        if self.error is None:
            return 0.0
        parts = row_chunks(self.error)
        return sum(torch.linalg.vector_norm(self._read(p, self.error.dtype), dtype=torch.float64).square() for p in parts)

    def _read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of e."""
        return self.error[:, rows].to(dtype)

    def _from(self, rows: slice) -> tuple[int, int]:
        """Where these rows begin in the whole tensors."""
        return self.first[0] + rows.start, self.first[1]

    def _write(self, rows: slice, a: Tensor, step: Tensor, accepted: bool | Tensor, absent: Sequence[int]) -> None:
        """Rows of e <- a. Numbers that have been rounded stay as they are: nothing to do for the absent."""
        old = self.error[:, rows]
        new = stochastic_round(a, old.dtype, step, self.salt, self._from(rows))
        old.copy_(masked(accepted, new, old))


class QuantizedErrorFeedback(ErrorFeedback):
    """The error in 8 or 4 bits, rounded stochastically: what rounding takes is 0 in the mean, and is not fed back.

    Args:
        bits: 8 or 4 (BlockQuantizer).
        shape: (n, rows, cols).
        dtype: of the scales.
        salt, first: as in ErrorFeedback.
    """

    def __init__(self, bits: int, shape: tuple[int, int, int], dtype: torch.dtype, salt: Tensor, first: tuple[int, int] = (0, 0)):
        self.quantizer, self.cols = BlockQuantizer(bits), shape[2]
        error, self.scale = self.quantizer.zeros(*shape, scale_dtype=dtype, device=salt.device)
        super().__init__(error, salt, first)

    def state(self) -> dict[str, Tensor]:
        """See ErrorFeedback."""
        return {"error": self.error, "error_scale": self.scale}

    def stored(self) -> kernels.Error:
        """See ErrorFeedback."""
        return self.error, self.scale

    def _read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.quantizer.decode(self.error[:, rows], self.scale[:, rows], self.cols)

    def _write(self, rows: slice, a: Tensor, step: Tensor, accepted: bool | Tensor, absent: Sequence[int]) -> None:
        noise = counted_uniform(step, self.salt, *a.shape[1:], self._from(rows))
        for stored, new in zip((self.error, self.scale), self.quantizer.encode(a, noise), strict=True):
            old = stored[:, rows]
            for i in absent:  # rounded again, they would be other numbers
                new[i] = old[i]
            old.copy_(masked(accepted, new, old))
