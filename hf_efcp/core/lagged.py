"""The metric for comm="factors", where each process has its own gradient until it is compressed: D is that of the step before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cells import Layout, Turn
from .linalg import row_chunks
from .metric import Factored, Metric, Scale
from .moments import columns, inverse_root, squares


class Lagged(Factored):
    """`Factored`, but r is that of the step before too: processes with different gradients have the same D before they compress.

    A tensor's first gradient only makes D: S^-1 is 0, and the entry is zero. A row of g that is far larger than D says would
    enter the window far too large. So a row whose root mean square of g / sqrt(D), over its columns, exceeds 1 / sqrt(1 - beta)
    is scaled down to that when it enters the window. D and the update do not take this scale.

    A step calls `measure`, as for every metric. Or it calls `open`; and then, for some tensors at a time, `read`, and `put` with
    the means over processes of the results of `read`.

    Attributes:
        factors: those of D, (n, rows) and (n, cols) fp64.
        row_means: (n, rows) fp64, of the squares of this gradient.
    """

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        self.open()
        positions = torch.arange(len(gradients), device=gradients[0].device)
        self.put(positions, *self.read(gradients, positions))

    def open(self) -> None:
        """Make D and S^-1 from the state."""
        rows, divisor = self.cells["rows"].buffer, self.divisors()[0]
        more, c = columns(self.cells["cols"].buffer, divisor, self.eps)
        r = rows.double() / divisor[:, None] + more[:, None]
        self.factors, self.square = (r, c), r.sqrt().sum(1) * c.sqrt().sum(1)
        self.scale = inverse_root(r).to(self.layout.dtype), inverse_root(c).to(self.layout.dtype)
        self._entering = self.scale[0].clone(), self.scale[1]
        self.row_means, self.means = torch.zeros_like(rows).double(), torch.zeros_like(self.cells["cols"].buffer).double()

    def read(self, gradients: Sequence[Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Read g of the tensors at `positions`, (k,) int64; give means of g^2 over each row, (k, rows), and column, (k, cols)."""
        assert self.scale is not None
        rows, cols = squares(gradients)
        r, c = (d[positions] for d in self.factors)
        over = row_squares(gradients, reciprocal(c)) / self.layout.cols * reciprocal(r)
        shrink = (over * (1 - self.beta)).clamp_min(1.0).rsqrt()
        self._entering[0].index_copy_(0, positions, (self.scale[0][positions] * shrink).to(self.layout.dtype))
        return rows / self.layout.cols, cols / self.layout.rows

    def put(self, positions: Tensor, row_means: Tensor, means: Tensor) -> None:
        """Take the means of g^2 of the tensors at `positions`."""
        self.row_means.index_copy_(0, positions, row_means.double())
        self.means.index_copy_(0, positions, means.double())

    @property
    def entering(self) -> Scale:
        """See Metric."""
        return self._entering

    @property
    def entered(self) -> list[Tensor]:
        """See Metric."""
        return [self.means, self.row_means]

    def keep_at_once(self) -> bool:
        """See Metric."""
        return False

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        self.cells["rows"].write(self.mixed(self.cells["rows"].buffer, self.row_means))
        self.cells["cols"].write(self.mixed(self.cells["cols"].buffer, self.means))


class Borrowed(Metric):
    """The metric of n pieces of tensors whose D is in `Lagged` metrics, which have read the gradients already.

    Args:
        turn: of the pieces.
        layout: of one whole parameter.
        sources: gives for each piece its `Lagged` metric, the tensor's position there, and the rows of the piece.
    """

    def __init__(self, turn: Turn, layout: Layout, sources: Callable[[], Sequence[tuple[Lagged, int, slice]]]):
        self.turn, self.layout, self.sources, self.total = turn, layout, sources, None

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        x, y, square, means = [], [], [], []
        for metric, i, rows in self.sources():
            assert metric.scale is not None
            r, c = metric.factors
            x.append(metric.scale[0][i, rows])
            y.append(metric.scale[1][i])
            square.append(r[i, rows].sqrt().sum() * c[i].sqrt().sum())
            means.append(torch.cat([metric.row_means[i], metric.means[i]]))
        self.scale = torch.stack(x), torch.stack(y)
        self.square, self.means = torch.stack(square), torch.stack(means)

    def commit(self, gradients: Sequence[Tensor]) -> None:
        """Do nothing: the metrics that have D do it."""


def reciprocal(d: Tensor) -> Tensor:
    """Give 1 / d, 0 where d is 0, and NaN where d is not a number."""
    return torch.where(d > 0, d, 1.0).reciprocal() * (d > 0) + 0 * d


def row_squares(gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum the squares of n matrices (rows, cols), times weights (n, cols) fp64, over each row: (n, rows) fp64."""
    out = weights.new_empty(len(gradients), len(gradients[0]))
    for i, g in enumerate(gradients):
        for part in row_chunks([g]):
            out[i, part] = g[part].double().square() @ weights[i]
    return out
