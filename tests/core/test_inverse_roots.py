"""Inverse roots of stacks against eigenvectors, and the recursions of single eigenvalues."""

import pytest
import torch

from hf_efcp.core import inverse_roots
from hf_efcp.core.inverse_roots import (
    LIMITS,
    InverseRoot,
    chebyshev_coefficients,
    newton,
    newton_db,
    safe_scale,
    scale_of,
    spectral,
)
from hf_efcp.kernels.devices import pretending

EASY = (1.0, 0.6, 0.3, 0.1, 0.05, 0.01)
STEEP = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)


def with_spectrum(values, count=3, dtype=torch.float64):
    """Matrices with these eigenvalues in random directions, and the directions."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(count, len(values), len(values), generator=generator, dtype=torch.float64))[0]
    x = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.mT
    return ((x + x.mT) / 2).to(dtype), q


def eigenvalues_of(result, q):
    """The diagonal of q^T result q, and what is beside it."""
    inner = q.mT @ result.double() @ q
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    return diagonal, (inner - torch.diag_embed(diagonal)).abs().max()


def newton_of_one(x, p, steps):
    z = (p + 1) / 2
    y, m = z ** (1 / p), z * x
    for _ in range(steps):
        factor = (1 + 1 / p) - m / p
        y, m = y * factor, factor**p * m
    return y


def newton_db_of_one(x, p, steps):
    def roots(x):
        e = 1.5 - 0.5 * x
        y, z = x * e, e
        for _ in range(steps - 1):
            e = 1.5 - 0.5 * z * y
            y, z = y * e, e * z
        return y, z

    root, inverse = roots(x)
    return inverse if p == 2 else roots(root)[1]


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("heuristic", ["shampoo", "abs", "abs_add", "relu"])
def test_eigenvectors_give_the_root(p, heuristic):
    eps = 1e-10
    x, q = with_spectrum(STEEP)
    expected = torch.tensor(STEEP, dtype=torch.float64)
    expected = {"shampoo": expected + 2 * eps, "abs": expected, "abs_add": expected + eps, "relu": expected}[heuristic] ** (
        -1 / p
    )
    found, beside = eigenvalues_of(spectral(x, p, eps, heuristic), q)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-7, atol=0)
    assert beside < 1e-7 * expected.max()


def test_negative_and_missing_eigenvalues():
    x, q = with_spectrum((1.0, 0.25, -0.04))
    eps = 1e-6
    for heuristic, least in (("shampoo", (2 * eps - 0.04 + 0.04 - eps) ** -0.5), ("abs", 5.0), ("relu", 0.0)):
        found, _ = eigenvalues_of(spectral(x, 2, eps, heuristic), q)
        torch.testing.assert_close(found[:, 2], torch.full((3,), least, dtype=torch.float64), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1, 2, 10])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(
    ("recursion", "of_one"), [(newton, newton_of_one), (newton_db, newton_db_of_one)], ids=["newton", "newton_db"]
)
def test_ten_steps_are_those_of_each_eigenvalue(recursion, of_one, p, scale):
    x, q = with_spectrum(STEEP)
    found, _ = eigenvalues_of(recursion(x / scale, p, 10, *((0.0,) if recursion is newton else ())), q)
    expected = torch.tensor([of_one(value / scale, p, 10) for value in STEEP], dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-7, atol=0)


def test_the_published_errors_of_one_eigenvalue():
    """What ten steps leave, in fractions: the specification's table."""
    for value, newton_error, db_error in ((1e-2, 0, 0), (1e-4, -0.05, 0.37), (1e-6, -0.63, 0.74), (1e-8, -0.88, -0.42)):
        assert newton_of_one(value, 4, 10) * value**0.25 - 1 == pytest.approx(newton_error, abs=6e-3)
        assert newton_db_of_one(value, 4, 10) * value**0.25 - 1 == pytest.approx(db_error, abs=6e-3)


@pytest.mark.parametrize("method", ["newton", "newton_db", "chebyshev"])
@pytest.mark.parametrize("scaling", ["power_iteration", "power_iteration_multi", "frobenius"])
@pytest.mark.parametrize("p", [2, 4])
def test_an_easy_spectrum_is_that_of_eigenvectors(method, scaling, p):
    eps = 1e-3 if method == "chebyshev" else 1e-12
    x = 7e-5 * with_spectrum(EASY)[0]
    root = InverseRoot(method, eps=eps, scaling=scaling, steps=14)
    shift = eps * safe_scale(x, scale_of(x, scaling), LIMITS[method]) if method == "chebyshev" else 0
    expected = spectral(x + shift * torch.eye(len(EASY), dtype=torch.float64), p, 1e-30)
    assert (root(x, p) - expected).norm() < ({2: 1e-2, 4: 3.2e-3}[p] if method == "chebyshev" else 1e-6) * expected.norm()


def test_chebyshev_s_coefficients_give_the_function():
    s = torch.linspace(-1, 1, 101, dtype=torch.float64)
    c = chebyshev_coefficients(4, 1e-3, 60)
    found = sum(x * torch.special.chebyshev_polynomial_t(s, k) for k, x in enumerate(c))
    expected = ((1 + s) / 2 + 1e-3) ** -0.25
    assert ((found - expected).abs() / expected).max() < 3.2e-3


@pytest.mark.parametrize("method", ["eigh", "newton", "newton_db", "chebyshev"])
def test_a_matrix_does_not_see_the_others(method):
    x = torch.cat([with_spectrum(EASY)[0], 1e6 * with_spectrum(EASY[::-1])[0], torch.zeros(1, len(EASY), len(EASY))]).float()
    root = InverseRoot(method, eps=1e-6)
    together = root(x, 4)
    assert together.isfinite().all()
    for one, all_ in zip(x, together, strict=True):
        torch.testing.assert_close(root(one[None], 4)[0], all_, rtol=1e-4, atol=1e-5)


def test_a_scale_that_is_too_small_gives_way_to_the_norm():
    x, _ = with_spectrum(EASY)
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    for limit in LIMITS.values():
        assert torch.equal(safe_scale(x, torch.full_like(norm, 0.9 / limit), limit), norm)
        kept = torch.full_like(norm, 2 / limit)
        assert torch.equal(safe_scale(x, kept, limit), kept)


def test_the_power_iteration_finds_the_largest_eigenvalue():
    x, _ = with_spectrum(STEEP)
    torch.testing.assert_close(scale_of(x, "power_iteration"), torch.full((3, 1, 1), 2.0, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(scale_of(x, "power_iteration_multi"), torch.ones(3, 1, 1, dtype=torch.float64), rtol=1e-3, atol=0)
    assert torch.equal(scale_of(torch.zeros(2, 3, 3), "power_iteration") > 0, torch.ones(2, 1, 1, dtype=torch.bool))


def test_auto_is_newton_where_eigendecompositions_are_slow():
    a = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = a @ a.mT
    root = InverseRoot("auto", eps=1e-8)
    assert torch.equal(root(x, 4), InverseRoot("eigh", eps=1e-8)(x, 4))
    with pretending("cuda"):
        assert torch.equal(root(x, 4), InverseRoot("newton", eps=1e-8)(x, 4))


def test_on_a_gpu_many_matrices_are_decomposed_in_parts(monkeypatch):
    a = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, sizes, eigh = a @ a.mT, [], torch.linalg.eigh
    whole = spectral(x, 4, 1e-8)
    monkeypatch.setattr(inverse_roots, "_AT_ONCE", 3)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (sizes.append(len(x)), eigh(x))[1])
    with pretending("cuda"):
        torch.testing.assert_close(spectral(x, 4, 1e-8), whole, rtol=1e-12, atol=1e-12)
    assert sizes == [3, 3, 1]
