"""Error feedback, once for all compressors: what a row of the window leaves out of the gradient enters the next one.

    a = e + g,   c = C(a) as the window stores it,   e <- a - c

so that sum of rows + e = sum of gradients (telescoping) and no gradient mass is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .codecs import BlockQuantizer
from .deferred import masked
from .linalg import chunks, counted_uniform, stochastic_round


class ErrorFeedback:
    """The error e of a stack of tensors, in a float dtype.

    Args:
        error: (n, rows, cols), zeros at the start; None where rows are stored exactly, so that e is always 0. In bf16 it is
            rounded stochastically, by numbers counted by step and tensor.
        salt: (n,) int64, a number per tensor.
        first: where the tensors are parts of larger ones, the row and the column at which they begin there.
    """

    # Bytes of temporaries for each number that is converted.
    _temporaries = 8

    def __init__(self, error: Tensor | None, salt: Tensor | None = None, first: tuple[int, int] = (0, 0)):
        self.error = error
        self.salt = salt
        self.first = first

    def state(self) -> dict[str, Tensor]:
        """State name -> buffer (n, ...)."""
        return {} if self.error is None else {"error": self.error}

    def accumulate(self, gradient: Tensor, in_place: bool = False) -> Tensor:
        """a = e + g, (n, rows, cols), in the gradient's dtype and, if `in_place`, in its memory; the state stays as it is."""
        if self.error is None:
            return gradient
        a = gradient if in_place else torch.empty_like(gradient, memory_format=torch.contiguous_format)
        for part in self._row_chunks(gradient):
            torch.add(gradient[:, part], self._read(part, a), out=a[:, part])
        return a

    def keep(
        self,
        gradient: Tensor,
        window,
        step: Tensor,
        accepted: bool | Tensor = True,
        in_place: bool = False,
        absent: Sequence[int] = (),
    ) -> None:
        """e <- (e + g) - c where `accepted`, with c the row that `window` has staged.

        Args:
            gradient: g, which may be overwritten if `in_place`.
            window: with the staged row.
            step: the number of the step, that rounding is counted by.
            accepted: whether to write at all.
            absent: tensors of the stack that have no gradient and a row of zeros: what is stored of them stays, bit for bit.
        """
        if self.error is None:
            return
        if accepted is True and self.error.dtype == gradient.dtype:
            window.subtract_row_(self.error.add_(gradient))
            return
        a = window.subtract_row_(self.accumulate(gradient, in_place))
        for part in self._row_chunks(gradient):
            self._write(part, a[:, part], step, accepted, absent)

    def square(self) -> Tensor | float:
        """|e|^2, summed in fp64."""
        if self.error is None:
            return 0.0
        return sum(torch.linalg.vector_norm(e, dtype=torch.float64).square() for e in self._all())

    def _row_chunks(self, like: Tensor) -> Iterator[slice]:
        """Rows at a time, so that converted copies of something of shape `like` (n, rows, cols) stay small."""
        n, rows, cols = like.shape
        return chunks(rows, n * cols * self._temporaries)

    def _all(self) -> Iterator[Tensor]:
        """e, some rows at a time."""
        for part in self._row_chunks(self.error):
            yield self.error[:, part]

    def _read(self, part: slice, like: Tensor) -> Tensor:
        """Rows of e, in the dtype of `like` (n, rows, cols)."""
        return self.error[:, part].to(like.dtype)

    def _from(self, part: slice) -> tuple[int, int]:
        """Where these rows begin in the whole tensors."""
        return self.first[0] + part.start, self.first[1]

    def _write(self, part: slice, a: Tensor, step: Tensor, accepted: bool | Tensor, absent: Sequence[int]) -> None:
        """Rows of e <- a. Numbers that have been rounded stay as they are: nothing to do for the absent."""
        old = self.error[:, part]
        new = stochastic_round(a, old.dtype, step, self.salt, self._from(part))
        old.copy_(masked(accepted, new, old))


class QuantizedErrorFeedback(ErrorFeedback):
    """The error in 8 or 4 bits, rounded stochastically: what rounding takes is 0 in the mean, and is not fed back.

    Args:
        bits: 8 or 4 (BlockQuantizer).
        shape: (n, rows, cols).
        dtype: of the scales.
        salt, first: as in ErrorFeedback.
    """

    _temporaries = 24

    def __init__(self, bits: int, shape: tuple[int, int, int], dtype: torch.dtype, salt: Tensor, first: tuple[int, int] = (0, 0)):
        self.quantizer = BlockQuantizer(bits)
        error, self.scale = self.quantizer.zeros(*shape, scale_dtype=dtype, device=salt.device)
        super().__init__(error, salt, first)
        self.shape = shape

    def state(self) -> dict[str, Tensor]:
        """See ErrorFeedback."""
        return {"error": self.error, "error_scale": self.scale}

    def _all(self) -> Iterator[Tensor]:
        n, rows, cols = self.shape
        for part in chunks(rows, n * cols * self._temporaries):
            yield self.quantizer.decode(self.error[:, part], self.scale[:, part], cols)

    def _read(self, part: slice, like: Tensor) -> Tensor:
        return self.quantizer.decode(self.error[:, part], self.scale[:, part], self.shape[2])

    def _write(self, part: slice, a: Tensor, step: Tensor, accepted: bool | Tensor, absent: Sequence[int]) -> None:
        noise = counted_uniform(step, self.salt, *a.shape[1:], self._from(part))
        for stored, new in zip((self.error, self.scale), self.quantizer.encode(a, noise), strict=True):
            old = stored[:, part]
            for i in absent:  # rounded again, they would be other numbers
                new[i] = old[i]
            old.copy_(masked(accepted, new, old))
