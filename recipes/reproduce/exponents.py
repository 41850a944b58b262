"""M-FAC with another exponent than -1, to find out whether natural gradient is the right one: F^-p, F = lambda*I + G^T G / N.

    u = F^-p G^T w = G^T (lambda*I + K/N)^-p w

p = 1 is M-FAC, p = 1/2 nearly GGT (whose eps is outside of the root), p = 0 the averaged gradient.
"""

import dataclasses
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_efcp.core.coefficients import spectral
from hf_efcp.core.gram import GramMatrix
from hf_efcp.engine.base import EngineOptimizer
from hf_efcp.engine.formats import LowRankFormat
from hf_efcp.engine.windowed import Windowed
from hf_efcp.optim.mfac import LowRankMFAC, LowRankMFACOptions, damping_of, solve
from hf_efcp.options import OptionError, option


@dataclasses.dataclass(frozen=True)
class PowerMFACOptions(LowRankMFACOptions):
    """Options of PowerMFAC."""

    exponent: float = option(1.0, "p of F^-p", allowed="a number in (0, 1]", check=lambda x: 0 < x <= 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centered:
            raise OptionError("centered=True: PowerMFAC has only the second moment")


def phi(o: Any, gram: GramMatrix, j: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Give c = (lambda*I + K/N)^-p w, (groups, m) fp64; arguments: see `Windowed`."""
    divisor = gram.filled.double() if o.divisor == "filled" else o.window_size
    damping = _damping(o, gram)[:, None]
    return spectral(gram.matrix, w, lambda s: (damping + s / divisor) ** -o.exponent, dtype)


def outside(o: Any, gram: GramMatrix) -> Tensor:
    """Give phi(0) = lambda^-p, (groups,) fp64; 0 while there is no gradient."""
    damping = _damping(o, gram)
    return torch.where(damping > 0, damping**-o.exponent, 0.0)


def _damping(o: Any, gram: GramMatrix) -> Tensor:
    return gram.matrix.new_ones(len(gram.matrix)) * damping_of(o, gram)


class PowerMFAC(EngineOptimizer):
    """LowRankMFAC with u = F^-p G^T w. Arguments as LowRankMFAC, with `exponent`."""

    options_type = PowerMFACOptions
    measured = MappingProxyType(dict(LowRankMFAC.measured))
    method = Windowed(LowRankFormat, phi, solve, outside)
