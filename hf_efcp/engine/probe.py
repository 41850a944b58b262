"""Figures that a usual step does not compute: what compression loses, and how the update differs from the gradient.

A step is probed when somebody asks for it. A probed step changes parameters and state as any other step does. Every figure is
made of sums over coordinates. Processes add up their sums in one message, so that N processes give the figures of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import matrix_shape
from ..core.linalg import chunk_bytes, chunks
from ..distributed.factors import mean_
from .method import Group
from .setup import Setup, l2_of, rate_of

# Bins of |u/g|: how many for each power of two, and how many powers of two on each side of 1.
_FINE, _OCTAVES = 64, 64
_BINS = 2 * _FINE * _OCTAVES
# The number of coordinates that make the quantiles. In a larger model, every k-th coordinate counts.
_SAMPLE = 2**18
_QUANTILES = (25, 50, 75)
_TOTALS = ("accepted", "g2", "ug", "p2", "moved2", "zero_g", "zero_u", "operand2", "entering2", "lost2", "error2")


class Probe:
    """The sums of one step. The engine shows the probe every operand and every update.

    Args:
        setup: of the step.
        groups: parameter groups.
        options: of the optimizer.

    Attributes:
        done: whether all processes have added up their sums. A step that the host knows to be refused has none.
    """

    def __init__(self, setup: Setup, groups: Sequence[Group], options: Any):
        self.setup, self.groups, self.done = setup, groups, False
        self.l2 = [l2_of(group, options) for group in groups].__getitem__
        self.kinds = ("all", *(() if setup.placement.flat else _kinds(groups, setup)))
        device = setup.counters.step.device
        names = [*_TOTALS, *(f"{what} {kind}" for kind in self.kinds for what in ("u2", "n"))]
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self.bins = torch.zeros(_BINS, dtype=torch.float64, device=device)
        total = setup.placement.coordinates or sum(p.numel() for p in setup.params)
        self._every = _stride(math.ceil(total / _SAMPLE), {matrix_shape(p)[1] for p in setup.params})
        self._means: dict[Tensor, Tensor] = {}
        self._held: list[tuple[Any, Tensor]] = []

    # What the engine calls -------------------------------------------------------------------------------------------------

    def read_entries(self, taken: Sequence[Any]) -> None:
        """Read a and c of a window method's stacks before they are committed. `taken`: the stacks of this step."""
        for f in self.setup.factors:
            self._read_factors(f)
        staging = {id(s) for s in taken}
        for s in self.setup.stacks:
            if s.params[0] in self._means:
                continue
            staged = id(s) in staging
            if not staged:  # the stack is in a `Together`, which does not open the stack itself
                s.open(self.setup.counters.step)
            gradients = s.gradients(s.each(self.l2))
            if not staged and s.metric is not None:
                s.metric.measure(gradients)
            self._read_operand(s.accumulated(gradients))
            if s.format.lossless:
                continue
            if staged and s.window.staged is None:
                s.compress(gradients)
            if staged:
                self._compare(s.accumulated(gradients), s.window.staged, s.turn.absent)
            else:
                self._held.append((s, s.accumulated(gradients).rows().clone()))

    def read_committed(self, j: Tensor, coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        """Read errors and updates after the commit. `coefficients`: stack -> c and the weight of the stack's residual."""
        for s, a in self._held:
            self._add("lost2", _dot(lost := s.window.stored(int(j)).subtract_from_(a), lost))
        self._held.clear()
        for s in self.setup.stacks:
            if (cell := s.error or s.residual) is not None:
                self._add("error2", cell.squares().sum())
            c, outside = coefficients(s)
            for rows in self._parts(s):
                self.see(s, rows, s.update(c, outside, rows))

    def read_tensors(self, s: Any) -> None:
        """Read a of a stack of a method that couples no tensors, before the stack's update is made."""
        cell = s.cells.get("error")
        e = None if cell is None else _own(s, cell.read())
        self._read_operand(Accumulated(s.gradients(s.each(self.l2)), None, s.turn.absent), e)

    def seen(self, s: Any, u: Any, rate: float = 1.0) -> Any:
        """Give u, or a function of rows of u, such that the probe sees u times the rule's rate; read the stack's errors."""
        if (cell := s.cells.get("error")) is not None:
            squares = _squares(_own(s, cell.read()))
            self._add("error2", squares.sum())
            self._add("lost2", squares[_live(s)].sum())
        if isinstance(u, Tensor):
            for rows in self._parts(s):
                self.see(s, rows, rate * u[:, rows])
            return u

        def rows_of_u(rows: slice) -> Tensor:
            part = u(rows)
            self.see(s, rows, rate * part)
            return part

        return rows_of_u

    def see(self, s: Any, rows: slice, u: Tensor) -> None:
        """Add up sums over rows `rows` of a stack's u, (n, rows, cols), and of its gradients and parameters."""
        if not (live := _live(s)):
            return
        pieces, u = [s.pieces[i] for i in live], u[live] if s.turn.absent else u
        g, p = (
            torch.stack([x.reshape(s.shape)[rows].to(u.dtype) for x in matrices])
            for matrices in ([self._gradient(piece) for piece in pieces], [piece.data for piece in pieces])
        )
        squares = _squares(u)
        rates = torch.tensor([float(rate_of(self.groups[piece.group])) for piece in pieces], dtype=torch.float64)
        self._add("g2", _dot(g, g))
        self._add("ug", _dot(u, g))
        self._add("p2", _dot(p, p))
        self._add("moved2", (squares * rates.square().to(u.device)).sum())
        for kind in {"all", _kind(self.groups[pieces[0].group], pieces[0].param)}.intersection(self.kinds):
            self._add(f"u2 {kind}", squares.sum())
            self._add(f"n {kind}", float(u.numel()))
        self._add("zero_g", g.numel() - torch.count_nonzero(g))
        self._add("zero_u", u.numel() - torch.count_nonzero(u))
        self._count(u, g, s.pieces[0].origin, rows, s.shape[1])

    def finish(self, ok: bool | Tensor) -> None:
        """Add up all sums over the processes, in one message. `ok`: whether the step was accepted, on a GPU a flag."""
        self._add("accepted", ok + 0.0)
        mine = torch.cat([torch.stack(list(self.sums.values())), self.bins])
        ends = self.setup.placement.sum(mine)
        self.sums = dict(zip(self.sums, ends.unbind(), strict=False))
        self.bins = ends[len(self.sums) :]
        self._means.clear()
        self.done = True

    # Sums ------------------------------------------------------------------------------------------------------------------

    def _read_factors(self, f: Any) -> None:
        """Take the mean over processes of gradients and operands, of which each process has its own (comm="factors")."""
        gradients, group, size = f.gradients(f.each(self.l2)), self.setup.placement.group, self.setup.placement.size
        for p in f.params:
            self._means[p] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        scale = None if f.metric is None else f.metric.entering
        entering = Accumulated(gradients, scale=scale).rows().clone()
        a = Accumulated(gradients, f.error, scale=scale).rows().clone()
        mean_([*(self._means[p] for p in f.params), entering, a], group, size)
        if self.setup.placement.shards > 1 and self.setup.placement.rank:
            return  # the first process counts what all processes have
        live = _live(f)
        self._add("entering2", _squares(entering[live]).sum())
        self._add("operand2", _squares(a[live]).sum())
        lost = _squares(f.window.staged.subtract_from_(a))
        self._add("lost2", lost[live].sum())
        self._add("error2", lost.sum())  # the next error, but for rounding

    def _read_operand(self, a: Accumulated, e: Tensor | None = None) -> None:
        """Add up a, and the gradient that enters a. `e`: the error, if it is not in `a`."""
        entering = Accumulated(a.gradients, None, a.absent, scale=a.scale)
        live = [i for i in range(a.shape[0]) if i not in a.absent]
        for rows in _row_parts(a):
            new = entering.rows(rows)
            whole = new if e is None else new + e[:, rows]
            whole = whole if a.error is None else a.rows(rows)
            squares = _squares(new)
            self._add("entering2", squares[live].sum())
            self._add("operand2", (squares if whole is new else _squares(whole))[live].sum())

    def _compare(self, a: Accumulated, entry: Any, absent: Sequence[int]) -> None:
        live = [i for i in range(a.shape[0]) if i not in absent]
        for rows in _row_parts(a):
            lost = entry.subtract_from_(a.rows(rows).clone(), rows)
            self._add("lost2", _squares(lost)[live].sum())

    def _count(self, u: Tensor, g: Tensor, origin: tuple[int, int], rows: slice, cols: int) -> None:
        """Sort |u/g| of every k-th coordinate of the whole tensors into bins. What is 0 or not finite is left out."""
        start = (origin[0] + rows.start) * cols + origin[1]
        some = slice(-start % self._every, None, self._every)
        u, g = u.flatten(1)[:, some].abs(), g.flatten(1)[:, some].abs()
        place = ((u / g).log2() + _OCTAVES).mul_(_FINE)
        known = (u > 0) & (g > 0) & place.isfinite()
        bins = torch.where(known, place, 0.0).clamp_(0, _BINS - 1).long()
        bins = torch.where(known, bins, _BINS).flatten()
        self.bins += torch.bincount(bins, minlength=_BINS + 1)[:_BINS].to(self.bins.device)

    def _gradient(self, piece: Any) -> Tensor:
        mean = self._means.get(piece.param)
        return piece.grad if mean is None else mean if piece.rows is None else mean[piece.rows]

    def _parts(self, s: Any) -> Sequence[slice]:
        return list(chunks(s.shape[0], len(s.pieces) * s.shape[1] * s.layout.dtype.itemsize, chunk_bytes(s.device)))

    def _add(self, name: str, value: Tensor | float) -> None:
        total = self.sums[name]
        total += value.to(total.device) if isinstance(value, Tensor) else value

    # Figures ---------------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """Give the figures, by name (docs/diagnostics.md). Here the host waits for the device."""
        sums = {name: float(value) for name, value in self.sums.items()}
        if not sums["accepted"]:
            return {}
        g, u = math.sqrt(sums["g2"]), math.sqrt(sums["u2 all"])
        cosine = min(1.0, max(-1.0, _ratio(sums["ug"], g * u)))
        found = {"gradient_norm": g}
        for kind in self.kinds:
            found[f"update_norm_{kind}"] = math.sqrt(sums[f"u2 {kind}"])
            found[f"update_rms_{kind}"] = math.sqrt(_ratio(sums[f"u2 {kind}"], sums[f"n {kind}"]))
        found["relative_step"] = math.sqrt(_ratio(sums["moved2"], sums["p2"]))
        if g and u:
            found |= {"cosine_update_gradient": cosine, "angle_update_gradient": math.degrees(math.acos(cosine))}
            found["ratio_update_gradient"] = u / g
        found |= _quantiles(self.bins.tolist())
        found["zero_gradients"] = _ratio(sums["zero_g"], sums["n all"])
        found["zero_updates"] = _ratio(sums["zero_u"], sums["n all"])
        found["compression_error"] = math.sqrt(_ratio(sums["lost2"], sums["operand2"]))
        found["error_norm"] = math.sqrt(sums["error2"])
        found["error_mass"] = math.sqrt(_ratio(sums["error2"], sums["entering2"]))
        return found


def _kinds(groups: Sequence[Group], setup: Setup) -> tuple[str, ...]:
    mine = set(setup.params)
    return tuple(sorted({_kind(group, p) for group in groups for p in group["params"] if p in mine}))


def _kind(group: Group, p: Tensor) -> str:
    """Give the kind of a tensor, as `parameter_groups` names it. Without a kind in its group, the tensor's dimensions tell."""
    return str(group.get("kind") or ("vector" if p.ndim < 2 else "matrix"))


def _own(s: Any, e: Tensor) -> Tensor:
    """Give this process's columns of errors e, where every process holds the errors of whole vectors."""
    return e[..., s.columns] if e.shape[-1] != s.shape[1] else e


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1))


def _squares(x: Tensor) -> Tensor:
    """Sum the squares of each of n matrices, (n,) fp64."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square()


def _live(s: Any) -> list[int]:
    return [i for i in range(len(s.pieces)) if i not in s.turn.absent]


def _row_parts(a: Accumulated) -> list[slice]:
    n, rows, cols = a.shape
    return list(chunks(rows, n * cols * a.dtype.itemsize, chunk_bytes(a.device)))


def _stride(least: int, cols: Collection[int]) -> int:
    """Give the first number >= `least` without a common divisor with any number of columns, so that all columns take turns."""
    while least > 1 and any(math.gcd(least, number) > 1 for number in cols if number):
        least += 1
    return max(1, least)


def _quantiles(bins: Sequence[float]) -> dict[str, float]:
    """Give quantiles of |u/g|, to one percent: a bin spans a factor of 2^(1/64)."""
    total, seen, found = sum(bins), 0.0, dict[str, float]()
    for place, count in enumerate(bins):
        for q in _QUANTILES:
            if count and seen < (wanted := q / 100 * total) <= seen + count:
                found[f"scale_q{q}"] = 2 ** ((place + (wanted - seen) / count) / _FINE - _OCTAVES)
        seen += count
    return found


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
