"""LoRDO: Adam in a subspace that all workers share, chosen by their averaged pseudo-gradient (arXiv 2602.04396).

A is a or a^T, short x long; a = e + g; Q (short x r) has orthonormal columns. Between two synchronisations Q stays:

    h = Q^T A,   E <- A - Q h
    u = b1 u + (1 - b1) h,   v = b2 v + (1 - b2) h^2
    p <- (1 - lr wd) p - lr [ (1 - omega) G / (mu d) + omega Q u / (sqrt(v) + eps) ],   d = sqrt(mean of v over r) + eps

At a synchronisation, Delta is the mean over the workers of what they have added to p:

    Q <- the r leading singular vectors of Delta on the short side,   T = Q^T Q_old
    u <- T u,   v <- LDAdamW's turned v + (1 - T^2 1) mean of v over r

The first two lines, the last term and "Q by Delta" are the paper's as far as its abstract and a third party's page of formulas
tell: no code and no table of settings were found. Completions of ours: d, which the page leaves open; bias correction; weight
decay; how u and v follow Q (the last term gives a direction that is new the mean of the others' v, so that it takes no leap);
the first Q; AdamW for embeddings, head and vectors; every default. Clipping (the page's rho) is the training loop's, on g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec, matrix_shape
from ..core.linalg import stacked, without_noise
from ..core.random import counted_noise
from ..core.values import POSITIVE
from ..engine.adamw import ADAMW, AdamWOptions
from ..engine.base import EngineOptimizer
from ..engine.options import StateOptions, SubspaceOptions
from ..engine.tensorwise import Rule, TensorStack, Tensorwise, U, Unformed
from ..optim.ldadamw import Side, leading, turned
from ..options import OptionError, option, positive

# A singular value this much smaller than the first is made of rounding errors.
_NO_VALUE = 1e-6


@dataclasses.dataclass(frozen=True)
class LoRDOOptions(SubspaceOptions, AdamWOptions, StateOptions):
    """Options of LoRDO."""

    rank: int = option(
        64, "rank r of the subspace; from the shorter side on, Q is the identity", allowed="an integer >= 1", check=positive
    )
    omega: float = option(
        0.9,
        "weight of the momentum in the subspace; the rest is the gradient's own; 1: nothing ever leaves the first subspace",
        allowed="a number in [0, 1]",
        check=lambda x: 0 <= x <= 1,
    )
    mu: float = option(1.0, "divides the gradient's own part of the update", allowed="a finite number > 0", check=positive)
    bias_correction: bool = option(True, "divide both moments by 1 - beta^t, as Adam does")
    proj_type: str = option(
        "left",
        "side that is projected; left: the rows; right: the columns; std: the shorter one (the rows of a square matrix); "
        "reverse_std: the other one",
        choices=("left", "right", "std", "reverse_std"),
    )
    proj_method: str = option(
        "svd",
        "how Q follows the pseudo-gradient; svd: its leading singular vectors; power_iteration: two products from the old Q on",
        choices=("svd", "power_iteration"),
    )
    first_projector: str = option(
        "gradient",
        "the first Q; gradient: of the first gradient (the workers' mean); random: drawn",
        choices=("gradient", "random"),
    )
    error_feedback: bool = option(True, "add to the next gradient what the subspace leaves out of this one; false: it is lost")
    error_kept: float = option(
        1.0,
        "share of the kept error that is left at a synchronisation, where Q changes; 0: it starts anew",
        allowed="a number in [0, 1]",
        check=lambda x: 0 <= x <= 1,
    )

    def __post_init__(self) -> None:
        if self.shard != "off":
            raise OptionError(f"shard={self.shard!r}: each worker of LoRDO has a state of its own; allowed is off")


# preset="measured": with it AdamW's learning rates work.
MEASURED: Mapping[str, Any] = MappingProxyType({"error_dtype": torch.bfloat16, "adjust_lr_fn": "match_rms_adamw"})


def side_of(layout: Layout, o: Any) -> Side:
    """Give the projected side. Its rank may be the whole side, also where that is the longer one: Q is the identity then."""
    side = Side(layout, o)
    side.rank = min(o.rank, side.short)
    return side


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare Q (short x r) and both moments (r x long)."""
    side = side_of(layout, o)
    moment = (side.rank, side.long)
    return (
        Spec("projector", (side.short, side.rank), layout.dtype),
        Spec("exp_avg", moment, layout.dtype),
        Spec("exp_avg_sq", moment, layout.dtype, values=POSITIVE),
    )


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> U:
    """Give the update; the equations are above."""
    if a.total is not None:
        raise OptionError("LoRDO trains whole matrices on every worker: neither FSDP2 nor a process_group can divide them")
    side, g = side_of(s.layout, o), a.gradients
    q = _started(s, a, t, side, o)
    h = without_noise(side.transposed_times(a, q).mT, 2)
    a.keep(side.entry(q, h))
    m = o.beta1 * s.exp_avg.read() + (1 - o.beta1) * h
    v = o.beta2 * s.exp_avg_sq.read() + (1 - o.beta2) * h.square()
    s.exp_avg.write(m)
    s.exp_avg_sq.write(v)
    c1, c2 = (bias(beta, t, o) for beta in (o.beta1, o.beta2))
    m, v = m / c1, v / c2
    size = (side.short / side.rank) ** 0.5 if o.adjust_lr_fn == "match_rms_adamw" else 1.0
    momentum = side.entry(q, o.omega * size * m / (v.sqrt() + o.eps))
    if o.omega == 1:
        return momentum.dense
    inverse = (1 - o.omega) * size / (o.mu * shared_root(v, o.eps))

    def rows_of_u(rows: slice) -> Tensor:
        own = stacked(g, rows)
        return momentum.dense(rows) + own * (inverse if side.left else inverse.mT[:, rows])

    return Unformed(rows_of_u)


def shared_root(v: Tensor, eps: float) -> Tensor:
    """Give d (n, 1, long), by which a column of the whole gradient is divided, for v (n, r, long): of our reading, see above."""
    return v.mean(1, keepdim=True).sqrt() + eps


def bias(beta: float, t: Tensor, o: Any) -> Tensor:
    """Give 1 - beta^t for counts t (n, 1, 1); 1 without bias correction, and where t is 0."""
    if not o.bias_correction:
        return torch.ones_like(t)
    c = 1 - beta ** t.double()
    return torch.where(t > 0, c, 1.0).to(t.dtype)


def _started(s: TensorStack, a: Accumulated, t: Tensor, side: Side, o: Any) -> Tensor:
    """Give Q, (n, short, r); the first one of a tensor that has none yet."""
    q = s.projector.read()
    new = [i for i in s.newcomers(t) if not q[i].any()]
    if not new:
        return q
    q, matrices = q.clone(), a.rows() if o.first_projector == "gradient" else None
    for i in new:
        q[i] = first_basis(s, i, side, None if matrices is None else matrices[i])
    s.projector.write(q)
    return q


def first_basis(s: TensorStack, i: int, side: Side, g: Tensor | None) -> Tensor:
    """Give Q (short, r) of tensor i's first gradient (rows, cols), completed at random; None: all of it is random."""
    z = torch.zeros(side.short, side.rank, dtype=s.layout.dtype, device=s.device)
    if side.rank == side.short:
        return z.fill_diagonal_(1.0)
    z = z if g is None else leading(s, side, g)
    noise = counted_noise(torch.zeros((), dtype=torch.int64), s.ids[i : i + 1], side.rank, side.short).mT[0]
    return joined(z, noise.to(z.dtype))


def joined(z: Tensor, q0: Tensor) -> Tensor:
    """Give an orthonormal basis, (short, r), of z's columns and, where they have less than rank r, of directions of q0.

    Args:
        z: (short, r), or fewer columns.
        q0: (short, r), of rank r.
    """
    rank = q0.shape[1]
    q, triangle = torch.linalg.qr(z.double())
    sizes = triangle.diagonal().abs()
    if z.shape[1] == rank and bool(sizes.min() > _NO_VALUE * sizes.max()):
        return q.to(z.dtype)
    found: list[Tensor] = []  # column after column: what QR makes up for one that depends on others may be anything
    for x in (z.double(), q0.double()):
        noise = _NO_VALUE * x.norm(dim=0).max()
        for rest in x.mT:
            for _ in range(2):
                for other in found:
                    rest = rest - (other @ rest) * other
            if len(found) < rank and bool(rest.norm() > noise):
                found.append(rest / rest.norm())
    return torch.stack(found, 1).to(z.dtype)


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count h, e minus Q h, Q times the quotient, and the gradient's own part."""
    products = 2 + (1 if o.error_feedback else 0)
    return n * rows * cols * (2.0 * products * min(o.rank, rows, cols) + (2 if o.omega < 1 else 0))


class LoRDO(EngineOptimizer):
    """Adam in a subspace of rank r that a synchronisation chooses anew, and a full-rank part (arXiv 2602.04396).

    `LocalUpdates` calls `bases` and `turn`. Alone, it is Adam in the subspace of its first gradient.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. A group of the kind "embedding" or "head" has AdamW, as
            `parameter_groups(model)` makes them; so has one with `compress=False`.
        lr: learning rate.
        **options: see the signature, and docs/local.md.
    """

    options_type = LoRDOOptions
    measured = MEASURED
    method = Tensorwise(
        Rule(specs, update, lossy=lambda o: o.error_feedback, operations=operations, decomposes=True),
        ADAMW,
        other_kinds=("embedding", "head"),
    )

    @property
    def begun(self) -> bool:
        """Whether there is a Q."""
        return any(bool(s.projector.buffer.any()) for s, _, _ in self._places())

    def projected(self) -> list[Tensor]:
        """Give the parameters that have a Q which changes, in order; at full rank it is the identity for ever."""
        return [p for s, _, p in self._places() if (side := side_of(s.layout, self.options)).rank < side.short]

    @torch.no_grad()
    def bases(self, matrices: Mapping[Tensor, Tensor], first: bool = False) -> dict[Tensor, Tensor]:
        """Compute Q, (short, r) each, by the pseudo-gradient of some of the parameters; nothing is changed.

        Args:
            matrices: parameter -> tensor of its shape, the mean over the workers.
            first: whether they are first gradients, in place of pseudo-gradients: then `first_projector` decides.
        """
        found = {}
        for s, i, p in self._places():
            if p not in matrices:
                continue
            side, delta = side_of(s.layout, self.options), matrices[p].reshape(matrix_shape(p)).to(s.layout.dtype)
            q0 = s.projector.read()[i]
            if first or not q0.any():
                found[p] = first_basis(s, i, side, delta if self.options.first_projector == "gradient" else None)
            elif self.options.proj_method == "svd":
                found[p] = joined(leading(s, side, delta), q0)
            else:
                delta = delta if side.left else delta.mT
                y = delta.mT @ q0
                found[p] = joined(delta @ (y / y.norm().clamp_min(torch.finfo(y.dtype).tiny)), q0)
        return found

    @torch.no_grad()
    def turn(self, bases: Mapping[Tensor, Tensor]) -> None:
        """Take other bases, the same on every worker; both moments follow, and the error is scaled by `error_kept`.

        Args:
            bases: parameter -> (short, r), orthonormal.
        """
        o, setup = self.options, self.setup()
        for s in setup.stacks:
            if "projector" not in s.cells:
                continue
            s.turn.step, s.turn.ok = setup.counters.step, True
            s.turn.absent = [i for i, p in enumerate(s.params) if p not in bases]
            if len(s.turn.absent) == len(s.params):
                continue
            q0, m0, v0 = s.projector.read(), s.exp_avg.read(), s.exp_avg_sq.read()
            q = torch.stack([bases[p].to(q0) if p in bases else q0[i] for i, p in enumerate(s.params)])
            t = s.step.read().to(s.layout.dtype).view(-1, 1, 1)
            by = q.mT @ q0
            m1, new = by @ m0, (1 - by.square().sum(2, keepdim=True)).clamp_min(0)  # the share of a direction that is new
            v1 = turned(v0, m0, m1, by, bias(o.beta1, t, o), bias(o.beta2, t, o)) + new * v0.mean(1, keepdim=True)
            s.projector.write(q)
            s.exp_avg.write(m1)
            s.exp_avg_sq.write(v1)
            if o.error_kept < 1 and "error" in s.cells:
                s.error.write(o.error_kept * s.error.read())
        setup.note()

    def _places(self) -> Iterator[tuple[TensorStack, int, Tensor]]:
        """Give (stack, position, parameter) of each matrix that LoRDO trains, ordered by number."""
        places = [(int(s.ids[i]), s, i, p) for s in self.setup().stacks if "projector" in s.cells for i, p in enumerate(s.params)]
        return ((s, i, p) for _, s, i, p in sorted(places, key=lambda place: place[0]))
