"""Rank-r factors of a mean of matrices, one on each process, without sending a matrix (PowerSGD, arXiv 1905.13727).

    P <- orth(mean_i a_i Q),   Q <- mean_i a_i^T P          power_iterations times, from a Q that all processes have

Both products are linear in a_i. So P and Q are, up to rounding, the factors of mean_i a_i, and mean_i (a_i - P Q^T) is its error.
(A mean of factors that each process makes of its own a_i would not have this property.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.compressors import unit_columns
from ..core.linalg import orthonormalize


def mean_(tensors: Sequence[Tensor], group: dist.ProcessGroup, size: int) -> None:
    """Take the mean over the `size` processes of `group`, in place, by one all-reduce for each dtype among the tensors.

    On a GPU the present stream waits for the all-reduces; the host does not.
    """
    sent = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        alike = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in alike]).div_(size)
        sent.append((alike, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for alike, flat, work in sent:
        work.wait()
        parts = flat.split([t.numel() for t in alike])
        torch._foreach_copy_(alike, [part.view(t.shape) for t, part in zip(alike, parts, strict=True)])


def factors_of_mean(
    a: Sequence[Tensor],
    q: Sequence[Tensor],
    power_iterations: int,
    mean_: Callable[[Sequence[Tensor]], None],
    plain: Sequence[Tensor] = (),
) -> list[tuple[Tensor, Tensor]]:
    """Make P and Q of the mean over processes of each a, by two rounds of messages for each power iteration.

    Args:
        a: any number of this process's stacks, (n, rows, cols) each.
        q: for each stack, Q (n, cols, r), the same on all processes.
        power_iterations: at least 1.
        mean_: tensors -> None; replaces the tensors by their means over processes.
        plain: tensors that are not compressed. The last round replaces them by their means.

    Returns:
        (P (n, rows, r), Q (n, cols, r)) for each stack, the same on all processes.
    """
    p, q = [], list(q)
    for i in range(power_iterations):
        p = [x @ (unit_columns(y) if i else y) for x, y in zip(a, q, strict=True)]
        mean_(p)
        p = [orthonormalize(x) for x in p]
        q = [x.mT @ y for x, y in zip(a, p, strict=True)]
        mean_([*q, *plain] if i == power_iterations - 1 else q)
    return list(zip(p, q, strict=True))
