"""Capacity: the number in (0, 1] by which a format multiplies a model's parameters (arXiv 2506.01863, Llama and OLMo fits).

    loss(N, D, R) = A (N rho(R))^-alpha + B D^-beta + E
    rho(R) = L tanh(F log_{1/4} GMSE(R))^C        GMSE(R) = E (x - R(x))^2 of x ~ N(0, 1), R with its own best scale

The law was fitted to weights and activations that a model computes with. For optimizer states it is an extrapolation.
All numbers are fp64. An integral has no error but rounding. A sampled number comes with its standard error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

_NORMAL = NormalDist()
# GMSE is kept between this and 1. Below it all formats count as equal.
LEAST_GMSE = 1e-12


@dataclasses.dataclass(frozen=True)
class Fit:
    """Constants of the law, as published. Their errors are large (L = 1.0 +- 0.7): only ratios of capacities mean something."""

    L: float
    F: float
    C: float


FITS = {"llama": Fit(1.0, 0.41, 1.39), "olmo2": Fit(0.84, 0.37, 1.24)}


@dataclasses.dataclass(frozen=True)
class Gmse:
    """The mean squared error of a format on standard normal numbers.

    Attributes:
        value: the mean.
        error: its standard error; 0 where the mean was integrated.
    """

    value: float
    error: float = 0.0


def effective_bits(gmse: float) -> float:
    """Give log_{1/4} GMSE: the bits for each number of an ideal code with this error; 0 where zeros have no larger error."""
    return max(0.0, -math.log(min(1.0, max(gmse, LEAST_GMSE))) / math.log(4))


def capacity(gmse: float, fit: Fit = FITS["llama"]) -> float:
    """Give rho of a GMSE: 0 where the GMSE is 1 or more (a scale that does not fit), L in the limit of 0."""
    return fit.L * math.tanh(fit.F * effective_bits(gmse)) ** fit.C


def composed(capacities: Sequence[float]) -> float:
    """Give the capacity of formats one after the other, such as sparse and then quantized: the product of their capacities.

    The paper finds the product right to 1e-3 ... 1e-2, but wrong at 2 bits.
    """
    return math.prod(capacities)


# Sparse ----------------------------------------------------------------------------------------------------------------------


def sparse(sparsity: float) -> Gmse:
    """Give the GMSE where the smallest numbers, a share s of all, are zero: s - 2 t phi(t), t = Phi^-1((1 + s) / 2)."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity}: must be from 0 to 1")
    if sparsity in (0, 1):
        return Gmse(float(sparsity))
    threshold = _NORMAL.inv_cdf((1 + sparsity) / 2)
    return Gmse(sparsity - 2 * threshold * _NORMAL.pdf(threshold))


def n_of_m(n: int, m: int) -> Gmse:
    """Give the GMSE where the n largest of every m numbers are kept: the others' mean square, by densities of ordered numbers."""
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m}: 1 <= n <= m is needed")
    x = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    below = torch.erf(x / math.sqrt(2))  # the share of numbers whose magnitude is below x
    density = math.sqrt(2 / math.pi) * torch.exp(-x * x / 2)
    lost = torch.zeros_like(x)
    for k in range(1, m - n + 1):  # the k-th smallest
        lost += m * math.comb(m - 1, k - 1) * below ** (k - 1) * (1 - below) ** (m - k) * density
    return Gmse(float(torch.trapezoid(x * x * lost, x)) / m)


# Quantized -------------------------------------------------------------------------------------------------------------------


def code(levels: Tensor) -> Gmse:
    """Give the GMSE where every number becomes the nearest of `levels`, (n,), integrated cell by cell."""
    c = levels.double().sort().values
    edges = torch.cat([c.new_tensor([-torch.inf]), (c[1:] + c[:-1]) / 2, c.new_tensor([torch.inf])])
    finite = edges.clamp(-40, 40)
    phi = torch.exp(-finite * finite / 2) / math.sqrt(2 * math.pi)
    cdf = 0.5 * (1 + torch.erf(finite / math.sqrt(2)))
    mass = cdf.diff()
    first = -phi.diff()
    second = mass - (finite * phi).diff()
    return Gmse(max(0.0, float((second - 2 * c * first + c * c * mass).sum())))


def scaled_code(levels: Tensor) -> Gmse:
    """Give the GMSE of `code` at the scale of `levels` with the least error."""
    return code(at_best_scale(levels))


def at_best_scale(levels: Tensor) -> Tensor:
    """Give `levels`, (n,), at the scale with the least error of `code`, found by golden-section search; fp64."""
    levels = levels.double() / levels.double().abs().max()

    def error(log_scale: float) -> float:
        return code(levels * math.exp(log_scale)).value

    grid = [i * 0.05 for i in range(-40, 161)]
    best = min(grid, key=error)
    low, high, golden = best - 0.05, best + 0.05, (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return levels * math.exp((low + high) / 2)


def uniform(bits: int) -> Gmse:
    """Give the GMSE of 2^bits equally spaced levels around zero, at the best spacing."""
    if not 1 <= bits <= 12:
        raise ValueError(f"bits={bits}: must be an integer from 1 to 12")
    return scaled_code(torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2)


def ideal(bits: float) -> Gmse:
    """Give the least error of any code with this many bits for each number: 4^-bits."""
    return Gmse(4.0**-bits)


# Sampled ---------------------------------------------------------------------------------------------------------------------


def sampled(round_trip: Callable[[Tensor], Tensor], cols: int, samples: int = 1_000_000, seed: int = 0) -> Gmse:
    """Give the error of any format, measured on standard normal numbers.

    Args:
        round_trip: numbers (rows, cols) fp64 -> the decoded numbers; rows must not depend on each other.
        cols: numbers in a row.
        samples: about this many numbers are drawn; at least two rows.
        seed: of the numbers.
    """
    x = torch.randn(max(2, samples // cols), cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    errors = (x - round_trip(x)).square().mean(1)
    return Gmse(float(errors.mean()), float(errors.std() / math.sqrt(len(errors))))


def min_max(bits: int, block: int, samples: int = 1_000_000, seed: int = 0) -> Gmse:
    """Give the GMSE of 2^bits equally spaced levels from the least to the largest number of every block, which are both exact."""

    def round_trip(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        unit = (high - low) / (2**bits - 1)
        return ((x - low) / unit).round() * unit + low

    return sampled(round_trip, block, samples, seed)


def abs_max(levels: Tensor, block: int, samples: int = 1_000_000, seed: int = 0) -> Gmse:
    """Give the GMSE of the nearest of `levels` times the largest magnitude of every block; the largest level is 1."""
    levels = levels.double().sort().values
    edges = (levels[1:] + levels[:-1]) / 2

    def round_trip(x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True)
        return levels[torch.bucketize(x / scale, edges)] * scale

    return sampled(round_trip, block, samples, seed)


def vectors(dim: int, bits: float, samples: int = 100_000, seed: int = 0, rounds: int = 20) -> Gmse:
    """Give the GMSE where `dim` numbers become the nearest of 2^(dim * bits) vectors, learned by Lloyd's rule on other samples.

    The codebook is a local optimum: the best one may have a smaller error.
    """
    count = round(2 ** (dim * bits))
    if dim < 1 or not 2 <= count <= 4096:
        raise ValueError(f"dim={dim}, bits={bits}: 2 to 4096 vectors are allowed, these are {count}")
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(max(20 * count, 5000), dim, dtype=torch.float64, generator=generator)
    book = x[:count].clone()
    for _ in range(rounds):
        nearest = _nearest(x, book)
        sums = torch.zeros_like(book).index_add_(0, nearest, x)
        counts = torch.bincount(nearest, minlength=count).double()
        book = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], book)
    return sampled(lambda y: book[_nearest(y, book)], dim, samples, seed)


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    half = book.square().sum(1) / 2
    return torch.cat([(half - part @ book.T).argmin(1) for part in x.split(8192)])


# Low rank --------------------------------------------------------------------------------------------------------------------


def low_rank(rank: int, rows: int, cols: int) -> Gmse:
    """Give the GMSE of a rank's best approximation of a large matrix of normal numbers, by the Marchenko-Pastur law.

    The law is exact for infinite sizes. For sides of 100 it is off by about 0.002.
    """
    short, long = min(rows, cols), max(rows, cols)
    if not 0 <= rank <= short:
        raise ValueError(f"rank={rank}: must be from 0 to {short}, the shorter side")
    ratio = short / long
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # eigenvalue = low + width cos(t / 2)^2: the ends of the density become smooth. t = 0 is the largest eigenvalue.
    t = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    down, width = torch.cos(t / 2).square(), high - low
    value = low + width * down
    density = width**2 * down * torch.sin(t / 2).square() / (2 * math.pi * ratio * value)
    count = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density, t)])
    energy = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density * value, t)])
    place = min(int(torch.searchsorted(count / count[-1], rank / short)), len(t) - 1)
    return Gmse(max(0.0, float(1 - energy[place] / energy[-1])))
