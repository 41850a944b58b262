"""Stacks of n tensors of one shape: their state is one buffer with a leading dimension n, and a step handles them as a batch."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import kernels
from ..core.cells import Cell, Layout, Spec, Turn, cell, compute_dtype, matrix_shape
from ..core.linalg import chunks, room_bytes
from ..distributed.fsdp2 import is_sharded, local, local_gradient
from ..distributed.placement import Placement
from ..distributed.plan import Owners
from ..kernels.devices import kind
from .setup import decoupled_of, rate_of, shrink_of

# A number of a parameter group; on a GPU a rate may be a 0-D tensor.
Number = float | Tensor
# One number for all pieces of a stack, or a number for each piece.
Numbers = Number | list[Any]
# The same for numbers that are never on a device.
Floats = float | list[float]
_X = TypeVar("_X")

# The most bytes of a stack's parameters, by kind of device. On a GPU, a launch costs the same for one matrix and for many.
_STACK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Whether new buffers are left uninitialized.
_unfilled = contextvars.ContextVar("unfilled", default=False)


@dataclasses.dataclass(eq=False)
class Piece:
    """The part of a parameter whose state this process holds: all of it or, where state is divided, some rows.

    Attributes:
        param: the parameter.
        number: its position among all trainable parameters.
        rows: of dimension 0; None: all.
        group: index of its parameter group.
    """

    param: Tensor
    number: int
    rows: slice | None = None
    group: int = 0

    def __post_init__(self) -> None:
        rows, cols = matrix_shape(self.param)
        if self.rows is not None:
            length = self.rows.stop - self.rows.start
            rows, cols = (length, cols) if self.param.ndim > 1 else (1, length)
        self.shape = rows, cols
        start = 0 if self.rows is None else self.rows.start
        # Where the piece begins in the parameter's 2-D view.
        self.origin = (start, 0) if self.param.ndim > 1 else (0, start)
        self._sharded = is_sharded(self.param)
        self._cut = None if self._sharded else self.rows

    @property
    def data(self) -> Tensor:
        """The parameter's own memory, (rows, ...)."""
        p = local(self.param) if self._sharded else self.param.detach()
        return p if self._cut is None else p[self._cut]

    @property
    def grad(self) -> Tensor | None:
        """The gradient of `data`, dense; shares memory with `param.grad` unless that is sparse."""
        g = local_gradient(self.param) if self._sharded else self.param.grad
        if g is None:
            return None
        g = g.to_dense() if g.is_sparse else g
        return g if self._cut is None else g[self._cut]


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Let stacks that are made inside leave their buffers uninitialized, because the caller writes all of them."""
    token = _unfilled.set(True)
    try:
        yield
    finally:
        _unfilled.reset(token)


class Stack:
    """n pieces of one shape, dtype and device, with their state. Their parameter groups may have different numbers.

    Args:
        pieces: the n pieces.
        specs: of one parameter's state.
        total: sums a tensor over the processes that share the matrices; None: each piece is a whole matrix.

    Attributes:
        ids: (n,) int64, the parameters' numbers.
        layout: of one whole parameter.
        shape: (rows, cols) of each piece.
        specs: of one parameter's state, by name.
        buffers: state name -> (n, ...).
        turn: the present step, for the cells.
        groups: indices of the pieces' parameter groups, without repetition.
        begun: whether the host knows that all n tensors have had a gradient.
    """

    def __init__(self, pieces: list[Piece], specs: Iterable[Spec], total: Callable[[Tensor], Tensor] | None = None):
        first = pieces[0]
        self.pieces, self.total = pieces, total
        self.groups = tuple(dict.fromkeys(piece.group for piece in pieces))
        self.layout, self.shape = Layout.of(first.param), first.shape
        self.device = first.param.device
        self.ids = torch.tensor([piece.number for piece in pieces], device=self.device)
        self.specs = {spec.name: spec for spec in specs}
        self.buffers: dict[str, Tensor] = {}
        for spec in self.specs.values():
            shape = (len(pieces), *spec.part(first.param, first.rows))
            if _unfilled.get():
                self.buffers[spec.name] = torch.empty(shape, dtype=spec.dtype, device=self.device)
                continue
            buffer = torch.zeros(shape, dtype=spec.dtype, device=self.device)  # the system gives the memory when it is written to
            self.buffers[spec.name] = buffer.fill_(spec.start) if spec.start else buffer
        self.turn = Turn(self.ids, first.origin)
        self.begun = False

    def cell(self, name: str) -> Cell:
        """Make the cell of a state entry."""
        return cell(self.specs[name], self.buffers, self.layout.dtype, self.turn)

    def metric_cells(self) -> dict[str, Cell]:
        """Make the cells of the metric's state, by name without `metric_`."""
        return {n.removeprefix("metric_"): self.cell(n) for n in self.buffers if n.startswith("metric_")}

    @property
    def params(self) -> list[Tensor]:
        """The n parameters."""
        return [piece.param for piece in self.pieces]

    def each(self, number: Callable[[int], _X]) -> _X | list[_X]:
        """Ask for a number of each group, by the group's index. Give one number if all are equal, else one for each piece."""
        of_groups = {group: number(group) for group in self.groups}
        numbers = list(of_groups.values())
        if len(numbers) == 1 or all(isinstance(x, float) and x == numbers[0] for x in numbers):
            return numbers[0]
        return [of_groups[piece.group] for piece in self.pieces]

    def rates(self, groups: Sequence[Mapping[str, Any]], options: Any) -> tuple[Numbers, Numbers]:
        """Give lr and wd of p <- (1 - lr*wd) p - lr u.

        Where lr differs between pieces, the caller multiplies u by lr, and the second result is lr*wd in place of wd.
        """
        lr = self.each(lambda group: rate_of(groups[group]))
        decay = shrink_of if isinstance(lr, list) else decoupled_of
        return lr, self.each(lambda group: decay(groups[group], options))

    def open(self, step: Tensor) -> None:
        """Begin a step: note which tensors have a gradient, and the step's number, which counts the random numbers."""
        self.turn.step, self.turn.ok = step, True
        self.turn.absent = [i for i, piece in enumerate(self.pieces) if piece.param.grad is None]

    def gradients(self, l2: Floats = 0.0) -> list[Tensor]:
        """Give g + l2 * p, n matrices (rows, cols) in the compute dtype; zeros where a parameter has no gradient.

        They may share memory with `p.grad`, which is never written to.
        """
        shape, dtype = self.shape, self.layout.dtype
        if kind(self.device) != "cpu" and self.pieces[0].param.dtype != dtype and not (l2 or self.turn.absent):
            converted = torch.empty(len(self.pieces), *shape, dtype=dtype, device=self.device).unbind()
            torch._foreach_copy_(converted, [g.reshape(shape) for piece in self.pieces if (g := piece.grad) is not None])
            return kernels.Held(converted)
        gradients = kernels.Held()
        for i, piece in enumerate(self.pieces):
            g, by = piece.grad, l2[i] if isinstance(l2, list) else l2
            if g is None:
                gradients.append(torch.zeros(shape, dtype=dtype, device=self.device))
                continue
            dense = g if g.shape == shape and g.dtype == dtype else g.reshape(shape).to(dtype)
            if by:
                dense = dense.clone() if dense.data_ptr() == g.data_ptr() else dense
                matrix = piece.data.reshape(shape)
                for part in chunks(shape[0], 8 * shape[1], room_bytes(self.device)):
                    dense[part].add_(matrix[part].to(dtype), alpha=by)
            gradients.append(dense)
        return gradients


def treatments_of(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """Give for each group the values that decide how its tensors are compressed."""
    return [(group.get("compress"), group.get("kind")) for group in groups]


def key_of(groups: Sequence[Mapping[str, Any]], trained: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Any]:
    """Give the key of the parameters that a setup is made for."""
    treatments = treatments_of(groups)
    return [(i, treatments[i], id(p), p.shape, p.dtype, p.device) for i, params in trained for p in params]


def batches_of(
    groups: Iterable[tuple[int, Sequence[Tensor]]],
    treatments: Sequence[Hashable],
    numbers: Mapping[Tensor, int],
    owners: Mapping[Tensor, Owners],
    placement: Placement,
) -> Iterator[tuple[list[Piece], Callable[[Tensor], Tensor] | None]]:
    """Group the pieces that this process holds into batches of one shape, dtype, device, treatment and place.

    Args:
        groups: index of each parameter group, and its parameters.
        treatments: for each parameter group, the values that decide how its tensors are compressed.
        numbers: position of each parameter among all.
        owners: who holds which rows.
        placement: of this process.

    Yields:
        The pieces, and a function that sums over the processes that share their matrices (None: matrices are whole).
    """
    alike: dict[tuple, list[Piece]] = {}
    for index, params in groups:
        for p in params:
            if placement.rank not in owners[p]:
                continue
            piece = Piece(p, numbers[p], owners[p][placement.rank], index)
            # Divided tensors share a batch only if every process makes the same batches: processes communicate in each batch.
            number = None if placement.follows else piece.number
            place = piece.rows and (piece.rows.start, piece.rows.stop, number)
            key = treatments[index], matrix_shape(p), p.ndim < 2, p.dtype, p.device, place
            alike.setdefault(key, []).append(piece)
    for (*_, place), members in alike.items():
        for batch in batches(members, placement.size if place else 1):
            yield batch, placement.sum if place else None


def times(x: Tensor, numbers: list[Any]) -> Tensor:
    """Multiply each of n tensors, (n, ...), by its number. The numbers go to a GPU with the launch."""
    return torch.stack(torch._foreach_mul(x.unbind(), numbers))


def batches(members: list[Piece], processes: int = 1) -> Iterator[list[Piece]]:
    """Cut pieces of one shape, each 1/`processes` of its parameter, into lists that are not too large for a stack."""
    first = members[0].param
    limit = processes * _STACK_BYTES.get(kind(first.device), _STACK_BYTES["cuda"])
    size = max(1, limit // max(1, first.numel() * compute_dtype(first).itemsize))
    for start in range(0, len(members), size):
        yield members[start : start + size]
