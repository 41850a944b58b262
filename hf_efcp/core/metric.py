"""The metric of a window: D, a running second moment of the gradient, and S = D^(1/4), elementwise.

    g^ = S^-1 g  enters the window,  u = S^-1 G^T c  leaves it

so that outside of the window's span the update is that of a diagonal method, and the full matrix acts within the span. S^-1 is 0
where D is 0. A running mean of numbers x_t is x <- beta x + (1 - beta) x_t, divided by 1 - beta^k. k counts the tensor's own
gradients from the first one that is not zero.

    factored   D_ij = (r_i + eps mu) (c_j / mu + eps)   r_i, c_j: means of g^2 over a row, a column; mu: the mean of c
    diagonal   D = v + eps mean(v)                      v: of g^2
    tensor     D = v                                    v: of the mean of g^2 over the tensor, or over its part in a flat piece

r, and the v of `diagonal`, contain the present gradient. c, mu, mean(v), and the v of `tensor`, are those of the step before: so
processes that hold some rows each need no message before they whiten them. With comm="factors", all of D is that of the step
before (lagged.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import kernels
from .cells import ALL, Cell, Layout, Spec
from .deferred import masked
from .linalg import row_chunks, stacked
from .moments import divisors, inverse_root, measured, square_sums
from .values import POSITIVE

# S^-1 as two factors: x (n, rows) and y (n, cols), in the dtype of the arithmetic.
Scale = tuple[Tensor, Tensor]


def kind_of(layout: Layout, metric: str) -> str:
    """Give the kind of a tensor's metric. A vector has no rows and columns to factor; an empty tensor has nothing to measure."""
    if not layout.numel:
        return "none"
    if metric == "tensor" and layout.parts is not None:
        return "parts"
    return "diagonal" if metric == "factored" and layout.vector else metric


def specs(layout: Layout, metric: str) -> tuple[Spec, ...]:
    """Declare the state of a tensor's metric.

    Args:
        layout: of the parameter.
        metric: "none", "factored", "diagonal" or "tensor".
    """
    kind = kind_of(layout, metric)
    shape = (len(layout.parts),) if kind == "parts" and layout.parts is not None else ()
    count, mean = Spec("metric_count", shape, torch.int64), Spec("metric_mean", shape, layout.dtype, values=POSITIVE)
    if kind == "factored":
        rows = Spec("metric_rows", (layout.rows,), layout.dtype, rows=0, values=POSITIVE)
        return rows, Spec("metric_cols", (layout.cols,), layout.dtype, values=POSITIVE), count
    if kind == "diagonal":
        return Spec("metric_values", (layout.rows, layout.cols), layout.dtype, rows=0, values=POSITIVE), mean, count
    return (mean, count) if kind in ("tensor", "parts") else ()


class Metric:
    """D of n tensors of one shape, or of the rows of them that this process holds. A step calls

        measure(g),  whitened(g) ...,  commit(g),  unwhiten_(u)

    Args:
        cells: of the state, by name without `metric_`.
        layout: of one whole parameter.
        beta, eps: `metric_beta` and `metric_eps`.
        total: sums a tensor over the processes that share the matrices; None: the matrices are whole here.

    Attributes:
        means: (n, k) fp64, means of this gradient's squares over all rows of a tensor, which the next step's D needs. If
            `divided`, `measure` gives this process's part, and the caller puts the sum over processes in its place.
        scale: S^-1 of this step as factors; None: S^-1 has no factors.
        entering: the factors by which g is multiplied where it enters the window.
        square: (n,) fp64, the sum of S_i^2 of each tensor over the rows that this process holds.
    """

    def __init__(
        self,
        cells: Mapping[str, Cell],
        layout: Layout,
        beta: float,
        eps: float,
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        self.cells, self.layout, self.beta, self.eps, self.total = cells, layout, beta, eps, total
        self.turn = cells["count"].turn
        self.means: Tensor = torch.empty(0)
        self.scale: Scale | None = None
        self.square: Tensor = torch.empty(0)

    @property
    def divided(self) -> bool:
        """Whether `means` has to be summed over processes."""
        return self.total is not None

    @property
    def entering(self) -> Scale | None:
        """See above."""
        return self.scale

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """Read g, n matrices (rows, cols), and make D. The state does not change."""
        raise NotImplementedError

    def whitened(self, gradients: Sequence[Tensor]) -> kernels.Matrices:
        """Give S^-1 g, n matrices, if S has no factors. Else give g itself, and the caller applies `scale`."""
        return gradients

    def unwhiten_(self, u: Tensor, rows: slice = ALL) -> Tensor:
        """Compute u <- S^-1 u for rows `rows` of n matrices, after `commit`; return u."""
        assert self.scale is not None
        return scaled_(u, self.scale, rows)

    def live_squares(self) -> Tensor:
        """Give `square` with zeros for the tensors without a gradient, (n,) fp64."""
        if not self.turn.absent:
            return self.square
        square = self.square.clone()
        for i in self.turn.absent:
            square[i].zero_()
        return square

    @property
    def entered(self) -> list[Tensor]:
        """The numbers that enter the state. They have to be finite in the state's dtype."""
        return [self.means]

    def commit(self, gradients: Sequence[Tensor]) -> None:
        """Put g into the running means if the step is accepted, for the tensors that have a gradient."""
        if not self.turn.absent and self.keep_at_once():
            return
        self.keep(gradients)
        count = self.cells["count"].buffer
        seen = (count > 0) | (self.means.sum(1) > 0)
        self.cells["count"].write(count + seen)
        if self.scale is not None:  # a refused step has u = 0, which has to stay 0: 0 * NaN would not
            x, y = (masked(self.turn.ok, factor, 0.0) for factor in self.scale)
            self.scale = x, y

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """Write the running means."""
        raise NotImplementedError

    def keep_at_once(self) -> bool:
        """Do all of `commit` by a kernel; tell whether it was done."""
        return False

    def mixed(self, old: Tensor, new: Tensor) -> Tensor:
        """Give beta old + (1 - beta) new in the state's dtype, cut to its largest number: sums over processes stay finite."""
        mean = torch.lerp(old.double(), new, 1 - self.beta)
        return mean.clamp_max_(torch.finfo(self.layout.dtype).max).to(self.layout.dtype)

    def divisors(self) -> tuple[Tensor, Tensor]:
        """Give 1 - beta^k and 1 - beta^(k + 1), (n,) fp64. At k = 0, where the means are 0, the first of them is 1."""
        return divisors(self.cells["count"].buffer, self.beta)


class Factored(Metric):
    """D_ij = (r_i + eps mu) (c_j / mu + eps); at a tensor's first gradient D_ij = r_i."""

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        r, c, count = (self.cells[name].buffer for name in ("rows", "cols", "count"))
        self._rows, x, y, self.square, sums = measured(gradients, r, c, count, self.beta, self.eps)
        self.means, self.scale = sums.div_(self.layout.rows), (x, y)

    def keep_at_once(self) -> bool:
        """See Metric."""
        rows, cols, count = (self.cells[name].buffer for name in ("rows", "cols", "count"))
        return kernels.remember_factored((rows, cols, count), self._rows, self.means, self.scale, self.beta, self.turn.ok)

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        self.cells["rows"].write(self._rows)
        self.cells["cols"].write(self.mixed(self.cells["cols"].buffer, self.means))


class Diagonal(Metric):
    """D = v + eps mean(v). For matrices, temporaries of their size are formed anew for each use, a few rows at a time."""

    _values: Tensor | None = None
    _inverse: Tensor | None = None
    _white: Tensor | None = None

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        self._white = None
        if self.layout.vector and self._measure_at_once(gradients):
            return
        last, self._now = self.divisors()
        self._mean = self.eps * self.cells["mean"].buffer.double() / last
        self.means = square_sums(stacked(gradients) if self.layout.vector else gradients)[:, None] / self.layout.numel
        self._values = self._inverse = None
        self.square = torch.zeros_like(self._mean)
        for part in row_chunks(gradients):
            v = self._v(gradients, part)
            d = self._d(v, self._now)
            self.square += d.sqrt().sum((1, 2), dtype=torch.float64)
            if self.layout.vector:
                self._values, self._inverse = v, inverse_root(d)
                self._white = stacked(gradients) * self._inverse

    def _measure_at_once(self, gradients: Sequence[Tensor]) -> bool:
        v, mean, count = (self.cells[name].buffer for name in ("values", "mean", "count"))
        fast = None if self.divided else kernels.measure_vectors(gradients, v, mean, count, self.beta, self.eps)
        if fast is None:
            return False
        self._values, self._inverse, self._white, self.square, means = fast
        self.means = means[:, None]
        return True

    def whitened(self, gradients: Sequence[Tensor]) -> kernels.Matrices:
        """See Metric."""
        if self._white is not None:
            return self._white
        whitened = gradients[0].new_empty(len(gradients), *gradients[0].shape)
        for part in row_chunks(gradients):
            torch.mul(stacked(gradients, part), inverse_root(self._d(self._v(gradients, part), self._now)), out=whitened[:, part])
        return whitened

    def unwhiten_(self, u: Tensor, rows: slice = ALL) -> Tensor:
        """See Metric. By now v is in the state."""
        if self._inverse is not None:
            return u.mul_(self._inverse[:, rows])
        v, divisor = self.cells["values"].buffer[:, rows], self.divisors()[0]
        for part in row_chunks(u):
            u[:, part].mul_(inverse_root(self._d(v[:, part], divisor)))
        return u

    def keep_at_once(self) -> bool:
        """See Metric."""
        if self._values is None or self._inverse is None:
            return False
        v, mean, count = (self.cells[name].buffer for name in ("values", "mean", "count"))
        state, means = (v, mean, count), self.means[:, 0]
        self._white = None
        return kernels.remember_diagonal(state, self._values, means, self._inverse, self.beta, self.turn.ok)

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        for part in row_chunks(gradients):
            self.cells["values"].write(self._v(gradients, part), part)
        self.cells["mean"].write(self.mixed(self.cells["mean"].buffer, self.means[:, 0]))
        self._white = None
        if self._inverse is not None:
            self._inverse = masked(self.turn.ok, self._inverse, 0.0)

    def _v(self, gradients: Sequence[Tensor], part: slice) -> Tensor:
        """Give some rows of v with this gradient in it, as the state will have them."""
        if self._values is not None:
            return self._values
        g = stacked(gradients, part)
        return (g.square() * (1 - self.beta)).add_(self.cells["values"].buffer[:, part], alpha=self.beta)

    def _d(self, values: Tensor, divisor: Tensor) -> Tensor:
        """Give D (n, rows, cols), for v and the divisor of its mean."""
        divisor, mean = (x[:, None, None].to(values.dtype) for x in (divisor, self._mean))
        return (values / divisor).add_(mean)


class Uniform(Metric):
    """D = v, a number. A tensor's first gradient makes its own D; if the rows are divided, this takes a message."""

    divided = False

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        rows, cols = gradients[0].shape
        sums = square_sums(gradients)
        own = (sums if self.total is None else self.total(sums)) / max(1, self.layout.numel)
        count, mean = self.cells["count"].buffer, self.cells["mean"].buffer
        d, self.means = torch.where(count > 0, mean.double() / self.divisors()[0], own), own[:, None]
        self.square = d.sqrt() * (rows * cols)
        x = inverse_root(d).to(self.layout.dtype)
        self.scale = x[:, None].expand(-1, rows).contiguous(), x.new_ones(len(x), cols)

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        self.cells["mean"].write(self.mixed(self.cells["mean"].buffer, self.means[:, 0]))


class OfParts(Uniform):
    """`tensor` for flat pieces of several tensors: each part of a piece has its own D, which no other process needs."""

    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See Metric."""
        n, numel, parts = len(gradients), gradients[0].numel(), self.layout.parts or ()
        count, mean = self.cells["count"].buffer, self.cells["mean"].buffer.double()
        lengths = [part.stop - part.start for part in parts]
        self.means = torch.zeros_like(mean)
        for i, g in enumerate(gradients):
            for j, part in enumerate(parts):
                self.means[i, j] = square_sums([g[:, part]])[0] / lengths[j]
        divisor = 1 - self.beta ** count.double()
        d = torch.where(count > 0, mean / torch.where(count > 0, divisor, 1.0), self.means)
        self.square = d.new_zeros(n)
        for j, length in enumerate(lengths):
            self.square += d[:, j].sqrt() * length
        x = inverse_root(d).to(self.layout.dtype)
        y = x.new_zeros(n, numel)
        for j, part in enumerate(parts):
            y[:, part] = x[:, j, None]
        self.scale = x.new_ones(n, 1), y

    def commit(self, gradients: Sequence[Tensor]) -> None:
        """See Metric. The count of each part begins at its own first gradient that is not zero."""
        self.cells["mean"].write(self.mixed(self.cells["mean"].buffer, self.means))
        count = self.cells["count"].buffer
        self.cells["count"].write(count + ((count > 0) | (self.means > 0)))


KINDS = {"factored": Factored, "diagonal": Diagonal, "tensor": Uniform, "parts": OfParts}


def scaled_(a: Tensor, scale: Scale, rows: slice = ALL) -> Tensor:
    """Compute a <- diag(x) a diag(y) for rows `rows` of n matrices; return a."""
    x, y = scale
    return a.mul_(x[:, rows, None]).mul_(y[:, None])
