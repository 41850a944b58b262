"""AdamW (arXiv 1711.05101) as a rule of the engine, for tensors that a method does not compress. State names are torch's."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .. import kernels
from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec, matrix_specs
from ..core.values import POSITIVE
from ..options import fraction, option, positive
from .tensorwise import Rule, TensorStack, U, Unformed


@dataclasses.dataclass(frozen=True)
class AdamWOptions:
    """Options of AdamW."""

    beta1: float = option(0.9, "decay of the mean gradient", allowed="a number in [0, 1)", check=fraction)
    beta2: float = option(0.999, "decay of the mean squared gradient", allowed="a number in [0, 1)", check=fraction)
    eps: float = option(1e-8, "added to the root mean square", allowed="a finite number > 0", check=positive)


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare both moments."""
    return (*matrix_specs("exp_avg", layout, None), *matrix_specs("exp_avg_sq", layout, None, values=POSITIVE))


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> U:
    """Give u, the `adam` quotient of m and v. Forming u sets m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2."""

    def rows_of_u(rows: slice) -> Tensor:
        g = a.rows(rows)
        m = s.exp_avg.read(rows).lerp(g, 1 - o.beta1)
        v = (o.beta2 * s.exp_avg_sq.read(rows)).addcmul_(g, g, value=1 - o.beta2)
        s.exp_avg.write(m, rows)
        s.exp_avg_sq.write(v, rows)
        return adam(m, v, t, o)

    def add_to(params: list[Tensor], scale: float, decay: float) -> bool:
        moments = s.buffers["exp_avg"], s.buffers["exp_avg_sq"]
        return kernels.adamw(a.gradients, moments, t.flatten(), (o.beta1, o.beta2), o.eps, params, scale, decay)

    return Unformed(rows_of_u, add_to)


def adam(m: Tensor, v: Tensor, t: Tensor, o: Any) -> Tensor:
    """Give u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), (n, rows, cols), for counts t (n, 1, 1)."""
    t = t.double()
    m_scale, v_scale = ((1 - beta**t).to(m.dtype) for beta in (o.beta1, o.beta2))
    return (m / m_scale) / ((v / v_scale).sqrt() + o.eps)


ADAMW = Rule(specs, update, operations=lambda n, rows, cols, o: 12.0 * n * rows * cols)
