"""DASH: Shampoo on blocks, whose inverse roots are formed together (arXiv 2602.02016; Shampoo arXiv 1802.09568).

A matrix is cut into blocks G (h x w). Each block has L (h x h) and R (w x w). b is `shampoo_beta`; with b = 1, L and R are plain
sums: L <- L + G G^T. b1 and b2 are `beta1` and `beta2`.

    L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G
    m <- b1 m + (1 - b1) G,   v <- b2 v + (1 - b2) G^2,   A = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    U = L^(-1/4) m R^(-1/4),   P = U |A| / |U|;   before `start_preconditioning_step` P = A
    M <- mu M + P,   u = P + mu M;   without Nesterov u = M

The roots are renewed in every `inverse_root_interval`-th step. The norms are those of a block. Vectors are trained by AdamW.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import Layout, Spec, matrix_specs
from ..core.inverse_roots import HEURISTICS, METHODS, SCALINGS, InverseRoot
from ..core.values import POSITIVE
from ..engine.adamw import ADAMW, AdamWOptions, adam
from ..engine.base import EngineOptimizer
from ..engine.options import StepOptions
from ..engine.tensorwise import Rule, TensorStack, Tensorwise
from ..options import OptionError, fraction, option, positive

# Added to |U|, which is 0 where the gradient is 0.
_TINY = 1e-16


@dataclasses.dataclass(frozen=True)
class DASHOptions(AdamWOptions, StepOptions):
    """Options of DASH."""

    beta2: float = option(
        0.95, "decay of the mean squared gradient, which gives an update its size", allowed="a number in [0, 1)", check=fraction
    )
    shampoo_beta: float = option(
        0.95, "decay of the matrices L and R; 1: they are sums", allowed="a number in (0, 1]", check=lambda x: 0 < x <= 1
    )
    block_size: int = option(
        1024,
        "largest number of rows and of columns of a block; all blocks of a matrix have the same size",
        allowed="an integer >= 1",
        check=positive,
    )  # fmt: skip
    root_method: str = option(
        "eigh",
        "how inverse roots are formed; eigh: by eigenvectors; newton: coupled Newton; newton_db: Newton-Denman-Beavers; "
        "chebyshev: a polynomial; auto: newton on a GPU, else eigh",
        choices=METHODS,
    )
    inverse_root_interval: int = option(
        10, "steps between two inversions, counted from the first one", allowed="an integer >= 1", check=positive
    )
    start_preconditioning_step: int = option(
        1, "step of the first inversion; Adam's update until then", allowed="an integer >= 1", check=positive
    )
    root_eps: float = option(
        1e-10, "added to eigenvalues before the root; chebyshev: a share of the scale", allowed="a finite number >= 0",
        check=lambda x: 0 <= x < float("inf"),
    )  # fmt: skip
    root_scaling: str = option(
        "power_iteration",
        "the number that divides a matrix before its root is taken; power_iteration: twice an estimate of the largest "
        "eigenvalue; power_iteration_multi: an estimate from 16 starts; frobenius: the norm",
        choices=SCALINGS,
    )
    newton_steps: int = option(10, "steps of newton and newton_db", allowed="an integer >= 1", check=positive)
    newton_tolerance: float = option(
        1e-6, "newton stops where no element is farther from its limit", allowed="a finite number >= 0",
        check=lambda x: 0 <= x < float("inf"),
    )  # fmt: skip
    chebyshev_degree: int = option(60, "degree of chebyshev's polynomial", allowed="an integer >= 1", check=positive)
    eigen_heuristic: str = option(
        "shampoo",
        "eigh: what becomes of small eigenvalues; shampoo: a negative least one is subtracted from all; abs: magnitudes; "
        "abs_add: magnitudes plus root_eps; relu: those below root_eps are left out",
        choices=HEURISTICS,
    )
    momentum: float = option(0.0, "momentum over the preconditioned updates", allowed="a number in [0, 1)", check=fraction)
    nesterov: bool = option(True, "the momentum looks one step ahead")

    def __post_init__(self) -> None:
        """Refuse a division by zero."""
        if self.root_eps == 0 and self.root_method in ("eigh", "auto", "chebyshev"):
            raise OptionError(f"root_eps=0: must be > 0 with root_method={self.root_method}, which divides by it")

    @property
    def root(self) -> InverseRoot:
        """The object that forms the inverse roots."""
        return InverseRoot(
            self.root_method,
            self.root_eps,
            self.root_scaling,
            self.newton_steps,
            self.newton_tolerance,
            self.chebyshev_degree,
            self.eigen_heuristic,
        )


class Blocks:
    """How matrices are cut: into as few rows and columns of blocks as `block_size` allows. The last ones are filled with zeros.

    Args:
        layout: of the whole matrices.
        block_size: most rows and columns of a block.

    Attributes:
        height, width: of a block, h and w.
        down, across: numbers of blocks.
    """

    def __init__(self, layout: Layout, block_size: int):
        self.down, self.across = -(-layout.rows // block_size), -(-layout.cols // block_size)
        self.height, self.width = -(-layout.rows // self.down), -(-layout.cols // self.across)
        self.down, self.across = -(-layout.rows // self.height), -(-layout.cols // self.width)

    def cut(self, x: Tensor) -> Tensor:
        """Give the blocks (n, down, across, height, width) of matrices (n, rows, cols)."""
        below, beside = -x.shape[1] % self.height, -x.shape[2] % self.width
        if below or beside:
            x = torch.nn.functional.pad(x, (0, beside, 0, below))
        return x.view(len(x), -1, self.height, self.across, self.width).transpose(2, 3)

    def joined(self, blocks: Tensor, rows: int, cols: int) -> Tensor:
        """Give the matrices (n, rows, cols) that were cut."""
        return blocks.transpose(2, 3).reshape(len(blocks), -1, self.across * self.width)[:, :rows, :cols]


def specs(layout: Layout, o: Any) -> tuple[Spec, ...]:
    """Declare L, R and their roots, block by block, and both moments."""
    b = Blocks(layout, o.block_size)
    sides = {"left": (b.down, b.across, b.height, b.height), "right": (b.down, b.across, b.width, b.width)}
    momentum = matrix_specs("momentum_buffer", layout, None) if o.momentum else ()
    return (
        *(Spec(name, shape, layout.dtype, rows=0, per=b.height) for name, shape in sides.items()),
        *(Spec(f"{name}_root", shape, layout.dtype, rows=0, per=b.height) for name, shape in sides.items()),
        *matrix_specs("exp_avg", layout, None),
        *matrix_specs("exp_avg_sq", layout, None, values=POSITIVE),
        *momentum,
    )


def update(s: TensorStack, a: Accumulated, t: Tensor, o: Any) -> Tensor:
    """Give u by the equations at the top of the file."""
    b, matrices = Blocks(s.layout, o.block_size), a.rows()
    g = b.cut(matrices)
    added = 1.0 if o.shampoo_beta == 1 else 1 - o.shampoo_beta
    left = (o.shampoo_beta * s.left.read()).add_(g @ g.mT, alpha=added)
    right = (o.shampoo_beta * s.right.read()).add_(g.mT @ g, alpha=added)
    m = s.exp_avg.read().lerp(matrices, 1 - o.beta1)
    v = (o.beta2 * s.exp_avg_sq.read()).addcmul_(matrices, matrices, value=1 - o.beta2)
    roots = s.left_root.read(), s.right_root.read()
    if due := s.interval.due(t, s.turn.absent, o.inverse_root_interval, o.start_preconditioning_step):
        roots = renewed(roots, (left, right), due, o.root)
        s.left_root.write(roots[0])
        s.right_root.write(roots[1])
    for cell, x in zip((s.left, s.right, s.exp_avg, s.exp_avg_sq), (left, right, m, v), strict=True):
        cell.write(x)
    grafted = b.cut(adam(m, v, t, o))
    p = roots[0] @ b.cut(m) @ roots[1]
    p = p * (torch.linalg.matrix_norm(grafted, keepdim=True) / (torch.linalg.matrix_norm(p, keepdim=True) + _TINY))
    if o.start_preconditioning_step > 1:
        p = torch.where(t[..., None, None] < o.start_preconditioning_step, grafted, p)
    p = b.joined(p, *matrices.shape[1:])
    if not o.momentum:
        return p
    buffer = (o.momentum * s.momentum_buffer.read()).add_(p)
    s.momentum_buffer.write(buffer)
    return p.add(buffer, alpha=o.momentum) if o.nesterov else buffer


def renewed(
    roots: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor], due: list[int], root: InverseRoot
) -> tuple[Tensor, Tensor]:
    """Give the roots (n, down, across, b, b) of both sides. Tensors that are `due` get new roots, where these are finite."""
    old = [x[due].flatten(0, 2) for x in roots]
    wanted = [x[due].flatten(0, 2) for x in sums]
    together = wanted[0].shape[1:] == wanted[1].shape[1:]
    new = root(torch.cat(wanted), 4).chunk(2) if together else [root(x, 4) for x in wanted]
    result = []
    for before, x, y in zip(roots, old, new, strict=True):
        y = torch.where(y.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), y, x)
        result.append(before.index_copy(0, torch.tensor(due, device=y.device), y.view(len(due), *before.shape[1:])))
    return result[0], result[1]


def operations(n: int, rows: int, cols: int, o: Any) -> float:
    """Count four products of length rows cols b, 16 operations for each number, and a share of the inverse roots."""
    b = Blocks(Layout(rows, cols, torch.float32), o.block_size)
    count = b.down * b.across
    products = 4.0 * count * b.height * b.width * (b.height + b.width)
    roots = count * (o.root.operations(b.height) + o.root.operations(b.width)) / o.inverse_root_interval
    return n * (products + 16.0 * rows * cols + roots)


class DASH(EngineOptimizer):
    """Shampoo on blocks, with updates of the size of Adam's.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. AdamW trains vectors, and groups with `compress` false.
        lr: learning rate.
        **options: see the signature. `hf-efcp list --options` has the meaning and range of each.
    """

    options_type = DASHOptions
    measured = MappingProxyType({"block_size": 256, "root_method": "auto"})
    method = Tensorwise(Rule(specs, update, operations=operations, decomposes=True), ADAMW)
