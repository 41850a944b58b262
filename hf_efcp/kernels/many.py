"""Calls of the compiled functions for many small matrices of different shapes. cpu_many.py has the table's columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .cpu_many import WIDTH, far_squares
from .cpu_many_low_rank import apply_low_rank, are_dead, commit_low_rank, stage_low_rank
from .cpu_many_sparse import apply_sparse, commit_sparse, stage_sparse
from .cpu_threads import divide_work
from .cpu_tools import array

__all__ = ["WIDTH", "Many"]


@dataclasses.dataclass
class Many:
    """A step of many small matrices: what all of them have in common, and room for the step's numbers.

    Args:
        sparse: whether entries are sparse; else low rank.
        dtype, error_dtype, window_dtype: of the arithmetic, of the error or residual, and of the window's numbers.
        m: length of the window.
        metric: beta and eps of the factored metric; None: there is no metric.
        far: whether the part that compression leaves out is a residual; else it is the error.
        decay: of the error or residual.
        least: a column of a warm start is dead if it is at most this times as long as the longest column.
        room: how many numbers, means and indices there is room for.
        numbers: numbers of a matrix, by which work is divided among threads.
    """

    sparse: bool
    dtype: torch.dtype
    error_dtype: torch.dtype
    window_dtype: torch.dtype
    m: int
    metric: tuple[float, float] | None
    far: bool
    decay: float
    least: float
    room: tuple[int, int, int]
    numbers: int

    def __post_init__(self) -> None:
        likes = self.dtype, self.error_dtype, self.window_dtype
        self._likes = tuple(array(torch.empty(0, dtype=dtype)) for dtype in likes)
        number = self._likes[0].dtype.type
        self._decay, self._limit = number(self.decay), number(0)
        self._beta, self._eps = self.metric or (0.0, 0.0)
        self._unsigned = array(torch.empty(0, dtype=torch.int32 if self.dtype.itemsize == 4 else torch.int64))
        self._codes, self._indices = array(torch.empty(0, dtype=torch.uint8)), array(torch.empty(0, dtype=torch.int16))

    def compile(self) -> None:
        """Compile all functions. A function that cannot be compiled raises here, before anything is written."""
        none, numbers = torch.empty(0, WIDTH, dtype=torch.int64), torch.empty(0, dtype=self.dtype)
        self.dead(none)
        self.stage(none, 0)
        if self.far:
            self.squares(none)
        self.commit(none, 0, 0)
        self.apply(none, torch.empty(0, self.m, dtype=self.dtype), numbers, numbers)

    def dead(self, table: Tensor) -> Tensor:
        """Tell which matrices' warm starts have dead columns, (matrices,) bool."""
        dead = torch.zeros(len(table), dtype=torch.bool)
        if not self.sparse:
            self._divide(are_dead, table, self._likes[0], self.least, array(dead))
        return dead

    def stage(self, table: Tensor, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make the new entries, without writing state.

        Returns:
            The entries' inner products with the windows, (matrices, m); the sums of S^2, (matrices,); the room of means, in which
            `table` has places. All are fp64.
        """
        numbers, means, indices = self.room
        self._room, self._means = torch.empty(numbers, dtype=self.dtype), torch.zeros(means, dtype=torch.float64)
        dots, squares = torch.zeros(len(table), self.m, dtype=torch.float64), torch.zeros(len(table), dtype=torch.float64)
        room, results = (array(self._room), array(self._means)), (array(squares), array(dots))
        flags = self.m, j, self.metric is not None, self.far, self._beta, self._eps
        if self.sparse:
            self._entry = array(torch.empty(indices, dtype=torch.int16)), array(torch.empty(indices, dtype=self.window_dtype))
            like = *self._likes, self._unsigned, self._codes
            self._divide(stage_sparse, table, *like, *flags, *room, *results, *self._entry)
        else:
            self._divide(stage_low_rank, table, *self._likes, *flags, self.least, *room, *results)
        return dots, squares, self._means

    def commit(self, table: Tensor, j: int, step: int) -> None:
        """Write the step's state: errors or residuals, the entries in slot j, warm starts, the metric."""
        numbers = self.m, j, self.metric is not None, self._limit, self._decay, step, self._beta
        room = array(self._room), array(self._means)
        if self.sparse:
            self._divide(commit_sparse, table, *self._likes, *numbers, *room, *self._entry)
        else:
            self._divide(commit_low_rank, table, *self._likes, *numbers, *room)

    def apply(self, table: Tensor, c: Tensor, decays: Tensor, weights: Tensor) -> None:
        """Compute p <- decay * p + S^-1 (G^T c + weight * r) in place.

        Args:
            table: of the matrices.
            c: (matrices, m) in the compute dtype.
            decays, weights: a number for each matrix, (matrices,) in the compute dtype.
        """
        flags = self.metric is not None, self.far, array(self._room)
        numbers = self.m, *map(array, (c, decays, weights))
        if self.sparse:
            self._divide(apply_sparse, table, *self._likes, self._indices, self._codes, *numbers, *flags)
        else:
            self._divide(apply_low_rank, table, *self._likes, *numbers, *flags)

    def squares(self, table: Tensor) -> Tensor:
        """Sum the squares of each residual, (matrices,) fp64."""
        out = torch.empty(len(table), dtype=torch.float64)
        self._divide(far_squares, table, *self._likes[:2], array(out))
        return out

    def _divide(self, function: Any, table: Tensor, *args: Any) -> None:
        divide_work(function, len(table), self.numbers, array(table), *args)
