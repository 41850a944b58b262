"""The work between K and the update: messages of a step, the average that is preconditioned, and the size of the update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.coefficients import quadratic, weights
from ..core.deferred import masked, readable
from ..core.gram import GramMatrix
from ..options import OptionError
from .setup import Setup


def over_processes(setup: Setup, stacks: Sequence[Any], k_j: Tensor, o: Any) -> tuple[Tensor, Tensor | float]:
    """Sum over processes, in one message: the new row of K, the sum of S_i^2, and the means that divided tensors' metrics need.

    With several processes, the message also has each process's doubt.

    Returns:
        The row, (groups, m) fp64; and the sum of S_i^2 over all coordinates that have a gradient, 0-D fp64, or without a metric
        the number of these coordinates.
    """
    if o.metric == "none":
        return _summed(setup, [k_j])[0], float(setup.coordinates())
    metrics = [s.metric for s in stacks if s.metric is not None]
    size = joined([metric.live_squares() for metric in metrics], k_j).sum()
    entered = joined([t.flatten() for metric in metrics for t in metric.entered], k_j)
    size = size + 0 * entered.to(setup.dtype).sum()  # NaN, to refuse the step, where the state cannot hold it
    divided = [metric for metric in metrics if metric.divided]
    k_j, size, *means = _summed(setup, [k_j, size, *(metric.means.to(k_j.device) for metric in divided)])
    for metric, mean in zip(divided, means, strict=True):
        metric.means = mean.to(metric.means.device)
    return k_j, size


def _summed(setup: Setup, parts: list[Tensor]) -> list[Tensor]:
    """Sum fp64 tensors, and the number of processes with a doubt, over the processes."""
    if setup.placement.alone:
        return parts
    sent = [*parts, parts[0].new_full((), float(setup.doubt))]
    message = setup.placement.sum(torch.cat([t.flatten() for t in sent]))
    *parts, setup.heard = (part.view(t.shape) for part, t in zip(message.split([t.numel() for t in sent]), sent, strict=True))
    return parts


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join tensors with the same number of dimensions, on the device of `like`; without tensors, give an empty fp64 tensor."""
    return torch.cat([part.to(like.device) for part in parts]) if parts else like.new_zeros(0)


def finite(k_j: Tensor, size: Tensor | float) -> bool | Tensor:
    """Tell whether the staged entry may enter the window: a bool, or on a GPU a 0-D bool tensor.

    A gradient with NaN or infinity makes the norm of its entry NaN or infinite.
    """
    finite = (0 * k_j).sum() + 0 * size == 0  # 0 times what is not finite is NaN
    return bool(finite) if readable(finite.device) else finite


def _normalized(o: Any) -> bool:
    """Tell whether the weights of the average sum to 1."""
    return o.window_nesterov or o.metric != "none"


def by_group(ids: Sequence[Tensor], parts: Tensor, like: Tensor, scope: str) -> Tensor:
    """Sum the tensors' contributions, (tensors, ...) in the order of `ids`, for each Gram matrix: (groups, ...), like `like`."""
    if scope == "model":
        return parts.sum(0, keepdim=True)
    return torch.zeros_like(like).index_add_(0, joined(ids, like).long(), parts)


def averaged(k: Tensor, gram: GramMatrix, j: Tensor, o: Any) -> Tensor:
    """Give w, the average of the window's entries that is preconditioned."""
    return weights(k, gram.ages(j), o.averaging, o.window_nesterov, _normalized(o))


@dataclasses.dataclass
class Rest:
    """The residuals r, with residual="momentum".

    Attributes:
        weight: (groups,) fp64. The update's part outside of the window is weight * S^-1 r.
        square: (groups,) fp64, the sum of r^2 over all tensors of a Gram matrix.
        mean: a number. The running mean of what compression left out is mean * r.
    """

    weight: Tensor
    square: Tensor
    mean: Tensor | float


def rest_of(setup: Setup, all_stacks: Sequence[Any], outside: Callable[[Any, GramMatrix], Tensor] | None, o: Any) -> Rest:
    """Give the weight of the residuals in the update: phi(0) times the bias correction of their running mean."""
    gram, zeros = setup.counters, torch.zeros_like(setup.counters.matrix[:, 0, 0])
    if o.residual == "feedback":
        return Rest(zeros, zeros, 0.0)
    if outside is None:
        raise OptionError("residual='momentum': this method has no value outside of the window; allowed is feedback")
    stacks, squares = [s for s in all_stacks if s.residual is not None], []
    for s in stacks:
        squares.append(s.residual.squares())
        for i in s.turn.absent:  # a tensor that does not move has no part in the size of the update
            squares[-1][i].zero_()
    square = by_group([s.ids for s in stacks], joined(squares, zeros), zeros, o.scope)
    beta, mean = o.averaging, 1 - o.averaging
    if _normalized(o):
        mean = mean / (1 - beta ** gram.step.double())
    return Rest(outside(o, gram) * mean, setup.placement.sum(square), mean)


def rescaled(
    c: Tensor,
    rest: Rest,
    w: Tensor,
    gram: GramMatrix,
    size: Tensor | float,
    o: Any,
    dtype: torch.dtype,
    ok: bool | Tensor,
) -> tuple[Tensor, Rest]:
    """Scale c so that the sum of S_i^2 u_i^2 is update_rms^2 times the sum of S_i^2; S = 1 without a metric.

    |S u|^2 = c^T K c costs nothing, so no pass over the parameters is needed. rms_mode="adam" multiplies the update by the norm
    of the averaged entry, divided by the root mean square of the entries' norms. With residual="momentum", the residuals count in
    all norms, and the sum of S_i^2 takes the place of the entries' mean square. For a refused step the result is zero.
    """
    k, far = gram.matrix, o.residual == "momentum"
    if o.update_rms is not None:
        square = quadratic(k, c).sum()
        norm = (square + (rest.weight.square() * rest.square).sum() if far else square).sqrt()
        root = size.sqrt() if isinstance(size, Tensor) else math.sqrt(size)
        scale = torch.where(norm > 0, o.update_rms * root / norm, 0.0)
        c, rest = c * scale, dataclasses.replace(rest, weight=rest.weight * scale)
        if o.rms_mode == "adam":
            mean_square = torch.as_tensor(size) if far else gram.mean_square().sum()
            square = quadratic(k, w).sum()
            square = square + (rest.mean * rest.mean * rest.square).sum() if far else square
            scale = torch.where(mean_square > 0, square / mean_square, 0.0).sqrt()
            scale = scale.clamp_max(1.0) if far else scale  # S of the step before does not know of a spike
            c, rest = c * scale, dataclasses.replace(rest, weight=rest.weight * scale)
    # Gradients near the smallest fp32 number need coefficients beyond the largest fp32 number: c is then set to zero.
    largest = torch.maximum(c.abs().amax(-1), rest.weight.abs())
    fits = largest < torch.finfo(dtype).max / 2**20
    c, rest = torch.where(fits[:, None], c, 0.0), dataclasses.replace(rest, weight=torch.where(fits, rest.weight, 0.0))
    if ok is True:
        return c, rest
    return masked(ok, c, 0.0), dataclasses.replace(rest, weight=masked(ok, rest.weight, 0.0))
