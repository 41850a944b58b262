"""One step of the sparse recovery algorithms of Iterative Optimal Brain Surgeon (arXiv 2408.17163).

They minimise f(w) over vectors with at most k entries that are not zero. g is the gradient of f at w and H its Hessian, or what
stands for it; both have to be of the same f: a mean in one and a sum in the other changes the step size. Rows are independent
problems that share H. `step=1` on a quadratic f goes to the same point from any w, so that iterating changes nothing there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import obs_projection, top_k
from .supports import greedy_support


def k_iht_step(w: Tensor, gradient: Tensor, k: int, step: float) -> Tensor:
    """Give T_k(w - step g), (rows, d): iterative hard thresholding; step = 1 / the largest eigenvalue of H is usual."""
    z = w - step * gradient
    return torch.where(top_k(z, k), z, 0.0)


def topk_iobs_step(w: Tensor, gradient: Tensor, inverse: Tensor, k: int, step: float = 1.0) -> Tensor:
    """Give T_k(w - step H^-1 g), (rows, d): a Newton step, then the largest entries as they are."""
    z = w - step * gradient @ inverse
    return torch.where(top_k(z, k), z, 0.0)


def iobs_step(w: Tensor, gradient: Tensor, inverse: Tensor, k: int, step: float = 1.0, support: str = "magnitude") -> Tensor:
    """Give the OBS projection of z = w - step H^-1 g, (rows, d): zeros outside of k entries, and the others make up for them.

    Args:
        w, gradient: (rows, d).
        inverse: H^-1, (d, d).
        k: the number of entries that are kept; k >= d: z itself.
        step: the share of the Newton step.
        support: "magnitude": the k largest entries of z; "greedy": removes one entry after the other, the cheapest first.

    Raises:
        ValueError: another support.
    """
    if support not in ("magnitude", "greedy"):
        raise ValueError(f"support={support!r}: must be magnitude or greedy")
    z = w - step * gradient @ inverse
    if k >= z.shape[1]:
        return z
    return obs_projection(z, inverse, top_k(z, k) if support == "magnitude" else greedy_support(z, inverse, k))
