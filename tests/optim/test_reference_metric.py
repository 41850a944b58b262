"""The slow reference of the metric against what it must be: the paper's reference, the m x m form, torch's Adam."""

import pytest
import torch
from torch.nn import Parameter

from tests.optim.helpers import clones
from tests.optim.metric_runs import MFAC_OPTIONS, SHAPES, M, gradients_at, options_of
from tests.reference import parameters, relative
from tests.reference_metric import MetricReference, matrix
from tests.reference_optimizer import ReferenceOptimizer

FAMILIES = pytest.mark.parametrize("family", ["mfac", "ggt"])


def run(optimizer, steps=3 * M):
    for t in range(steps):
        gradients_at(t, optimizer.params)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in optimizer.params])


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("compression", ["dense", "sparse", "low rank"])
@FAMILIES
def test_without_a_metric_it_is_the_reference_of_the_paper(family, compression, scope):
    given = {"window_momentum": 0.8, "update_rms": 0.3, "weight_decay": 0.1, "momentum": 0.7, "scope": scope}
    options = options_of(family, metric="none", **given)
    a, b = (run(kind(parameters(SHAPES), family, compression, **options)) for kind in (MetricReference, ReferenceOptimizer))
    assert relative(a, b) < 1e-9


@pytest.mark.parametrize("given", MFAC_OPTIONS, ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_the_form_with_the_gram_matrix_is_the_same(given, centered):
    """c = (lambda I + M K / N)^-1 w gives G^T c."""
    options = options_of("mfac", **{"window_momentum": 0.8, **given, "centered": centered})
    reference = MetricReference(parameters(SHAPES), "mfac", "dense", **options)
    o = reference.o
    for steps in (2, M, M + 3):
        run(reference, steps)
        G = torch.stack(reference.entries)
        n, K, w, one = len(G), G @ G.T, reference.weights(G), torch.eye(len(G), dtype=G.dtype)
        centre = one - 1 / n if centered else one
        damping = o.damping * (K.trace() / n if o.damping_mode == "relative" else 1)
        N = n if centered or o.divisor == "filled" else o.window_size
        c = torch.linalg.solve(damping * one + centre @ K / N, w)
        assert relative(reference.solve(G, G.T @ w), G.T @ c) < 1e-10


def test_ggt_centred_in_the_gram_matrix():
    """c = phi(0) w + V diag(psi) V^T M K w,  M K M = V diag(s) V^T,  psi = (phi(s) - phi(0)) / s,  psi(0) = 0."""
    reference = MetricReference(parameters(SHAPES), "ggt", "dense", **options_of("ggt", window_momentum=0.8, centered=True))
    run(reference)
    G = torch.stack(reference.entries)
    centre = torch.eye(len(G), dtype=G.dtype) - 1 / len(G)
    K, w, phi0 = G @ G.T, reference.weights(G), 1 / reference.o.eps
    s, V = torch.linalg.eigh(centre @ K @ centre)
    psi = torch.where(s > 1e-10 * s.max(), (1 / (reference.o.eps + s.clamp_min(0).sqrt()) - phi0) / s, 0)
    c = phi0 * w + V @ (psi * (V.T @ (centre @ K @ w)))
    assert relative(reference.solve(G, G.T @ w), G.T @ c) < 1e-9


@pytest.mark.parametrize("metric", ["none", "tensor", "diagonal", "factored"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_weighted_size_of_the_update_is_update_rms(metric, scope):
    options = options_of("mfac", metric=metric, scope=scope, lr=1.0, update_rms=0.3, window_momentum=0.8)
    reference = MetricReference(parameters(SHAPES), "mfac", "dense", **options)
    run(reference, 4)
    before = clones(reference.params)
    gradients_at(4, reference.params)
    reference.step()
    u = [matrix(b - p) for b, p in zip(before, reference.params, strict=True)]
    weighted = sum((S.square() * x.square()).sum() for S, x in zip(reference.S, u, strict=True))
    assert weighted / sum(S.square().sum() for S in reference.S) == pytest.approx(0.3**2, rel=1e-12)


def test_a_diagonal_metric_with_huge_damping_is_torchs_adam():
    """Gradients of constant magnitude and random sign, for as long as nothing has left the window."""
    p = Parameter(torch.zeros(6, 7, dtype=torch.float64))
    q = Parameter(p.detach().clone())
    options = options_of("mfac", metric="diagonal", metric_beta=0.99, metric_eps=1e-14, window_momentum=0.9, window_size=20)
    options |= {"damping": 1e12, "damping_mode": "relative", "update_rms": 1.0, "rms_mode": "adam", "lr": 0.01}
    reference, adam = MetricReference([p], "mfac", "dense", **options), torch.optim.Adam([q], lr=0.01, betas=(0.9, 0.99), eps=0)
    generator = torch.Generator().manual_seed(0)
    size = 0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype)
    for _ in range(20):
        p.grad = size * (torch.randint(2, p.shape, generator=generator) * 2 - 1)
        q.grad = p.grad.clone()
        reference.step()
        adam.step()
        assert relative(p.detach(), q.detach()) < 1e-10
