"""Takes a step of many small matrices of different shapes as one stack: on a CPU, a step for each shape is mostly overhead.

State stays in the stacks of one shape. Each step decides anew which stacks take part. A stack goes its usual way if a gradient is
missing, or if a column of a warm start is dead. Results differ from the usual way by rounding. So models with few shapes or large
matrices always go the usual way.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Cell, Turn
from ..core.compressors import DEAD
from ..core.metric import Factored
from ..kernels.devices import is_plain, kind
from .formats import LowRankFormat, SparseFormat
from .method import Group
from .setup import Setup, decoupled_of, rate_of

# The fewest stacks that are worth it.
_MANY = 64
# The most numbers of a matrix, and the most products in its G^T c. For larger matrices, libraries are faster: they can divide
# one among threads.
_LARGEST, _MOST_PRODUCTS = 2**14, 2**21

_log = logging.getLogger("hf_efcp")
_failed = False


class Together:
    """Stacks of small matrices, as one stack in a step of `Windowed`.

    Args:
        stacks: window stacks of one kind of format, with the same dtypes.
        many: the module of compiled functions.

    Attributes:
        ids, turn, pieces, device: as in Stack, of the matrices that take part in this step.
        metric, residual: this object, which has the sums of the metric and of the residuals; None: there is none.
    """

    divided = False
    device = torch.device("cpu")

    def __init__(self, stacks: Sequence[Any], many: Any):
        first, self.stacks = stacks[0], stacks
        o, cell, sparse = first.format.options, first.error or first.residual, isinstance(first.format, SparseFormat)
        window = first.window.buffers["window_values" if sparse else "window_p"]
        rows, room = [], [0, 0, 0]
        self._stack_of: list[int] = []
        for number, s in enumerate(stacks):
            for i, piece in enumerate(s.pieces):
                rows.append([*_row(s, i, piece.number, sparse), *room, *(s.format.grid.blocks if sparse else (0, 0, 0))])
                (height, cols), kept = s.shape, rows[-1][2]
                entry = height * kept if sparse else kept * (height + 2 * cols)
                room = [room[0] + 2 * height + cols + entry, room[1] + cols, room[2] + height * kept]
                self._stack_of.append(number)
        self._all = torch.tensor(rows, dtype=torch.int64)
        self._pieces = [piece for s in stacks for piece in s.pieces]
        self._many = many.Many(
            sparse=sparse,
            dtype=first.layout.dtype,
            error_dtype=cell.buffer.dtype,
            window_dtype=window.dtype,
            m=o.window_size,
            metric=(o.metric_beta, o.metric_eps) if first.metric is not None else None,
            far=first.residual is not None,
            decay=1.0 if first.residual is None else o.averaging,
            least=DEAD * torch.finfo(first.layout.dtype).eps,
            room=tuple(room),
            numbers=room[0] // len(rows) * o.window_size,
        )
        self.metric = None if first.metric is None else self
        self.residual = None if first.residual is None else self

    def compile(self) -> None:
        """Compile the functions that a step calls."""
        self._many.compile()

    def open(self) -> set[int]:
        """Begin a step; give the numbers of the stacks that do not take part."""
        addresses, out, self._held = [], set[int](), []
        for number, piece in zip(self._stack_of, self._pieces, strict=True):
            p = piece.param
            g = p.grad
            if g is None or g.layout != torch.strided or g.dtype != p.dtype or not (g.is_contiguous() and is_plain(p)):
                out.add(number)
                addresses.append((0, 0))
                continue
            g = g.resolve_neg()
            self._held.append(g)
            addresses.append((g.data_ptr(), p.data_ptr()))
        table = self._all.clone()
        table[:, 3:5] = torch.tensor(addresses, dtype=torch.int64)
        for i in self._many.dead(table).nonzero().flatten().tolist():
            out.add(self._stack_of[i])
        live = [i for i, number in enumerate(self._stack_of) if number not in out]
        self._table, self.pieces = table[live], [self._pieces[i] for i in live]
        self.ids = self._table[:, 12]
        self.turn = Turn(self.ids)
        return out

    def stage(self, step: Tensor, l2: Any) -> None:
        """See WindowStack."""
        self.turn.step = step

    def each(self, number: Any) -> float:
        """Give the weight decay that enters gradients, which is 0 here."""
        return 0.0

    def dots(self, j: Tensor) -> Tensor:
        """See WindowStack. The entries are staged here."""
        dots, self._squares, self._means = self._many.stage(self._table, int(j))
        return dots

    def live_squares(self) -> Tensor:
        """See Metric."""
        return self._squares

    @property
    def entered(self) -> list[Tensor]:
        """See Metric."""
        return [self._means]

    def squares(self) -> Tensor:
        """See Cell: the squares of the residuals."""
        return self._many.squares(self._table)

    def commit(self, j: Tensor, l2: Any, ok: bool | Tensor) -> None:
        """See WindowStack."""
        self._many.commit(self._table, int(j), int(self.turn.step))

    def apply(self, c: Tensor, outside: Tensor, groups: Sequence[Group], options: Any) -> None:
        """See WindowStack."""
        dtype = self._many.dtype
        numbers = [(float(rate_of(group)), decoupled_of(group, options)) for group in groups]
        lr, decay = torch.tensor([numbers[piece.group] for piece in self.pieces], dtype=torch.float64).unbind(1)
        c, weights = (c * -lr[:, None]).to(dtype), (outside * -lr).to(dtype)
        self._many.apply(self._table, c, (1 - lr * decay).to(dtype), weights)
        torch.autograd.graph.increment_version([piece.param for piece in self.pieces])
        self._held.clear()


def _row(s: Any, i: int, number: int, sparse: bool) -> Iterator[int]:
    """Give a table's columns for matrix i of a stack, without places in rooms and blocks; see kernels/cpu_many.py."""
    cell, window = s.error or s.residual, s.window.buffers
    parts = ("window_indices", "window_values") if sparse else ("window_p", "window_q")
    yield from (*s.shape, s.format.grid.per_row if sparse else s.format.rank, 0, 0, cell.buffer[i].data_ptr())
    yield 0 if sparse else s.buffers["warm_start"][i].data_ptr()
    yield from (window[part][i].data_ptr() for part in parts)
    yield from (s.buffers[f"metric_{n}"][i].data_ptr() if s.metric is not None else 0 for n in ("rows", "cols", "count"))
    yield number


def made(setup: Setup) -> list[Together]:
    """Find the stacks that can take a step together: those with plain formats, on a CPU, in one process."""
    alike: dict[tuple, list[Any]] = {}
    if not setup.placement.alone:
        return []
    for s in setup.stacks:
        if _fits(s):
            cell, window = s.error or s.residual, list(s.window.buffers.values())[-1]
            alike.setdefault((type(s.format), s.layout.dtype, cell.buffer.dtype, window.dtype), []).append(s)
    return _compiled([stacks for stacks in alike.values() if len(stacks) >= _MANY])


def _fits(s: Any) -> bool:
    o, (rows, cols) = s.format.options, s.shape
    if type(s.format) not in (LowRankFormat, SparseFormat) or s.format.low_bit or kind(s.device) != "cpu":
        return False
    cell, sparse = s.error or s.residual, type(s.format) is SparseFormat
    plain = type(cell) is Cell and s.total is None and (s.metric is None or type(s.metric) is Factored)
    plain = plain and all(piece.rows is None and piece.param.dtype == s.layout.dtype for piece in s.pieces)
    usual = o.momentum == 0 and o.weight_decay_mode == "decoupled" and (sparse or o.power_iterations == 1)
    products = rows * cols * o.window_size * (1 if sparse else s.format.rank)
    return plain and usual and 0 < rows * cols <= _LARGEST and products <= _MOST_PRODUCTS


def _compiled(alike: list[list[Any]]) -> list[Together]:
    """Make and compile the batches of stacks; none if the compiler fails."""
    global _failed
    if not alike or _failed or os.environ.get("HF_EFCP_KERNELS", "1") == "0":
        return []
    try:
        many = importlib.import_module("..kernels.many", __package__)
        together = [Together(stacks, many) for stacks in alike]
        for one in together:
            one.compile()
        return together
    except Exception as error:  # the compiler's own errors are of many types
        _failed = True
        _log.info("stacks are not taken together: %s: %s", error.__class__.__name__, error)
        return []


def stacks_of(setup: Setup) -> list[Any]:
    """Give the stacks of this step: those that take it together as one each, and the others."""
    if len(setup.stacks) < _MANY:
        return list(setup.stacks)
    if setup.together is None:
        setup.together = made(setup)
    taken: set[int] = set()
    together = []
    for one in setup.together:
        out = one.open()
        taken |= {id(s) for number, s in enumerate(one.stacks) if number not in out}
        if one.pieces:
            together.append(one)
    return [*together, *(s for s in setup.stacks if id(s) not in taken)]
