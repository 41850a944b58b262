"""The options of `prune`: names, defaults, ranges."""

from __future__ import annotations

import dataclasses

from ..options import option, positive
from .supports import SUPPORTS


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """How a model is pruned; which zeros it gets, pattern and sparsity say."""

    method: str = option("iobs", "iobs, magnitude, or mfac: scores of the whole model", choices=("iobs", "magnitude", "mfac"))
    iterations: int = option(
        3,
        "how often the layer problems are made and solved, where once is not enough; target=layer with 1: one-shot OBS",
        allowed=">= 1",
        check=positive,
    )
    support: str | None = option(
        None, "how the weights to keep are found; none: sweep, and cost for blocks", choices=tuple(SUPPORTS)
    )
    refinement: str = option(
        "newton", "the step towards the dense solution before each projection", choices=("newton", "gradient")
    )
    refinement_steps: int = option(1, "how many such steps", allowed=">= 1", check=positive)
    step: float = option(1.0, "share of such a step", allowed="> 0 and <= 1", check=lambda x: 0 < x <= 1)
    damping: float = option(0.01, "added to the diagonal of H, times its mean", allowed="a finite number > 0", check=positive)
    target: str = option(
        "dense",
        "what a layer should give: the dense model's outputs (layer after layer), or what its dense weights make of its inputs",
        choices=("dense", "layer"),
    )
    window_size: int = option(32, "m of the window that method=mfac fills", allowed=">= 1", check=positive)
    training: str = option("masked", "zeros that are chosen once, or by training", choices=("masked", "banded"))
    band: float = option(
        0.3,
        "p of training=banded: its band ends at the magnitude below which p + 1/2 of a normal variable lies",
        allowed="> 0 and < 0.5",
        check=lambda x: 0 < x < 0.5,
    )
