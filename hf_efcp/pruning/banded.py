"""Training under a mask that follows the weights, with a band around its threshold where they stand still (arXiv 2506.01863).

The layers compute with their largest weights. A removed weight may grow back, and one near to the threshold does not flip to and
fro: `core.banded` has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.banded import banded
from .layers import Layer
from .masks import Masks


class BandedMask(nn.Module):
    """The parametrization of a weight: its largest entries, see `core.banded`.

    Args:
        density: the share that is kept, in (0, 1].
        band: p, in (0, 0.5).
    """

    def __init__(self, density: float, band: float):
        super().__init__()
        self.density, self.band = density, band

    def forward(self, theta: Tensor) -> Tensor:
        """Give the sparse weight."""
        return banded(theta, self.density, p=self.band)


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
            parametrize.register_parametrization(x.module, "weight", BandedMask(1 - sparsity, band))

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
