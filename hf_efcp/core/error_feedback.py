"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .deferred import masked
from .linalg import row_chunks, stochastic_round


class ErrorFeedback:
    """The error e of a stack of tensors.

    Args:
        error: (n, rows, cols), zeros at the start; None where rows are stored exactly, so that e is always 0. In bf16 it is
            rounded stochastically, by numbers counted by step and tensor.
        salt: (n,) int64, a number per tensor.
        first_row: where the tensors are rows of larger ones, the first of these.
    """

    def __init__(self, error: Tensor | None, salt: Tensor | None = None, first_row: int = 0):
        self.error = error
        self.salt = salt
        self.first_row = first_row

    def accumulate(self, gradient: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows `rows` of a = e + g, (n, rows, cols), in the gradient's dtype; without e, g itself or a view."""
        a = gradient if rows == slice(None) else gradient[:, rows]
        return a if self.error is None else a + self.error[:, rows].to(a.dtype)

    def keep(self, gradient: Tensor, window, step: Tensor, accepted: bool | Tensor = True) -> None:
        """e <- (e + g) - c where `accepted`, with c the row that `window` has staged."""
        if self.error is None:
            return
        if accepted is True and self.error.dtype == gradient.dtype:
            window.subtract_row_(self.error.add_(gradient))
            return
        for part in row_chunks(gradient):
            a, old = window.subtract_row_(self.accumulate(gradient, part), part), self.error[:, part]
            new = stochastic_round(a, old.dtype, step, self.salt, self.first_row + part.start)
            old.copy_(masked(accepted, new, old))

    def square(self) -> Tensor | float:
        """|e|^2, summed in fp64."""
        if self.error is None:
            return 0.0
        parts = row_chunks(self.error)
        return sum(torch.linalg.vector_norm(self.error[:, part], dtype=torch.float64).square() for part in parts)
