"""State, declared once: a `Spec` describes an entry of a parameter's state; a `Cell` reads and writes the entry for n parameters.

Everything else follows from the specs: allocation, `state_dict`, checks at load, shards, DTensors, bytes. A cell takes care of
the format (plain, bf16 rounded stochastically, 8 or 4 bits with scales), of refused steps, and of tensors without a gradient.
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
# Where a parameter is a flat piece of several parameters: the place of each one's part in the piece, without padding.
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
    """A whole parameter as a matrix, which decides the format of its state.

    Attributes:
        rows, cols: of the 2-D view.
        dtype: of the arithmetic, and of state unless options say otherwise.
        vector: whether the parameter has fewer than two dimensions. Processes then divide its one row.
        parts: the parts of a flat piece of several parameters (ZeRO-1 and 2); None: the parameter is no flat piece.
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
        per: how many rows one index of that dimension covers. Example: 128, if there is an index for each block of 128 rows.
        window: whether the entry means nothing without the window's entries (`save_window=False` leaves it out).
        slot: the dimension that counts the window's slots; None: there is no such dimension.
        held: who holds the entry where processes share the state. "owner": its owner, or the owners of its rows. "everywhere":
            all, as equal copies. "each": every process has its own.
        start: the number that a fresh entry is filled with.
        cols: numbers in a row, where the entry is codes; None: the entry is plain.
        values: the numbers that are allowed in the entry; None: see `values_of`.
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
        """The kind under which memory_footprint() counts the entry."""
        family = next((f for f in ("window", "metric") if self.name.startswith(f"{f}_")), None)
        return family or self.name.removesuffix("_scale")

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes for the whole parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def slots(self) -> int:
        """The number of the window's slots, of which a step writes one; 1 for an entry that a step writes whole."""
        return 1 if self.slot is None else self.shape[self.slot]

    def divided(self, p: Tensor) -> int | None:
        """Give the dimension that goes with dimension 0 of p, by which p is divided; None: the entry is not divided.

        A vector is one row. Processes divide the numbers in this row, whose dimension comes after that of the rows.
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
    """The facts on the present step that the cells of n tensors need.

    Attributes:
        ids: (n,) int64, the tensors' numbers, which count the random numbers of rounding.
        origin: the row and the column at which the tensors begin, where they are parts of larger ones.
        step: 0-D int64, the number of the step, which counts the random numbers of rounding too.
        ok: whether the step is accepted; a 0-D flag where only the device knows it.
        absent: positions of the tensors without a gradient. Their state stays as it is.
    """

    ids: Tensor
    origin: tuple[int, int] = (0, 0)
    step: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    ok: bool | Tensor = True
    absent: Sequence[int] = ()


class Cell:
    """An entry of the state of n tensors in a float dtype. Matrices (n, rows, cols) in bf16 are rounded stochastically.

    Args:
        buffer: (n, ...).
        turn: of the stack, which opens it for each step.
        dtype: of the numbers that are read.
        follows: whether the entry follows the parameter's rows. An entry that does not follow them is the same on every process
            that holds it, and is rounded by the same random numbers there.

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
        """Store x (n, rows, ...) if the step is accepted, for the tensors that have a gradient."""
        self._store(((part(self.buffer, rows), self._rounded(x, rows)),))

    def put(self, x: Tensor, slots: Tensor) -> None:
        """Store x (n, rows, k) in rings (n, rows, m, k), for tensor i in slot slots[i], (n,) int64, where `write` would store."""
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
        """Sum the squares of each tensor's numbers, (n,) fp64."""
        fast = kernels.square(self.stored, self.cols, self.dtype)
        if fast is not None:
            return fast
        total = torch.zeros(len(self.buffer), dtype=torch.float64, device=self.buffer.device)
        for rows in row_chunks(self.buffer):
            total += torch.linalg.vector_norm(self.read(rows).flatten(1), dim=1, dtype=torch.float64).square()
        return total

    def add_to(self, matrices: Sequence[Tensor], weights: Tensor, scale: kernels.Scale) -> None:
        """Compute p <- p + weight * diag(x) e diag(y) in place, where e are the numbers of the cell.

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
        """Sum the squares of all numbers in fp64."""
        return float(self.squares().sum())


class QuantizedCell(Cell):
    """Matrices in 8 or 4 bits.

    Each run of a row has a scale and is rounded stochastically (`BlockQuantizer`), or has two bounds (`MinMaxQuantizer`).

    Args:
        buffer: codes, int8 (n, rows, cols) or packed uint8 (n, rows, cols/2).
        scale: (n, rows, runs) in `dtype`; or the bounds (n, rows, runs, 2) of `MinMaxQuantizer`, bf16.
        cols: length of a row.
        turn, dtype, follows: see Cell.
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
    """Give rows `rows` of n matrices (n, rows, ...); for ALL, the whole buffer, of any shape."""
    return buffer if rows == ALL else buffer[:, rows]


def matrix_specs(
    name: str, layout: Layout, dtype: torch.dtype | None, format: str = "plain", values: Values | None = None
) -> tuple[Spec, ...]:
    """Declare an entry of state that is a matrix like the parameter.

    Args:
        name: of the entry. The entry of its scales has the name with `_scale`.
        layout: of the parameter.
        dtype: of a plain entry; None: the layout's.
        format: "plain", "int8", "int4" or "minmax4".
        values: the numbers that are allowed in a plain entry, see Spec.
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
    """Make the cell of an entry from the stack's buffers. Its numbers are read in `dtype`."""
    buffer, follows = buffers[spec.name], spec.rows is not None
    if spec.cols is None:
        return Cell(buffer, turn, dtype, follows)
    return QuantizedCell(buffer, buffers[f"{spec.name}_scale"], spec.cols, turn, dtype, follows)
