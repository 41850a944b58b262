"""Capacity: integrals against samples, the paper's boundaries, a table of values, what each format costs."""

import math

import pytest
import torch

from hf_efcp.core import capacity as c
from hf_efcp.core.capacity import FITS, capacity, effective_bits

# Format, GMSE, capacity: computed from the published fit of Llama, not published.
TABLE = [
    *[("sparse", s, gmse, rho) for s, gmse, rho in (
        (0.25, 0.0083, 0.849), (0.5, 0.0713, 0.553), (0.75, 0.2764, 0.244), (0.9, 0.5607, 0.085), (0.95, 0.7209, 0.039),
        (0.99, 0.9155, 0.006))],
    *[("uniform", b, gmse, rho) for b, gmse, rho in (
        (1, 0.3633, 0.180), (2, 0.1190, 0.444), (3, 0.0376, 0.669), (4, 0.0116, 0.819), (5, 0.0035, 0.906), (6, 0.0010, 0.953),
        (8, 9e-5, 0.989))],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "gmse", "rho"), TABLE)
def test_the_table(kind, value, gmse, rho):
    found = getattr(c, kind)(value)
    assert found.error == 0
    assert found.value == pytest.approx(gmse, abs=2e-4)
    assert capacity(found.value) == pytest.approx(rho, abs=1e-3)


def test_2_of_4():
    assert c.n_of_m(2, 4).value == pytest.approx(0.1325, abs=1e-4)
    assert capacity(c.n_of_m(2, 4).value) == pytest.approx(0.420, abs=5e-4)


def normal(rows, cols, seed=9):
    return torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_a_threshold_against_samples(sparsity):
    x = normal(1, 1_000_000)[0]
    threshold = x.abs().kthvalue(round(sparsity * len(x))).values
    lost = x[x.abs() <= threshold].square().sum() / x.square().sum()
    assert c.sparse(sparsity).value == pytest.approx(float(lost), abs=1e-3)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (3, 5), (4, 4)])
def test_n_of_m_against_samples(n, m):
    x = normal(250_000, m)
    lost = x.abs().sort(1).values[:, : m - n].square().sum(1) / m
    assert c.n_of_m(n, m).value == pytest.approx(float(lost.mean()), abs=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniform_codes_against_samples_and_other_scales(bits):
    best = c.uniform(bits).value
    levels = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    x = normal(1, 200_000)[0]
    x = x / x.square().mean().sqrt()
    errors = []
    for step in torch.linspace(0.05, 2.2, 23):
        edges = (levels[1:] + levels[:-1]) / 2 * step
        sampled = float((x - levels[torch.bucketize(x, edges)] * step).square().mean())
        assert c.code(levels * step).value == pytest.approx(sampled, abs=4e-3 * max(1, sampled))
        errors.append(sampled)
    assert best <= min(errors) + 1e-3 and best == pytest.approx(min(errors), abs=3e-3)


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    assert c.uniform(1).value == pytest.approx(1 - 2 / math.pi, abs=1e-9)


def test_ends():
    assert capacity(0) == pytest.approx(1, abs=1e-6)  # nothing is lost
    assert capacity(1) == 0 and capacity(1.7) == 0  # all is lost, or a scale that does not fit
    assert c.sparse(1).value == 1 and c.sparse(0).value == 0
    assert capacity(0, FITS["olmo2"]) == pytest.approx(0.84, abs=1e-6)
    assert [effective_bits(c.ideal(b).value) for b in (1, 2.5, 8)] == pytest.approx([1, 2.5, 8], abs=1e-12)
    assert capacity(c.ideal(4).value) == pytest.approx(0.901, abs=1e-3)


def test_more_bits_are_worth_more_and_more_zeros_less():
    bits = [capacity(c.uniform(b).value) for b in range(1, 9)]
    zeros = [capacity(c.sparse(s / 20).value) for s in range(21)]
    assert bits == sorted(bits) and zeros == sorted(zeros, reverse=True) and len({*bits, *zeros}) == 29


def test_capacities_multiply():
    assert c.composed([0.5, 0.8, 0.9]) == pytest.approx(0.36) and c.composed([]) == 1


@pytest.mark.parametrize(("block", "gmse"), [(32, 0.0061), (64, 0.0080), (256, 0.0119), (4096, 0.0196), (100_000, 0.0285)])
def test_four_bits_between_least_and_largest(block, gmse):
    found = c.min_max(4, block)
    assert found.value == pytest.approx(gmse, abs=max(1e-4, 3 * found.error))
    assert 0 < found.error < 0.03 * found.value or block > 10_000


def test_the_stated_error_is_that_of_repeated_samples():
    values = torch.tensor([c.min_max(4, 64, samples=20_000, seed=s).value for s in range(60)], dtype=torch.float64)
    stated = c.min_max(4, 64, samples=20_000).error
    assert float(values.std()) == pytest.approx(stated, rel=0.35)


def test_learned_vectors():
    """One number is the best scalar code (Max 1960); two numbers are better than one, and no code beats the ideal one."""
    scalar = c.vectors(1, 2, samples=50_000)
    assert scalar.value == pytest.approx(0.1175, abs=4 * scalar.error + 2e-3)
    plane = c.vectors(2, 2, samples=50_000)
    assert c.ideal(2).value < plane.value < scalar.value - 2e-3


@pytest.mark.parametrize(("rows", "cols", "rank"), [(96, 128, 4), (128, 96, 40), (100, 100, 10)])
def test_low_rank_against_singular_values(rows, cols, rank):
    squares = torch.linalg.svdvals(normal(10 * rows, cols).view(10, rows, cols)).square()
    lost = 1 - (squares[:, :rank].sum(1) / squares.sum(1)).mean()
    assert c.low_rank(rank, rows, cols).value == pytest.approx(float(lost), abs=4e-3)
    assert c.low_rank(96, 96, 128).value == pytest.approx(0, abs=1e-9) and c.low_rank(0, 9, 5).value == 1


@pytest.mark.parametrize(
    "call",
    [lambda: c.sparse(1.5), lambda: c.n_of_m(5, 4), lambda: c.uniform(0), lambda: c.low_rank(9, 8, 8), lambda: c.vectors(8, 2)],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match=r"must be|needed|allowed"):
        call()
