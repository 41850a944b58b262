"""x^(-1/p) of stacks of symmetric positive semidefinite matrices, p = 2 or 4: by eigenvectors, or by products alone.

    newton      coupled Newton:            N = (1 + 1/p) I - M/p,  Y <- Y N,  M <- N^p M;  Y -> x^(-1/p)
    newton_db   Newton-Denman-Beavers:     E = 3/2 I - Z Y / 2,    Y <- Y E,  Z <- E Z;    Z -> x^(-1/2), twice for p = 4
    chebyshev   a polynomial of s = 2 x - I that is (1 + s)/2 + eps to the power -1/p, by Clenshaw's recursion

These three need eigenvalues near 1, so x is divided by a scale. Each has a limit for the largest eigenvalue (`LIMITS`). If the
bound |x^4|^(1/4) of the largest eigenvalue is not below the limit, the scale is |x|. A stack's matrices do not affect each other.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from .deferred import readable
from .random import counted_noise

# Limits of the largest eigenvalue, divided by the scale: the recursions converge below, or the polynomial is right.
LIMITS = {"newton": 2.0, "newton_db": 3.0, "chebyshev": 1.0}
METHODS = ("eigh", *LIMITS, "auto")
SCALINGS = ("power_iteration", "power_iteration_multi", "frobenius")
HEURISTICS = ("shampoo", "abs", "abs_add", "relu")
# The power iteration's steps; its number of starts with power_iteration_multi.
_STEPS, _STARTS = 10, 16
# The most eigendecompositions in a call on a GPU, where each takes workspace: 0.3 MiB for 8 x 8, 1 MiB for 512 x 512.
_AT_ONCE = 512
# Added to the eigenvalues of a matrix of norm 1, because a power iteration of a zero matrix is impossible.
_SHIFT = 1e-6
# Points at which a function is read for its Chebyshev coefficients.
_NODES = 10_000


@dataclasses.dataclass(frozen=True)
class InverseRoot:
    """Forms x^(-1/p).

    Args:
        method: one of METHODS. auto is newton on a GPU, which takes eigendecompositions one after the other, and eigh elsewhere.
        eps: added to the eigenvalues; for chebyshev, a share of the scale.
        scaling: one of SCALINGS, the number by which x is divided. eigh needs none.
        steps: of newton and newton_db.
        tolerance: newton stops for a matrix if no element of M is farther from I than this.
        degree: of chebyshev's polynomial.
        heuristic: one of HEURISTICS, which says what eigh does with small and negative eigenvalues.
    """

    method: str = "eigh"
    eps: float = 1e-10
    scaling: str = "power_iteration"
    steps: int = 10
    tolerance: float = 1e-6
    degree: int = 60
    heuristic: str = "shampoo"

    def __call__(self, x: Tensor, p: int) -> Tensor:
        """Give x^(-1/p), (k, n, n), for symmetric x (k, n, n), p = 2 or 4."""
        method = self.on(x.device)
        if method == "eigh":
            return spectral(x, p, self.eps, self.heuristic)
        polynomial = method == "chebyshev"
        shifted = x if polynomial else _shifted(x, self.eps)
        scale = safe_scale(shifted, scale_of(x, self.scaling), LIMITS[method])
        y = shifted / scale
        if polynomial:
            root = chebyshev(y, p, self.eps, self.degree)
        elif method == "newton":
            root = newton(y, p, self.steps, self.tolerance)
        else:
            root = newton_db(y, p, self.steps)
        return root * scale ** (-1 / p)

    def on(self, device: torch.device) -> str:
        """Give the method for a device."""
        if self.method != "auto":
            return self.method
        return "eigh" if readable(device) else "newton"

    def operations(self, n: int) -> float:
        """Count the operations for one matrix, p = 4. A product has 2 n^3 operations, and an eigendecomposition about 9 n^3.

        For auto, those of eigh are counted, which has fewer: a roofline is the least that is needed.
        """
        if self.method in ("eigh", "auto"):
            return 11.0 * n**3
        products = {"newton": 4 * self.steps, "newton_db": 6 * self.steps - 4, "chebyshev": self.degree}[self.method]
        return 2.0 * n**3 * (products + 2)  # the bound takes two products


def spectral(x: Tensor, p: int, eps: float, heuristic: str = "shampoo") -> Tensor:
    """Give x^(-1/p) by eigenvectors.

    Args:
        x: (k, n, n), symmetric.
        p: of the root.
        eps: added to x.
        heuristic: what an eigenvalue l of x + eps I becomes. shampoo: l + eps - min(least l, 0). abs: |l - eps|.
            abs_add: |l - eps| + eps. relu: l - eps; where that is below eps, the result has eigenvalue 0 (a pseudo-inverse).
    """
    x = _shifted(x, eps)
    if not readable(x.device) and len(x) > _AT_ONCE:
        return torch.cat([_spectral(part, p, eps, heuristic) for part in x.split(_AT_ONCE)])
    return _spectral(x, p, eps, heuristic)


def _spectral(x: Tensor, p: int, eps: float, heuristic: str) -> Tensor:
    """Do the work of `spectral`, for x to which eps I was added."""
    try:
        values, vectors = torch.linalg.eigh(x)
    except torch.linalg.LinAlgError:  # fp32 may be too few digits for the library's iteration
        values, vectors = (t.to(x.dtype) for t in torch.linalg.eigh(x.double()))
    if heuristic == "shampoo":
        values = values + (eps - values[..., :1].clamp_max(0.0))
    elif heuristic == "relu":
        values = torch.where(values - eps < eps, torch.inf, values - eps)
    else:
        values = (values - eps).abs() + (eps if heuristic == "abs_add" else 0.0)
    return (vectors * values.clamp_min(torch.finfo(x.dtype).tiny).pow(-1 / p)[..., None, :]) @ vectors.mT


def newton(x: Tensor, p: int, steps: int, tolerance: float) -> Tensor:
    """Give x^(-1/p) by the coupled Newton iteration, for eigenvalues below 2. For those far below 1, the root is too small.

    Args:
        x: (k, n, n), symmetric.
        p: 2 or 4.
        steps: of the recursion.
        tolerance: the iteration stops for a matrix whose M is this near to I in all elements.
    """
    one, z = _identity(x), (p + 1) / 2
    y, m = z ** (1 / p) * one.expand_as(x), z * x
    for _ in range(steps):
        far = (m - one).abs().amax((-2, -1), keepdim=True) >= tolerance
        if readable(x.device) and not far.any():
            break
        factor = (1 + 1 / p) * one - m / p
        power = factor @ factor if p == 2 else torch.linalg.matrix_power(factor, p)
        y, m = torch.where(far, y @ factor, y), torch.where(far, power @ m, m)
    return y


def newton_db(x: Tensor, p: int, steps: int) -> Tensor:
    """Give x^(-1/p) by the product form of Newton, Denman and Beavers, for eigenvalues below 3. p = 4 takes it twice."""
    root, inverse = _denman_beavers(x, steps)
    return inverse if p == 2 else _denman_beavers(root, steps)[1]


def _denman_beavers(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Give x^(1/2) and x^(-1/2)."""
    one = _identity(x)
    e = 1.5 * one - 0.5 * x
    y, z = x @ e, e
    for _ in range(steps - 1):
        e = 1.5 * one - 0.5 * (z @ y)
        y, z = y @ e, e @ z
    return y, z


def chebyshev(x: Tensor, p: int, eps: float, degree: int) -> Tensor:
    """Give (x + eps I)^(-1/p) by Chebyshev's polynomial of `degree`, for eigenvalues from 0 to 1."""
    one, coefficients = _identity(x), chebyshev_coefficients(p, eps, degree)
    s = 2 * x - one
    newer, older = torch.zeros_like(x), torch.zeros_like(x)
    for c in coefficients[:0:-1]:
        newer, older = c * one + 2 * (s @ newer) - older, newer
    return coefficients[0] * one + s @ newer - older


@functools.lru_cache(maxsize=64)
def chebyshev_coefficients(p: int, eps: float, degree: int) -> tuple[float, ...]:
    """Give c_0 ... c_degree of ((1 + s)/2 + eps)^(-1/p) on [-1, 1]. c_0 is halved already."""
    angles = (torch.arange(_NODES, dtype=torch.float64) + 0.5) * (math.pi / _NODES)
    values = ((1 + angles.cos()) / 2 + eps) ** (-1 / p)
    c = [2 / _NODES * float((values * (k * angles).cos()).sum()) for k in range(degree + 1)]
    return c[0] / 2, *c[1:]


def scale_of(x: Tensor, scaling: str) -> Tensor:
    """Give the divisor of each matrix, (k, 1, 1): |x|, or an estimate of the largest eigenvalue by power iteration; 1 for zeros.

    With one start it is twice the Rayleigh quotient, which is a lower bound. With several starts it is the largest quotient. The
    starts are the same for every matrix of a size, so that the result does not depend on the rest of the stack.
    """
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    if scaling == "frobenius":
        return norm
    n, starts = x.shape[-1], _STARTS if scaling == "power_iteration_multi" else 1
    y = _shifted(x / norm, _SHIFT)
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    v = counted_noise(zero, zero[None], starts, n)[0].mT.to(x.dtype)
    for _ in range(_STEPS):
        v = torch.nn.functional.normalize(y @ v, dim=-2)
    quotient = (v * (y @ v)).sum(-2, keepdim=True).amax(-1, keepdim=True)
    return norm * quotient * (2.0 if starts == 1 else 1.0)


def safe_scale(x: Tensor, scale: Tensor, limit: float) -> Tensor:
    """Give `scale`, (k, 1, 1); or |x|, unless the largest eigenvalue of x is certainly below limit * scale."""
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    y = x / norm
    square = y @ y
    bound = norm * torch.linalg.matrix_norm(square @ square, keepdim=True) ** 0.25
    return torch.where(bound < limit * scale, scale, norm)


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _shifted(x: Tensor, eps: float) -> Tensor:
    """Give x + eps I."""
    return x + eps * _identity(x)
