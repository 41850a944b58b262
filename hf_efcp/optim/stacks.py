"""Tensors of one shape, stacked: their state is one buffer with a leading dimension n, and a step handles them as one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..core.compressors import Identity
from ..core.error_feedback import ErrorFeedback, QuantizedErrorFeedback
from ..core.linalg import CHUNK_BYTES, add_scaled_, chunk_bytes, chunks
from ..core.low_bit_windows import LowBitDenseWindow
from ..core.random import stochastic_round
from ..core.windows import DenseWindow, Window
from ..distributed.fsdp2 import is_sharded, local, local_gradient

# Parameters are rounded by other numbers than their error feedback.
_PARAMETER_SALT = 2**30


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype of state and arithmetic for a parameter: fp64 for fp64, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """(rows, cols) of the 2-D view: (shape[0], the rest); (1, numel) for 0-D and 1-D tensors."""
    return (1, p.numel()) if p.ndim < 2 else (p.shape[0], math.prod(p.shape[1:]))


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The part of a parameter whose state this process holds: all of it or, where state is sharded, some rows.

    Attributes:
        param: the parameter.
        number: its position among all trainable parameters.
        rows: rows of dimension 0; None: all.
    """

    param: Tensor
    number: int
    rows: slice | None = None

    @property
    def data(self) -> Tensor:
        """The parameter's own memory, (rows, ...)."""
        p = local(self.param)
        return p if self.rows is None or is_sharded(self.param) else p[self.rows]

    @property
    def grad(self) -> Tensor | None:
        """The gradient of `data`, dense; shares memory with `param.grad` unless that is sparse."""
        g = local_gradient(self.param)
        if g is None:
            return None
        g = g.to_dense() if g.is_sparse else g
        return g if self.rows is None or is_sharded(self.param) else g[self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the piece."""
        rows, cols = matrix_shape(self.param)
        if self.rows is None:
            return rows, cols
        length = self.rows.stop - self.rows.start
        return (length, cols) if self.param.ndim > 1 else (1, length)

    @property
    def first(self) -> tuple[int, int]:
        """Where the piece begins in the parameter's 2-D view."""
        start = 0 if self.rows is None else self.rows.start
        return (start, 0) if self.param.ndim > 1 else (0, start)


@dataclasses.dataclass(eq=False)
class Stack:
    """n pieces of one shape, dtype, device and parameter group, with everything that a step does to them.

    Attributes:
        pieces: the n pieces.
        numbers: (n,) int64, which parameters they belong to.
        group: index of their parameter group.
        compressor, feedback, window: the row's way from gradient to update.
        momentum: v, (n, rows, cols), or None.
    """

    pieces: list[Piece]
    numbers: Tensor
    group: int
    compressor: object
    feedback: ErrorFeedback
    window: Window
    momentum: Tensor | None = None

    @property
    def params(self) -> list[Tensor]:
        """The n parameters."""
        return [piece.param for piece in self.pieces]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.numbers.device

    def stage(self, step: Tensor, l2: float = 0.0) -> None:
        """a = e + g, and c = C(a) as the window stores it; the state stays as it is.

        A parameter without a gradient gives a zero row, and its error stays.
        """
        if hasattr(self.compressor, "ready"):  # made during backward
            self.window.stage(self.compressor.ready())
            return
        parts = self.compressor.compress(self.gradients(l2), step, self.feedback)
        for i, piece in enumerate(self.pieces):
            if piece.grad is None:
                parts[-1][i] = 0  # the values, or a factor
        self.window.stage(parts)

    def dots(self, j: Tensor) -> Tensor:
        """(n, m) fp64: the staged row's inner products with the window. A plain row is not held, as it is the gradient."""
        dots = self.window.dots(j.to(self.device))
        if isinstance(self.compressor, Identity):
            self.window.release()
        return dots

    def commit(self, j: Tensor, step: Tensor, l2: float, accepted: bool | Tensor) -> None:
        """e <- a - c, and c enters slot j, where `accepted`."""
        if isinstance(self.compressor, Identity):
            self.stage(step, l2)
        if self.feedback.error is not None:
            absent = [i for i, piece in enumerate(self.pieces) if piece.grad is None]
            self.feedback.keep(self.gradients(l2), self.window, step, accepted, absent)
        self.window.commit(j.to(self.device), accepted)
        self.compressor.commit(accepted)

    def gradients(self, l2: float = 0.0) -> list[Tensor]:
        """g + l2 * p, n matrices (rows, cols) in the compute dtype; zeros where a parameter has no gradient.

        May share memory with `p.grad`, which is never written to.
        """
        shape, dtype, found = self.pieces[0].shape, compute_dtype(self.pieces[0].param), []
        for piece in self.pieces:
            g = piece.grad
            if g is None:
                found.append(torch.zeros(shape, dtype=dtype, device=self.device))
                continue
            dense = g.reshape(shape).to(dtype)
            if l2:
                dense = dense.clone() if dense.data_ptr() == g.data_ptr() else dense
                matrix = piece.data.reshape(shape)
                for part in chunks(shape[0], 8 * shape[1]):
                    dense[part].add_(matrix[part].to(dtype), alpha=l2)
            found.append(dense)
        return found

    def buffers(self) -> dict[str, Tensor]:
        """State name -> buffer (n, ...)."""
        found = {
            **self.feedback.state(),
            "warm_start": getattr(self.compressor, "q", None),
            **self.window.state,
            "momentum": self.momentum,
        }
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def update(
        self,
        c: Tensor,
        lr: float,
        weight_decay: float,
        momentum: float,
        accepted: bool | Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        """u = G^T c for coefficients c (n, m);  v <- mu v + (1 - mu) u;  p <- (1 - lr*wd) p - lr v.

        A large tensor's u is never whole. Of a step that is not `accepted`, u is zero; with lr and 1 - mu zero too, nothing
        moves. Low-precision parameters are rounded once: with `rounding`, the number of the step, bf16 ones stochastically; else
        to nearest.
        """
        if self._apply_at_once(c, lr, weight_decay, accepted):
            return
        new_part = 1 - momentum
        if accepted is not True:
            flag = accepted.to(self.device, self.window.compute_dtype)
            lr, new_part = lr * flag, new_part * flag
        rows, cols = self.pieces[0].shape
        bytes_each = len(self.pieces) * cols * self.window.compute_dtype.itemsize
        for part in chunks(rows, bytes_each, chunk_bytes(self.device)):
            u = self.window.combine(c, part)
            if self.momentum is not None:
                u = self.momentum[:, part].lerp_(u, new_part)
            for i, piece in enumerate(self.pieces):
                if not piece.param.requires_grad:  # frozen since; its rows stay in the window, which K counts
                    continue
                p = piece.data
                p = p[part] if p.ndim > 1 else p
                if rounding is not None and p.dtype == torch.bfloat16:
                    salt, (row, col) = self.numbers[i : i + 1] + _PARAMETER_SALT, piece.first
                    _apply_rounded(p, u[i], lr, weight_decay, rounding, salt, (row + part.start, col))
                else:
                    _apply(p, u[i].view(p.shape), lr, weight_decay)

    def _apply_at_once(self, c: Tensor, lr: float, weight_decay: float, accepted: bool | Tensor) -> bool:
        """The plain case of `update`, without forming u; whether the window can."""
        pieces, dtype = self.pieces, self.window.compute_dtype
        unmasked = accepted is True or not weight_decay  # of a step that is not accepted c is zero
        plain = unmasked and self.momentum is None and all(piece.param.requires_grad for piece in pieces)
        params = [piece.data for piece in pieces] if plain else []
        if not plain or any(p.dtype != dtype for p in params):
            return False
        matrices = [p.reshape(pieces[0].shape).contiguous() for p in params]  # copies where the layout is another
        if not self.window.apply(c, matrices, -lr, 1 - lr * weight_decay):
            return False
        for p, matrix in zip(params, matrices, strict=True):
            if matrix.data_ptr() != p.data_ptr():
                p.copy_(matrix.view(p.shape))
        # A kernel writes unseen by autograd, which has to refuse a graph from before.
        torch.autograd.graph.increment_version([piece.param for piece in pieces])
        return True


def _apply(p: Tensor, u: Tensor, lr, weight_decay: float) -> None:
    """p <- (1 - lr*wd) p - lr u, rounded to nearest."""
    if p.dtype == u.dtype:
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        add_scaled_(p, u, -lr)
        return
    p, u = (p, u) if p.ndim else (p.view(1), u.view(1))
    for part in chunks(len(p), 8 * p[:1].numel()):
        new = p[part].to(u.dtype)
        if weight_decay:
            new.mul_(1 - lr * weight_decay)
        p[part] = add_scaled_(new, u[part], -lr)


def _apply_rounded(p: Tensor, u: Tensor, lr, weight_decay: float, step: Tensor, salt: Tensor, first: tuple[int, int]) -> None:
    """The same, rounded stochastically; u is (rows, cols), which begin at `first` in the whole parameter."""
    p = p[(None,) * max(0, 2 - p.ndim)]  # rows first, as in the 2-D view
    for part in chunks(len(p), 24 * u.shape[1]):
        new = u[part].mul(-lr).add_(p[part].reshape(u[part].shape).to(u.dtype).mul_(1 - lr * weight_decay))
        rounded = stochastic_round(new[None], p.dtype, step, salt, (first[0] + part.start, first[1]))
        p[part] = rounded.view(p[part].shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of what a stack's buffers are made.

    Attributes:
        n: number of pieces.
        rows: of each piece.
        matrix: (rows, cols) of the whole parameter, by which its format is chosen: a piece has its parameter's.
        dtype: of the arithmetic, and of state unless options say otherwise.
        device: where.
        numbers: (n,) int64, which parameters they belong to.
        reduce: sums a tensor over the processes that share the matrix; None: each piece is a whole matrix.
    """

    n: int
    rows: int
    matrix: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    numbers: Tensor
    reduce: Callable[[Tensor], Tensor] | None = None

    @property
    def cols(self) -> int:
        """Length of a row."""
        return self.matrix[1]


# Layout -> (compressor, window), or None where a plain row is smaller.
RowFormat = Callable[[Layout], tuple[object, Window] | None]


def build_stacks(
    groups: Iterable[list[Piece]], options, formats: list[RowFormat | None], shards=None, flat: bool = False
) -> list[Stack]:
    """Group pieces into stacks and allocate their state, all zeros.

    Args:
        groups: the pieces of each parameter group.
        options: WindowOptions.
        formats: for each group, the compressor and window of tensors of two or more dimensions; None: plain rows.
        shards: the processes, where pieces are rows.
        flat: 1-D tensors are pieces of everything, and have the formats too.
    """
    # Rows of several tensors are one batch only where every process makes the same batches: they meet in each.
    alike_everywhere = shards is not None and shards.follows
    alike: dict[tuple, list[Piece]] = {}
    for index, pieces in enumerate(groups):
        for piece in pieces:
            p, rows = piece.param, piece.rows
            place = rows and (rows.start, rows.stop, None if alike_everywhere else piece.number)
            alike.setdefault((index, matrix_shape(p), p.ndim < 2, p.dtype, p.device, place), []).append(piece)
    stacks = []
    for (index, _, plain, _, _, place), members in alike.items():
        for part in batches(members, shards.size if place else 1):
            row_format = None if plain and not flat else formats[index]
            stacks.append(_allocate(part, index, options, row_format, shards.sum if place else None))
    return stacks


def batches(members: list[Piece], processes: int = 1) -> Iterator[list[Piece]]:
    """Pieces of one shape, each 1/processes of its parameter, in lists that are not too large for one stack."""
    first = members[0].param
    limit = processes * CHUNK_BYTES
    size = max(1, limit // max(1, first.numel() * compute_dtype(first).itemsize))
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _allocate(pieces: list[Piece], index: int, options, row_format: RowFormat | None, reduce) -> Stack:
    n, first, (rows, cols) = len(pieces), pieces[0], pieces[0].shape
    dtype, device = compute_dtype(first.param), first.param.device
    numbers = torch.tensor([piece.number for piece in pieces], device=device)
    layout = Layout(n, rows, matrix_shape(first.param), dtype, device, numbers, reduce)
    compressed = row_format(layout) if row_format else None
    exact = False
    if compressed is None:
        window, exact = _plain_window(options, (n, options.window_size, rows, cols), {"compute_dtype": dtype, "device": device})
        compressed = Identity(), window
    momentum = torch.zeros(n, rows, cols, dtype=dtype, device=device) if options.momentum else None
    feedback = _feedback(options, exact, (n, rows, cols), dtype, numbers, first.first)
    return Stack(pieces, numbers, index, compressed[0], feedback, compressed[1], momentum)


def _plain_window(options, shape: tuple[int, int, int, int], like: dict) -> tuple[Window, bool]:
    """A window of whole rows, and whether it stores them exactly."""
    if options.window_format == "low_bit":
        return LowBitDenseWindow(*shape, **like), False
    dtype = options.window_dtype or like["compute_dtype"]
    return DenseWindow(*shape, dtype=dtype, **like), dtype.itemsize >= like["compute_dtype"].itemsize


def _feedback(options, exact: bool, shape: tuple[int, int, int], dtype: torch.dtype, numbers: Tensor, first: tuple[int, int]):
    if exact:
        return ErrorFeedback(None)
    if options.error_format != "plain":
        return QuantizedErrorFeedback(int(options.error_format.removeprefix("int")), shape, dtype, numbers, first)
    error = torch.zeros(shape, dtype=options.error_dtype or dtype, device=numbers.device)
    return ErrorFeedback(error, numbers, first)
