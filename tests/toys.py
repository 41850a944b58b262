"""Two small methods, registered as any other: what docs/adding_a_method.md explains, and what the engine is tested with."""

import contextlib
import dataclasses
from types import MappingProxyType

from hf_efcp import registry
from hf_efcp.core.cells import Spec, matrix_specs
from hf_efcp.core.coefficients import quadratic
from hf_efcp.core.compressors import PowerIteration
from hf_efcp.engine.adamw import ADAMW, AdamWOptions
from hf_efcp.engine.base import EngineOptimizer
from hf_efcp.engine.formats import SparseFormat
from hf_efcp.engine.options import SparseOptions, StateOptions, WindowOptions
from hf_efcp.engine.tensorwise import Rule, Tensorwise
from hf_efcp.engine.windowed import Windowed
from hf_efcp.options import fraction, option, positive
from hf_efcp.registry import OptimizerInfo, add_optimizer

# A window method: the mean of the window's entries, scaled to length 1.  u = G^T w / |G^T w|


@dataclasses.dataclass(frozen=True)
class ToyMeanOptions(SparseOptions, WindowOptions):
    """Options of ToyMean."""


def phi(o, gram, j, w, dtype):
    """Give c = w / sqrt(w^T K w), (groups, m) fp64."""
    return w / quadratic(gram.matrix, w).sqrt().clamp_min(1e-300)[:, None]


class ToyMean(EngineOptimizer):
    """The normalized mean of sparse gradients."""

    options_type = ToyMeanOptions
    measured = MappingProxyType({"window_size": 16})
    method = Windowed(SparseFormat, phi, lambda m: 2 * m**2)


# A per-tensor method: c = P Q^T of a = e + g, and its mean.  m <- b m + (1 - b) P Q^T;  u = m


@dataclasses.dataclass(frozen=True)
class ToyFactorsOptions(AdamWOptions, StateOptions):
    """Options of ToyFactors."""

    rank: int = option(2, "rank of the update", allowed="an integer >= 1", check=positive)
    mean_decay: float = option(0.5, "b, decay of the mean", allowed="a number in [0, 1)", check=fraction)


def specs(layout, o):
    """Declare m (rows x cols), which follows the rows, and Q (cols x r), which does not."""
    r = min(o.rank, layout.rows, layout.cols)
    return *matrix_specs("mean", layout, None), Spec("right", (layout.cols, r), layout.dtype)


def update(s, a, t, o):
    """Give u = m, (n, rows, cols)."""
    power = PowerIteration(s.right)
    c = power.compress(a, s.turn.step)
    a.keep(c)
    power.commit()
    m = o.mean_decay * s.mean.read() + (1 - o.mean_decay) * c.dense()
    s.mean.write(m)
    return m


class ToyFactors(EngineOptimizer):
    """The mean of low-rank gradients; AdamW for vectors."""

    options_type = ToyFactorsOptions
    method = Tensorwise(Rule(specs, update, lossy=True), ADAMW)


def register():
    """Register both."""
    small = {"density": 0.2, "block_size": 16}
    mean = {"family": "mean", "compression": "sparse", "lossy": small, "exact": {"density": 1.0}}
    factors = {"family": "factors", "compression": "low rank", "windowed": False, "lossy": {"rank": 2}, "exact": {"rank": 10_000}}
    add_optimizer(OptimizerInfo("efcp_toy_mean", ToyMean, "toy: mean of the window", paper="none", **mean))
    add_optimizer(OptimizerInfo("efcp_toy_factors", ToyFactors, "toy: mean of factors", paper="none", **factors))


@contextlib.contextmanager
def registered():
    """Register both for a while: other tests of this process go through all names that are registered."""
    before = dict(registry._REGISTRY)
    register()
    try:
        yield
    finally:
        registry._REGISTRY.clear()
        registry._REGISTRY.update(before)
