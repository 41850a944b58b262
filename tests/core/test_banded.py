"""Banded training: masks by brute force, gradients outside of the band only, weights that do not flip."""

import itertools
import statistics

import pytest
import torch

from hf_efcp.core.banded import banded, kept, second_threshold, threshold, threshold_from_kept, trained

NORMAL = statistics.NormalDist()


def weights(n=2000, seed=0):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(0.3)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_the_largest_are_kept(density):
    theta = weights().view(40, 50)
    order = theta.flatten().abs().argsort(descending=True)
    expected = torch.zeros(2000, dtype=torch.bool)
    expected[order[: max(1, round(density * 2000))]] = True
    assert torch.equal(kept(theta, density).flatten(), expected)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.45])
def test_gradients_reach_what_is_outside_of_the_band(p):
    theta = weights().requires_grad_()
    w = banded(theta, 0.3, p=p)
    t_k = float(threshold(theta.detach(), 0.3))
    t_p = float(theta.detach().square().mean().sqrt()) * NORMAL.inv_cdf(0.5 + p)
    assert float(second_threshold(theta.detach(), p)) == pytest.approx(t_p, rel=1e-12)
    (w * torch.arange(1.0, 2001)).sum().backward()
    for i, x in enumerate(theta.detach().tolist()):
        inside = min(t_p, t_k) <= abs(x) <= max(t_p, t_k)
        assert float(theta.grad[i]) == (0.0 if inside else i + 1)  # dropped weights below the band grow back
        assert float(w[i].detach()) == (x if abs(x) >= t_k else 0.0)
    frozen = float((theta.grad == 0).double().mean())
    assert frozen == pytest.approx(abs(0.7 - 2 * p), abs=0.03)  # of normal weights


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
def test_the_threshold_from_what_is_kept(a):
    theta = weights()
    rms, t_k = float(theta.square().mean().sqrt()), float(threshold(theta, 0.2))
    expected = rms * NORMAL.inv_cdf(0.5 + (1 - a) * (NORMAL.cdf(t_k / rms) - 0.5))
    found = threshold_from_kept(theta, 0.2, a)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if a == 0:
        assert float(found) == pytest.approx(t_k, rel=1e-9)
        assert trained(theta, threshold(theta, 0.2), found).sum() >= 1999
    if a == 1:
        assert torch.equal(trained(theta, threshold(theta, 0.2), found), kept(theta, 0.2) & (theta.abs() != t_k))


def test_a_band_keeps_weights_from_flipping():
    """Noisy gradients change the mask at every step. A weight in the band stays; only the threshold moves past it."""

    def flips(p):
        theta = weights().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        masks = []
        for _ in range(30):
            w = banded(theta, 0.3, p=p)
            masks.append(w.detach() != 0)
            theta.grad = None
            (w * torch.randn(2000, dtype=torch.float64, generator=generator)).sum().backward()
            with torch.no_grad():
                theta -= 0.01 * theta.grad
        return sum(int((a != b).sum()) for a, b in itertools.pairwise(masks))

    assert flips(0.2) < 0.75 * flips(0.3499)  # T_p = T_k for normal weights: no band


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "one of the two"), ({"p": 0.1, "a": 0.1}, "one of the two"), ({"p": 0.5}, r"p=0.5"), ({"a": 1.1}, r"a=1.1")],
)
def test_bad_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        banded(weights(), 0.3, **given)
    with pytest.raises(ValueError, match="density=0"):
        banded(weights(), 0, p=0.1)


@pytest.mark.parametrize("given", [{"p": 0.3}, {"a": 0.5}], ids=str)
def test_a_layer_of_zeros_is_trained(given):
    theta = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    (banded(theta, 0.5, **given) * 3).sum().backward()
    assert (theta.grad == 3).all()
