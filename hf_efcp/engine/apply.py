"""The update of parameters, the same for every method: p <- (1 - lr*wd) p - lr u, rounded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .. import kernels
from ..core.linalg import add_scaled_, chunk_bytes, chunks, room_bytes
from ..core.random import stochastic_round
from ..kernels.devices import is_plain
from .stacks import Number, Numbers, Stack

# Added to a parameter's salt: the parameter and its error feedback are rounded by different random numbers.
_PARAMETER_SALT = 2**30


@dataclasses.dataclass(frozen=True)
class Rest:
    """What an update u still needs: u <- diag(x) (u + weight * e) diag(y). A kernel that adds u to p does this too.

    Attributes:
        finish: (u, rows) -> the finished u in the compute dtype, by torch.
        sizes: x (n, rows) and y (n, cols); None: ones.
        kept: e and the weights (n,); None: there is no e.
    """

    finish: Callable[[Tensor, slice], Tensor]
    sizes: kernels.Scale = None
    kept: kernels.Kept | None = None


def apply(
    stack: Stack,
    update: Callable[[slice], Tensor],
    lr: Number,
    weight_decay: Numbers,
    rounding: Tensor | None,
    still: Collection[int],
    rest: Rest | None = None,
) -> None:
    """Compute p <- (1 - lr*wd) p - lr u for the pieces of a stack, a few rows at a time.

    Low-precision parameters are rounded once: to nearest, or bf16 ones stochastically.

    Args:
        stack: the stack whose parameters are updated.
        update: rows -> u (n, rows, cols) in the compute dtype. In a refused step on a GPU, u is zero.
        lr: learning rate; on a GPU a tensor, zero where the step is refused.
        weight_decay: decoupled; a number, or one of each piece.
        rounding: the number of the step, 0-D int64, which counts stochastic rounding's random numbers; None: round to nearest.
        still: positions of the pieces that stay as they are.
        rest: what u still needs; u may then be in any dtype. None: nothing.
    """
    rows, cols = stack.shape
    bytes_each = len(stack.pieces) * cols * stack.layout.dtype.itemsize
    for part in chunks(rows, bytes_each, chunk_bytes(stack.device)):
        u = update(part)
        if not still and not isinstance(weight_decay, list) and _add_at_once(stack, u, part, lr, weight_decay, rounding, rest):
            continue
        u = u if rest is None else rest.finish(u, part)
        for i, piece in enumerate(stack.pieces):
            if i not in still:
                p = piece.data
                p, decay = p[part] if p.ndim > 1 else p, weight_decay[i] if isinstance(weight_decay, list) else weight_decay
                if rounding is not None and p.dtype == torch.bfloat16:
                    salt, (row, col) = stack.ids[i : i + 1] + _PARAMETER_SALT, piece.origin
                    _apply_rounded(p, u[i], lr, decay, rounding, salt, (row + part.start, col))
                else:
                    _apply(p, u[i].view(p.shape), lr, decay)


def move_at_once(
    stack: Stack, add_to: Callable[[list[Tensor], float, float], bool], lr: Numbers, weight_decay: Numbers, stochastic: bool
) -> bool:
    """Update all pieces by `add_to`, see `Unformed`, if they have the same rate and decay; tell whether it was done."""
    params = [piece.data for piece in stack.pieces]
    rounded = stochastic and params[0].dtype == torch.bfloat16
    if stack.turn.absent or rounded or not all(map(is_plain, params)):
        return False
    if not isinstance(lr, float) or not isinstance(weight_decay, float):
        return False
    if not add_to([p.view(stack.shape) for p in params], -lr, 1 - lr * weight_decay if weight_decay else 1.0):
        return False
    torch.autograd.graph.increment_version([piece.param for piece in stack.pieces])
    return True


def _add_at_once(
    stack: Stack,
    u: Tensor,
    part: slice,
    lr: Number,
    weight_decay: Number,
    rounding: Tensor | None,
    rest: Rest | None,
) -> bool:
    """Update some rows of all pieces by one kernel; tell whether it was done."""
    params = [piece.data for piece in stack.pieces]
    if not all(map(is_plain, params)):
        return False
    matrices = [p.view(stack.shape)[part] for p in params]
    (row, col), counted = stack.pieces[0].origin, None
    if rounding is not None and params[0].dtype == torch.bfloat16:
        counted = rounding, stack.ids + _PARAMETER_SALT, (row + part.start, col)
    sizes, kept = (None, None) if rest is None else (rest.sizes, rest.kept)
    if not kernels.add(matrices, u, -lr, 1 - lr * weight_decay if weight_decay else 1.0, counted, sizes, kept, part.start):
        return False
    torch.autograd.graph.increment_version([piece.param for piece in stack.pieces])
    return True


def _apply(p: Tensor, u: Tensor, lr: Number, weight_decay: Number) -> None:
    """Compute p <- (1 - lr*wd) p - lr u, rounded to nearest."""
    if p.dtype == u.dtype:
        if isinstance(weight_decay, Tensor) or weight_decay:
            p.mul_(1 - lr * weight_decay)
        add_scaled_(p, u, -lr)
        return
    p, u = (p, u) if p.ndim else (p.view(1), u.view(1))
    for part in chunks(len(p), 8 * p[:1].numel(), room_bytes(p.device)):
        new = p[part].to(u.dtype)
        if isinstance(weight_decay, Tensor) or weight_decay:
            new.mul_(1 - lr * weight_decay)
        p[part] = add_scaled_(new, u[part], -lr)


def _apply_rounded(
    p: Tensor, u: Tensor, lr: Number, weight_decay: Number, step: Tensor, salt: Tensor, origin: tuple[int, int]
) -> None:
    """Compute p <- (1 - lr*wd) p - lr u, rounded stochastically; u (rows, cols) begins at `origin` in the whole parameter."""
    p = p[(None,) * max(0, 2 - p.ndim)]  # rows first, as in the 2-D view
    for part in chunks(len(p), 24 * u.shape[1], room_bytes(p.device)):
        new = u[part].mul(-lr).add_(p[part].reshape(u[part].shape).to(u.dtype).mul_(1 - lr * weight_decay))
        rounded = stochastic_round(new[None], p.dtype, step, salt, (origin[0] + part.start, origin[1]))
        p[part] = rounded.view(p[part].shape)
