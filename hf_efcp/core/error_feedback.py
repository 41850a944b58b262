"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .deferred import masked
from .linalg import chunks, stochastic_round


class ErrorFeedback:
    """The error e of a stack of tensors.

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

    def accumulate(self, gradient: Tensor, in_place: bool = False) -> Tensor:
        """a = e + g, (n, rows, cols), in the gradient's dtype and, if `in_place`, in its memory; the state stays as it is."""
        if self.error is None:
            return gradient
        a = gradient if in_place else torch.empty_like(gradient, memory_format=torch.contiguous_format)
        for part in self._row_chunks():
            torch.add(gradient[:, part], self.error[:, part].to(a.dtype), out=a[:, part])
        return a

    def keep(self, gradient: Tensor, window, step: Tensor, accepted: bool | Tensor = True, in_place: bool = False) -> None:
        """e <- (e + g) - c where `accepted`, with c the row that `window` has staged; `in_place`: g may be overwritten."""
        if self.error is None:
            return
        if accepted is True and self.error.dtype == gradient.dtype:
            window.subtract_row_(self.error.add_(gradient))
            return
        a = window.subtract_row_(self.accumulate(gradient, in_place))
        for part in self._row_chunks():
            old = self.error[:, part]
            row, col = self.first
            new = stochastic_round(a[:, part], old.dtype, step, self.salt, (row + part.start, col))
            old.copy_(masked(accepted, new, old))

    def square(self) -> Tensor | float:
        """|e|^2, summed in fp64."""
        if self.error is None:
            return 0.0
        return sum(torch.linalg.vector_norm(self.error[:, part], dtype=torch.float64).square() for part in self._row_chunks())

    def _row_chunks(self) -> Iterator[slice]:
        """Rows at a time, so that converted copies stay small."""
        n, rows, cols = self.error.shape
        return chunks(rows, n * cols * 8)
