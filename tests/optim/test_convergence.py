"""Every registered name on the usual toys, and on the problem that full-matrix methods exist for."""

import math

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

from tests.reference import NAMES, each, few_names, info, known_to, names, rate_of_adam

SMALL = {"low rank": {"rank": 1}, "sparse": {"density": 0.4, "block_size": 5}, "dense": {}}


def build(name, params, lr, **options):
    """With lossy compression; M-FAC's damping is relative, so that one setting fits all scales."""
    family = {"damping": 1e-3, "damping_mode": "relative"} if info(name).family == "mfac" else {"eps": 1e-8}
    options = {
        "update_rms": 1.0,
        "window_bias_correction": True,
        "adam_lr_ratio": 1.0,
        **family,
        **SMALL[info(name).compression],
        **options,
    }
    return info(name).cls(params, lr, **known_to(name, options))


def minimise(optimizer, loss, steps):
    """Run with cosine decay; returns the last loss over the first."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return loss().item() / first


def rosenbrock(x):
    x = x.flatten()
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("name", few_names())
def test_rosenbrock(name):
    x = torch.nn.Parameter(torch.tensor([[-1.2, 1.0, -1.2], [1.0, -1.2, 1.0]], dtype=torch.float64))
    optimizer = build(name, [x], 0.03, window_size=4, window_momentum=0.9)
    assert minimise(optimizer, lambda: rosenbrock(x), 800) < 1 / 200


@pytest.mark.parametrize("name", each())
def test_one_dimension(name):
    x = torch.nn.Parameter(torch.tensor(3.0))
    assert minimise(build(name, [x], 0.1, window_size=4), lambda: (x - 1) ** 2 + 0.1 * (x - 1) ** 4, 150) < 1e-4


@pytest.mark.parametrize("name", each())
def test_logistic_regression(name):
    data = load_breast_cancer()
    features = torch.tensor(data.data, dtype=torch.float32)
    features, labels = (features - features.mean(0)) / features.std(0), torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 2)
    optimizer = build(name, model.parameters(), 0.03, window_size=16, window_momentum=0.9)
    assert minimise(optimizer, lambda: torch.nn.functional.cross_entropy(model(features), labels), 150) < 0.15
    assert (model(features).argmax(1) == labels).float().mean() > 0.97


@pytest.mark.parametrize("name", few_names())
def test_small_mlp(name):
    data = load_digits()
    features, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    # A window of rank-1 rows spans up to 16 directions; a method without one has no more than its rank.
    rank = {} if info(name).windowed else {"rank": 4, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = build(name, model.parameters(), rate_of_adam(name, 0.01), window_size=16, **rank)
    order = torch.randperm(len(labels) - 297, generator=torch.Generator().manual_seed(0))
    for batch in order.repeat(6).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features[batch]), labels[batch]).backward()
        optimizer.step()
    assert (model(features[-297:]).argmax(1) == labels[-297:]).float().mean() > 0.85


CONDITION = 1e6
DIMENSION = 20


def ill_conditioned(make, lr, steps=600, noise=0.3):
    """f(x) = x^T H x / 2 of condition 1e6 in a random basis, every direction with an equal share of f at the start.

    Gradients carry noise of covariance noise^2 H, as those of a least-squares problem do. Returns the last f over the first.
    """
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -math.log10(CONDITION), DIMENSION, dtype=torch.float64)
    h, root = (basis @ torch.diag(e) @ basis.T for e in (eigenvalues, eigenvalues.sqrt()))
    start = basis @ (torch.randn(DIMENSION, generator=generator, dtype=torch.float64) / eigenvalues.sqrt())
    x = torch.nn.Parameter(start.clone().view(4, 5))
    optimizer = make([x], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator.manual_seed(1)
    for _ in range(steps):
        g = h @ x.detach().flatten() + noise * root @ torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
        x.grad = g.view(4, 5)
        optimizer.step()
        schedule.step()
    end = x.detach().flatten()
    ratio = ((end @ h @ end) / (start @ h @ start)).item()
    return ratio if math.isfinite(ratio) else math.inf


# What the best of SGD with momentum and Adam leaves of f, times this, is more than the method leaves.
MARGIN = {name: 1.0 for name in NAMES} | {"efcp_dense_mfac": 0.25, "efcp_dense_ggt": 0.05}
LEARNING_RATES = {"sgd": (0.3, 1.0, 2.0, 3.0), "adam": (1.0, 3.0, 10.0, 30.0), "efcp": (1.0, 3.0, 10.0, 30.0)}


@pytest.fixture(scope="module")
def first_order():
    sgd = [ill_conditioned(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), lr) for lr in LEARNING_RATES["sgd"]]
    adam = [ill_conditioned(torch.optim.Adam, lr) for lr in LEARNING_RATES["adam"]]
    return min(sgd + adam)


@pytest.mark.parametrize("name", few_names(names(windowed=True)))
def test_full_matrix_methods_beat_sgd_and_adam_where_directions_differ(name, first_order):
    window = 5 * DIMENSION if info(name).family == "mfac" else DIMENSION
    rank = {"rank": 2} if info(name).compression == "low rank" else {}
    ratios = [ill_conditioned(lambda p, lr: build(name, p, lr, window_size=window, **rank), lr) for lr in LEARNING_RATES["efcp"]]
    print(f"\n{name}: leaves {min(ratios):.2g} of f; the best of SGD with momentum and Adam {first_order:.2g}")
    assert min(ratios) < MARGIN[name] * first_order
