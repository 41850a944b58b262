"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

from torch import Tensor


class ErrorFeedback:
    """The error e of a stack of tensors.

    Args:
        error: (n, rows, cols), zeros at the start; None where rows are stored exactly, so that e is always 0.
    """

    def __init__(self, error: Tensor | None):
        self.error = error

    def accumulate(self, gradient: Tensor) -> Tensor:
        """a = e + g, (n, rows, cols); leaves the state as it is."""
        return gradient if self.error is None else self.error + gradient

    def keep(self, gradient: Tensor, window) -> None:
        """e <- (e + g) - c, where c is the row that `window` holds in its newest slot."""
        if self.error is not None:
            window.subtract_row_(self.error.add_(gradient))
