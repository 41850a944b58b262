"""Coefficients against a d x d solve, healthy and not."""

import pytest
import torch

from hf_efcp.core.coefficients import cancellation, ggt, mfac, quadratic, weights


def gram_of(rows):
    return (rows @ rows.mT)[None]


@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-9])
def test_mfac_is_the_inverse_of_the_damped_fisher(damping):
    g = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = weights(gram_of(g), torch.arange(6), 0.0)
    c = mfac(gram_of(g), w, damping, 6, torch.float64)
    fisher = damping * torch.eye(40, dtype=torch.float64) + g.T @ g / 6
    torch.testing.assert_close(g.T @ c[0], torch.linalg.solve(fisher, g[0]), rtol=1e-6, atol=1e-9 / damping * 1e-6)


def test_duplicate_rows_have_no_null_space_part():
    g = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g[3] = g[0]
    w = weights(gram_of(g), torch.arange(6), 0.0)
    c = mfac(gram_of(g), w, 1e-9, 6, torch.float32)
    assert c[0, 0] == pytest.approx(c[0, 3].item(), rel=1e-6)  # the row counts once, shared by its two copies
    assert cancellation(gram_of(g), c) < 10


def test_zero_rows_get_no_weight_and_one_bad_matrix_does_not_disturb_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    good, bad = (torch.randn(4, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    good[2:] = 0
    bad[1] = bad[0]
    gram = torch.cat([gram_of(good), gram_of(bad), torch.zeros(1, 4, 4, dtype=torch.float64)])
    w = weights(gram, torch.arange(4), 0.5)
    assert torch.equal(w[0], torch.tensor([0.5, 0.25, 0, 0], dtype=torch.float64)) and not w[2].any()
    c = mfac(gram, w, 1e-9, 4, torch.float32)
    assert c.isfinite().all() and not c[2].any()
    torch.testing.assert_close(c[:1], mfac(gram[:1], w[:1], 1e-9, 4, torch.float32))


def test_norm_of_the_update_is_free():
    g = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = torch.randn(1, 6, dtype=torch.float64)
    torch.testing.assert_close(quadratic(gram_of(g), c).sqrt()[0], (g.T @ c[0]).norm())


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("m, d", [(16, 4), (32, 20)])
def test_centered_ggt_of_dependent_entries_has_no_null_space_part(m, d, eps):
    """More entries than coordinates: they depend on each other."""
    g = torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, decay, filled = torch.eye(m, dtype=torch.float64)[:1], torch.ones(m, dtype=torch.float64), torch.ones(m).bool()
    c = ggt(gram_of(g), w, decay, eps, torch.float32, filled)
    s, v = torch.linalg.eigh((g - g.mean(0)).T @ (g - g.mean(0)))
    expected = v @ (v.T @ g[0] / (s.clamp_min(0).sqrt() + eps))
    assert cancellation(gram_of(g), c) < 10
    torch.testing.assert_close((c[0].float() @ g.float()).double(), expected, rtol=0, atol=1e-5 * float(expected.norm()))


def test_centered_coefficients_of_an_empty_window_are_zero():
    """On a GPU a refused first step goes on with masks."""
    gram, w, decay = (torch.zeros(shape, dtype=torch.float64) for shape in ((1, 4, 4), (1, 4), (4,)))
    empty = torch.zeros(4).bool()
    assert not ggt(gram, w, decay, 0.0, torch.float32, empty).any()
    assert not mfac(gram, w, 1e-3, 1, torch.float32, empty).any()
