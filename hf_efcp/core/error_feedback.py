"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

from torch import Tensor

from .linalg import stochastic_round


class ErrorFeedback:
    """The error e of a stack of tensors.

    Args:
        error: (n, rows, cols), zeros at the start; None where rows are stored exactly, so that e is always 0. In bf16 it is
            rounded stochastically, by numbers counted by step and tensor.
        salt: (n,) int64, a number per tensor.
    """

    def __init__(self, error: Tensor | None, salt: Tensor | None = None):
        self.error = error
        self.salt = salt

    def accumulate(self, gradient: Tensor) -> Tensor:
        """a = e + g, (n, rows, cols); leaves the state as it is."""
        return gradient if self.error is None else self.error + gradient

    def keep(self, gradient: Tensor, window, step: Tensor) -> None:
        """e <- (e + g) - c, where c is the row that `window` has staged."""
        if self.error is None:
            return
        if self.error.dtype == gradient.dtype:
            window.subtract_row_(self.error.add_(gradient))
        else:
            a = window.subtract_row_(self.accumulate(gradient))
            self.error.copy_(stochastic_round(a, self.error.dtype, step, self.salt))
