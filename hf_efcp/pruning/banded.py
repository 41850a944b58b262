"""Training under a mask that follows the weights, with a band around its threshold where they stand still (arXiv 2506.01863).

The layer computes with the k weights of largest magnitude; T_k is the least of these. The gradient passes where
|theta| < min(T_p, T_k) or |theta| > max(T_p, T_k), with T_p = RMS(theta) Phi^-1(1/2 + p): a removed weight may grow back, and one
near to the threshold does not flip to and fro.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layers import Layer
from .masks import Masks


class _Masked(torch.autograd.Function):
    """theta where |theta| >= T_k, else 0; the gradient stays out of the band."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, lower: Tensor, upper: Tensor, threshold: Tensor) -> Tensor:
        size = theta.abs()
        ctx.save_for_backward((size < lower) | (size > upper))
        return torch.where(size >= threshold, theta, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        return torch.where(passes, gradients[0], 0), None, None, None


class BandedMask(nn.Module):
    """The parametrization of a weight: its k largest entries; see the module.

    Args:
        kept: k; 0 < k.
        band: p, in (0, 0.5).
    """

    def __init__(self, kept: int, band: float):
        super().__init__()
        self.kept, self.band = kept, band
        self.quantile = float(torch.special.ndtri(torch.tensor(0.5 + band, dtype=torch.float64)))

    def threshold(self, theta: Tensor) -> Tensor:
        """Give T_k, 0-D."""
        flat = theta.detach().abs().flatten()
        return flat.kthvalue(len(flat) - self.kept + 1).values

    def forward(self, theta: Tensor) -> Tensor:
        """Give the sparse weight."""
        t_k, t_p = self.threshold(theta), theta.detach().square().mean().sqrt() * self.quantile
        return _Masked.apply(theta, torch.minimum(t_p, t_k), torch.maximum(t_p, t_k), t_k)


class Banded:
    """A model whose layers compute with the largest of their weights; the others are still there.

    The parameters' names end in `parametrizations.weight.original`, in checkpoints too: to resume a run, call `prune` with
    training="banded" before the Trainer is made.

    Args:
        model: is changed in place.
        layers: of it.
        sparsity: the share of zeros in each.
        band: p, in (0, 0.5).
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], sparsity: float, band: float):
        self._model, self._layers = model, layers
        for x in layers:
            kept = max(1, x.weight.numel() - round(sparsity * x.weight.numel()))
            parametrize.register_parametrization(x.module, "weight", BandedMask(kept, band))

    @torch.no_grad()
    def sparsity(self) -> float:
        """Give the share of zeros that the layers compute with."""
        weights: list[Any] = [x.module.weight for x in self._layers]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)

    def finish(self) -> Masks:
        """Make the sparse weights the model's parameters, under their old names; give their masks."""
        for x in self._layers:
            parametrize.remove_parametrizations(x.module, "weight", leave_parametrized=True)
        weights: dict[str, Any] = {x.parameter: x.module.weight for x in self._layers}
        return Masks(self._model, {name: weight.detach() != 0 for name, weight in weights.items()})
