"""Banded training of sparse weights: masks of the largest weights, and a band around their threshold that gets no gradient.

Called RBBM in arXiv 2506.01863. theta has any shape; T_k is the magnitude of the k-th largest weight, RMS the root mean square of
all. The forward pass computes with theta * (|theta| >= T_k). The backward pass lets the gradient through outside of a band:

    |theta| < min(T_p, T_k)  or  |theta| > max(T_p, T_k)

so that weights near the threshold do not flip between kept and dropped at every step.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

_NORMAL = NormalDist()


def kept(theta: Tensor, density: float) -> Tensor:
    """Give the mask of the largest weights, bool like theta: at least one, and round(density * n) where no two are equal."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must be in (0, 1]")
    return theta.abs() >= threshold(theta, density)


def threshold(theta: Tensor, density: float) -> Tensor:
    """Give T_k, (): the least magnitude that is kept."""
    count = max(1, round(density * theta.numel()))
    return theta.abs().flatten().kthvalue(theta.numel() - count + 1).values


def second_threshold(theta: Tensor, p: float) -> Tensor:
    """Give T_p, (): RMS * Phi^-1(0.5 + p). The share 2 p of normal weights is below T_p.

    Args:
        theta: the weights.
        p: in (0, 0.5).
    """
    if not 0 < p < 0.5:
        raise ValueError(f"p={p}: must be in (0, 0.5)")
    return _rms(theta) * _NORMAL.inv_cdf(0.5 + p)


def threshold_from_kept(theta: Tensor, density: float, a: float) -> Tensor:
    """Give T_a, (), which takes the place of T_p: RMS * Phi^-1(0.5 + (1 - a) (Phi(T_k / RMS) - 0.5)).

    Args:
        theta: the weights.
        density: the share that is kept.
        a: in [0, 1]. a = 0 gives T_k, so that the band is empty. a = 1 gives 0, so that the band is from 0 to T_k.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a={a}: must be in [0, 1]")
    rms = _rms(theta).clamp_min(torch.finfo(theta.dtype).tiny)
    share = torch.special.ndtr((threshold(theta, density) / rms).double()) - 0.5
    return rms * torch.special.ndtri(0.5 + (1 - a) * share).to(theta.dtype)


def trained(theta: Tensor, t_k: Tensor, t_p: Tensor) -> Tensor:
    """Give the mask of the weights that get a gradient, bool like theta: those outside of the band between both thresholds."""
    size = theta.abs()
    outside = (size < torch.minimum(t_p, t_k)) | (size > torch.maximum(t_p, t_k))
    return outside | (t_k == 0)  # kept are all weights that are not zero: there is no threshold


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, density: float, t_p: Tensor) -> Tensor:
        t_k = threshold(theta, density)
        ctx.save_for_backward(trained(theta, t_k, t_p))
        return theta * (theta.abs() >= t_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None


def banded(theta: Tensor, density: float, p: float | None = None, a: float | None = None) -> Tensor:
    """Give the weights to compute with, like theta: the largest weights, others zero. Gradients reach theta outside of the band.

    Args:
        theta: the trained weights, dense.
        density: the share that is kept, in (0, 1].
        p, a: one of them gives the second threshold: T_p or T_a.

    Raises:
        ValueError: a number out of its range, or both or none of p and a.
    """
    if (p is None) == (a is None):
        raise ValueError(f"p={p}, a={a}: one of the two is needed")
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must be in (0, 1]")
    with torch.no_grad():
        t_p = second_threshold(theta, p) if p is not None else threshold_from_kept(theta, density, a or 0.0)
    return _Banded.apply(theta, density, t_p)


def _rms(theta: Tensor) -> Tensor:
    return theta.square().mean().sqrt()
