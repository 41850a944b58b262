"""State, declared once: a `Spec` says what an entry of a parameter's state is, a `Cell` reads and writes it for n parameters.

Everything else follows from the specs: allocation, `state_dict`, checks at load, shards, DTensors, bytes. The format of an
entry (plain, bf16 rounded stochastically, 8 or 4 bits with scales), the mask of a refused step and tensors without a gradient
are the cell's business.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from .codecs import BlockQuantizer, MinMaxQuantizer
from .deferred import masked
from .linalg import row_chunks
from .random import counted_uniform, stochastic_round
from .values import BOUNDS, Values, code_scales, int4

ALL = slice(None)
# Where a parameter is a flat piece of several: the place of each one's part in it, without padding.
Parts = tuple[slice, ...]
# State name -> tensor (n, ...): the state of n parameters of one shape.
Buffers = Mapping[str, Tensor]


def compute_dtype(p: Tensor) -> torch.dtype:
    """Give the dtype of state and arithmetic for a parameter: fp64 for fp64, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """Give (rows, cols) of the 2-D view: (shape[0], the rest); (1, numel) for 0-D and 1-D tensors."""
    return (1, p.numel()) if p.ndim < 2 else (p.shape[0], math.prod(p.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A whole parameter as a matrix, by which the format of its state is chosen.

    Attributes:
        rows, cols: of the 2-D view.
        dtype: of the arithmetic, and of state unless options say otherwise.
        vector: whether the parameter has fewer than two dimensions, so that the one row itself is divided among processes.
        parts: where the parameter is a flat piece of several (ZeRO-1 and 2); None: it is not.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    vector: bool = False
    parts: Parts | None = None

    @classmethod
    def of(cls, p: Tensor) -> Layout:
        """Give the layout of a parameter."""
        return cls(*matrix_shape(p), compute_dtype(p), p.ndim < 2)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.rows * self.cols


@dataclasses.dataclass(frozen=True)
class Spec:
    """An entry of a parameter's state, as one process has it.

    Attributes:
        name: in `optimizer.state[p]`.
        shape: of the entry, for the whole parameter.
        dtype: of the stored numbers.
        rows: the dimension that goes with the rows of the parameter's 2-D view; None: the entry does not follow the rows.
        per: how many rows one index of that dimension covers, such as 128 for an entry of each block of 128 rows.
        window: whether the entry means nothing without the window's entries (`save_window=False` leaves it out).
        slot: the dimension that counts the window's slots, where there is one.
        held: who holds the entry where processes share the state: its "owner" (or the owners of its rows), "everywhere" (equal
            copies), or "each" process its own.
        start: the number that a fresh entry is filled with.
        cols: numbers in a row, where the entry is codes and one code is not one element.
        values: the numbers that are allowed in it; None: all numbers of its dtype, see `values_of`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None = None
    per: int = 1
    window: bool = False
    slot: int | None = None
    held: Literal["owner", "everywhere", "each"] = "owner"
    start: float = 0.0
    cols: int | None = None
    values: Values | None = dataclasses.field(default=None, compare=False)

    @functools.cached_property
    def kind(self) -> str:
        """The kind that memory_footprint() counts the entry under."""
        family = next((f for f in ("window", "metric") if self.name.startswith(f"{f}_")), None)
        return family or self.name.removesuffix("_scale")

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes for the whole parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def slots(self) -> int:
        """The number of the window's slots, of which a step writes one; 1 for an entry that it writes whole."""
        return 1 if self.slot is None else self.shape[self.slot]

    def divided(self, p: Tensor) -> int | None:
        """Give the dimension that goes with dimension 0 of p, by which p is divided; None: the entry is not divided.

        A vector is one row, so that its entries are divided, which lie in the dimension behind the rows.
        """
        if self.rows is None or self.held != "owner":
            return None
        dim = self.rows if p.ndim > 1 else self.rows + 1
        return dim if dim < len(self.shape) else None

    def cuttable(self, p: Tensor) -> bool:
        """Tell whether the entry can be cut between any two numbers of dimension 0 of p."""
        dim = self.divided(p)
        return dim is None or (self.per == 1 and p.ndim > 0 and self.shape[dim] == len(p))

    def part(self, p: Tensor, rows: slice | None) -> tuple[int, ...]:
        """Give the shape for `rows` of dimension 0 of p; None: for all of p."""
        dim = self.divided(p)
        if rows is None or dim is None:
            return self.shape
        return (*self.shape[:dim], -(-(rows.stop - rows.start) // self.per), *self.shape[dim + 1 :])


@dataclasses.dataclass(eq=False)
class Turn:
    """The present step, as the cells of n tensors have to know it.

    Attributes:
        ids: (n,) int64, the tensors' numbers: rounding is counted by them.
        origin: where the tensors are parts of larger ones, the row and the column at which they begin there.
        step: 0-D int64, the number of the step: rounding is counted by it too.
        ok: whether the step is accepted; a 0-D flag where that is known on the device only.
        absent: positions of the tensors that have no gradient: their state stays as it is.
    """

    ids: Tensor
    origin: tuple[int, int] = (0, 0)
    step: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    ok: bool | Tensor = True
    absent: Sequence[int] = ()


class Cell:
    """An entry of the state of n tensors in a float dtype; to bf16, matrices (n, rows, cols) are rounded stochastically.

    Args:
        buffer: (n, ...).
        turn: of the stack; the stack opens it for each step.
        dtype: of the numbers that are read.
        follows: whether the entry follows the parameter's rows; one that does not is the same on every process that holds it, and
            is rounded by the same numbers there.

    Attributes:
        stored: the buffers, for kernels.
        cols: numbers in a row.
    """

    cols: int

    def __init__(self, buffer: Tensor, turn: Turn, dtype: torch.dtype, follows: bool = True):
        self.buffer, self.turn, self.dtype = buffer, turn, dtype
        self.origin = turn.origin if follows else (0, 0)
        self.stored: tuple[Tensor, Tensor | None] = buffer, None
        self.cols = buffer.shape[-1] if buffer.ndim > 1 else 1

    def read(self, rows: slice = ALL) -> Tensor:
        """Give all numbers, or some rows of them, (n, rows, ...) in `dtype`. The result may share memory with the state."""
        return part(self.buffer, rows).to(self.dtype)

    def write(self, x: Tensor, rows: slice = ALL) -> None:
        """Store x (n, rows, ...), where the step is accepted and a tensor has a gradient."""
        self._store(((part(self.buffer, rows), self._rounded(x, rows)),))

    def put(self, x: Tensor, slots: Tensor) -> None:
        """Store x (n, rows, k) in slot slots[i], (n,) int64, of tensor i's ring (n, rows, m, k), where `write` would store."""
        place = torch.arange(len(x), device=x.device), ALL, slots
        entries = self.buffer[place]
        self._store(((entries, x.to(entries.dtype)),))
        self.buffer[place] = entries

    def _rounded(self, x: Tensor, rows: slice) -> Tensor:
        if self.buffer.dtype != torch.bfloat16 or x.ndim != 3:
            return x.to(self.buffer.dtype)
        return stochastic_round(x, self.buffer.dtype, self.turn.step, self.turn.ids, self._origin(rows))

    def _store(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        ok = self.turn.ok
        for old, new in pairs:
            if self.turn.absent:
                new = new.clone()
                for i in self.turn.absent:
                    new[i] = old[i]
            old.copy_(new if ok is True else masked(ok, new, old))

    def _origin(self, rows: slice) -> tuple[int, int]:
        """Give the row and the column at which these rows begin in the whole tensors."""
        return self.origin[0] + (rows.start or 0), self.origin[1]

    def squares(self) -> Tensor:
        """Sum the squares of each tensor, (n,) fp64, some rows at a time."""
        fast = kernels.square(self.stored, self.cols, self.dtype)
        if fast is not None:
            return fast
        total = torch.zeros(len(self.buffer), dtype=torch.float64, device=self.buffer.device)
        for rows in row_chunks(self.buffer):
            total += torch.linalg.vector_norm(self.read(rows).flatten(1), dim=1, dtype=torch.float64).square()
        return total

    def add_to(self, matrices: Sequence[Tensor], weights: Tensor, scale: kernels.Scale) -> None:
        """Compute p <- p + weight * diag(x) numbers diag(y) in place.

        Args:
            matrices: p, n matrices (rows, cols) in `dtype`.
            weights: (n,) in `dtype`.
            scale: x (n, rows) and y (n, cols) in `dtype`; None: ones.
        """
        if kernels.add_kept(matrices, self.stored, weights, scale):
            return
        for rows in row_chunks(matrices):
            u = self.read(rows) * weights[:, None, None]
            if scale is not None:
                u.mul_(scale[0][:, rows, None]).mul_(scale[1][:, None])
            for p, x in zip(matrices, u, strict=True):
                p[rows] += x

    def square(self) -> float:
        """Sum the squares in fp64."""
        return float(self.squares().sum())


class QuantizedCell(Cell):
    """Matrices in 8 or 4 bits: with a scale for each run of a row (`BlockQuantizer`), rounded stochastically, or with two bounds.

    Args:
        buffer: codes, int8 (n, rows, cols) or packed uint8 (n, rows, cols/2).
        scale: (n, rows, runs) in `dtype`; or the bounds (n, rows, runs, 2) of `MinMaxQuantizer`, bf16.
        cols: length of a row.
        turn, dtype, follows: as in Cell.
    """

    def __init__(self, buffer: Tensor, scale: Tensor, cols: int, turn: Turn, dtype: torch.dtype, follows: bool = True):
        super().__init__(buffer, turn, dtype, follows)
        self.quantizer: BlockQuantizer | MinMaxQuantizer = BlockQuantizer(8 if buffer.dtype == torch.int8 else 4)
        if scale.ndim == 4:
            self.quantizer = MinMaxQuantizer(dtype)
        self.scale, self.cols = scale, cols
        self.stored = buffer, scale

    def read(self, rows: slice = ALL) -> Tensor:
        """See Cell."""
        return self.quantizer.decode(self.buffer[:, rows], self.scale[:, rows], self.cols)

    def write(self, x: Tensor, rows: slice = ALL) -> None:
        """See Cell."""
        noise = None
        if self.quantizer.stochastic:
            noise = counted_uniform(self.turn.step, self.turn.ids, x.shape[1], x.shape[2], self._origin(rows))
        codes, scale = self.quantizer.encode(x, noise)
        self._store(((self.buffer[:, rows], codes), (self.scale[:, rows], scale)))


def part(buffer: Tensor, rows: slice) -> Tensor:
    """Give rows `rows` of n matrices (n, rows, ...); all of a buffer of any shape for ALL."""
    return buffer if rows == ALL else buffer[:, rows]


def matrix_specs(
    name: str, layout: Layout, dtype: torch.dtype | None, format: str = "plain", values: Values | None = None
) -> tuple[Spec, ...]:
    """Declare a matrix of state like the parameter.

    Args:
        name: of the entry; scales get the name with `_scale`.
        layout: of the parameter.
        dtype: of a plain entry; None: the layout's.
        format: "plain", "int8", "int4" or "minmax4".
        values: that are allowed in a plain entry, see Spec.
    """
    shape = (layout.rows, layout.cols)
    if format == "plain":
        return (Spec(name, shape, dtype or layout.dtype, rows=0, values=values),)
    if format == "minmax4":
        codes, runs = MinMaxQuantizer(layout.dtype).shapes(*shape)
        bounds = Spec(f"{name}_scale", runs, torch.bfloat16, rows=0, values=BOUNDS)
        return Spec(name, codes, torch.uint8, rows=0, cols=layout.cols), bounds
    bits = int(format.removeprefix("int"))
    codes, runs = BlockQuantizer(bits).shapes(*shape)
    scale = Spec(f"{name}_scale", runs, layout.dtype, rows=0, values=code_scales(bits))
    if bits == 8:
        return Spec(name, codes, torch.int8, rows=0, cols=layout.cols), scale
    return Spec(name, codes, torch.uint8, rows=0, cols=layout.cols, values=int4(name, layout.cols)), scale


def cell(spec: Spec, buffers: Buffers, dtype: torch.dtype, turn: Turn) -> Cell:
    """Make the cell of an entry from the stack's buffers, whose numbers are read in `dtype`."""
    buffer, follows = buffers[spec.name], spec.rows is not None
    if spec.cols is None:
        return Cell(buffer, turn, dtype, follows)
    return QuantizedCell(buffer, buffers[f"{spec.name}_scale"], spec.cols, turn, dtype, follows)
