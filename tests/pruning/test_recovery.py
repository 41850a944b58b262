"""The paper's synthetic algorithms, and Optimal Brain Surgeon's identities, in fp64 (arXiv 2408.17163)."""

import pytest
import torch

from hf_efcp.pruning.projection import model_value, obs_projection, removal_cost, restricted_least_squares, top_k
from hf_efcp.pruning.recovery import iobs_step, k_iht_step, topk_iobs_step
from hf_efcp.pruning.supports import greedy_support

N, D, TRUE_K, K = 256, 128, 16, 64


def problem(noise=0.0, seed=0):
    """X (n, d) with entries N(0, 1/n), a sparse w*, y = X w* and some noise; H = X^T X, b = X^T y."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) / N**0.5
    w = torch.zeros(1, D, dtype=torch.float64)
    w[0, torch.randperm(D, generator=generator)[:TRUE_K]] = torch.randn(TRUE_K, generator=generator, dtype=torch.float64)
    y = x @ w[0] + noise * torch.randn(N, generator=generator, dtype=torch.float64)
    hessian = x.mT @ x
    return hessian, torch.linalg.inv(hessian), (x.mT @ y)[None], w


def started(d=40, rows=5, seed=1):
    """An ill-conditioned H, its inverse, and rows of z."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    hessian = x.mT @ x + 1e-6 * torch.eye(d, dtype=torch.float64)
    return hessian, torch.linalg.inv(hessian), torch.randn(rows, d, generator=generator, dtype=torch.float64)


def brute_force(hessian, target, keep):
    result = torch.zeros_like(target)
    for r, q in enumerate(keep):
        result[r, q] = torch.linalg.solve(hessian[q][:, q], target[r, q])
    return result


def test_the_projection_is_restricted_least_squares():
    hessian, inverse, z = started()
    keep = top_k(z, 13)
    keep[1], keep[2, :30], keep[3] = True, True, False  # rows of different counts, all, none
    expected = brute_force(hessian, z @ hessian, keep)
    for found in (obs_projection(z, inverse, keep), restricted_least_squares(hessian, z @ hessian, keep)):
        assert (found - expected).abs().max() < 1e-9
        assert (found[~keep] == 0).all()
    assert torch.allclose(obs_projection(z, inverse, keep)[1], z[1], rtol=0, atol=0)


def test_systems_of_different_sizes_do_not_disturb_each_other(monkeypatch):
    hessian, _, z = started(rows=30)
    keep = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 30)[:, None]
    expected = brute_force(hessian, z @ hessian, keep)
    for room in (8, 20_000):  # one row at a time, some
        monkeypatch.setattr("hf_efcp.pruning.projection.ROOM", room)
        assert (restricted_least_squares(hessian, z @ hessian, keep) - expected).abs().max() < 1e-9


def test_the_cost_of_a_removal_is_what_the_model_says():
    hessian, inverse, z = started()
    keep = top_k(z, 13)
    w = obs_projection(z, inverse, keep)
    cost = removal_cost(z, inverse, keep)
    assert torch.allclose(model_value(w, z, hessian), cost, rtol=1e-9, atol=0)
    removed = z[0][~keep[0]]
    by_hand = removed @ torch.linalg.solve(inverse[~keep[0]][:, ~keep[0]], removed) / 2
    assert torch.allclose(cost[0], by_hand, rtol=1e-9, atol=0)


def test_survivors_that_make_up_are_better_than_survivors_as_they_are_and_a_greedy_support_better_still():
    hessian, inverse, z = started(rows=20)
    largest = top_k(z, 13)
    as_they_are = model_value(torch.where(largest, z, 0.0), z, hessian)
    made_up = model_value(obs_projection(z, inverse, largest), z, hessian)
    greedy = model_value(obs_projection(z, inverse, greedy_support(z, inverse, 13)), z, hessian)
    assert (made_up < as_they_are).all()
    assert (greedy < made_up).all()


def test_greedy_removal_ends_at_the_restricted_solution_of_its_support():
    """Its own weights, downdated one by one, against a solve: here with the loop written out."""
    _, inverse, z = started(rows=1)
    w, own, left = z[0].clone(), inverse.clone(), list(range(z.shape[1]))
    while len(left) > 13:
        j = min(left, key=lambda i: w[i] ** 2 / own[i, i])
        w = w - own[:, j] * w[j] / own[j, j]
        own = own - own[:, j, None] * own[j] / own[j, j]
        left.remove(j)
    keep = greedy_support(z, inverse, 13)
    assert keep[0].nonzero().flatten().tolist() == left
    w[~keep[0]] = 0
    assert (obs_projection(z, inverse, keep)[0] - w).abs().max() < 1e-9


@pytest.mark.parametrize("step", [topk_iobs_step, iobs_step])
def test_a_unit_step_recovers_exactly_without_noise_and_changes_nothing_afterwards(step):
    hessian, inverse, b, true = problem()
    w = step(torch.zeros(1, D, dtype=torch.float64), -b, inverse, K)
    assert (w - true).abs().max() < 1e-12
    again = step(w, w @ hessian - b, inverse, K)
    assert (again - w).abs().max() < 1e-12


def test_hard_thresholding_needs_many_steps():
    hessian, _, b, true = problem()
    rate, w, errors = 1 / float(torch.linalg.matrix_norm(hessian, 2)), torch.zeros(1, D, dtype=torch.float64), []
    for _ in range(600):
        w = k_iht_step(w, w @ hessian - b, TRUE_K, rate)
        errors.append(float((w - true).norm() / true.norm()))
    assert errors[0] > 0.5 and errors[10] > 1e-3 and errors[-1] < 1e-8
    assert int((w != 0).sum()) == TRUE_K


@pytest.mark.parametrize("seed", range(3))
def test_with_the_gradient_of_a_mean_and_the_hessian_of_a_sum_the_error_contracts_by_1_minus_2_over_n(seed):
    """The paper's synthetic code has this step: its slow geometric curve."""
    hessian, inverse, b, true = problem(seed=seed)
    w = torch.zeros(1, D, dtype=torch.float64)
    for _ in range(100):
        before = (w - true).norm()
        w = topk_iobs_step(w, (w @ hessian - b) * 2 / N, inverse, K)
        assert (w - true).norm() / before == pytest.approx(1 - 2 / N, abs=1e-9)


def test_with_noise_and_a_stochastic_gradient_iterations_help():
    """Not a quadratic with a unit step: half of the rows make up each gradient and Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    true = torch.zeros(1, D, dtype=torch.float64)
    true[0, :TRUE_K] = 1 + torch.rand(TRUE_K, generator=generator, dtype=torch.float64)
    y = x @ true[0] + 0.1 * torch.randn(N, generator=generator, dtype=torch.float64)
    w, errors = torch.zeros(1, D, dtype=torch.float64), []
    for _ in range(30):
        some = torch.randperm(N, generator=generator)[:160]
        inverse = torch.linalg.inv(x[some].mT @ x[some] + torch.eye(D, dtype=torch.float64))
        w = iobs_step(w, (x[some] @ w[0] - y[some])[None] @ x[some], inverse, TRUE_K, step=0.5)
        errors.append(float((w - true).norm()))
    assert errors[-1] < errors[0] / 5 and errors[-1] < 0.3


def test_k_as_large_as_d_removes_nothing():
    _, inverse, z = started()
    assert torch.equal(iobs_step(z, torch.zeros_like(z), inverse, z.shape[1]), z)
    assert top_k(z, z.shape[1] + 3).all()
    assert top_k(torch.ones(1, 5), 2).tolist() == [[True, True, False, False, False]]  # ties: the first


def test_an_unknown_support_is_refused():
    _, inverse, z = started()
    with pytest.raises(ValueError, match="support='cost': must be magnitude or greedy"):
        iobs_step(z, z, inverse, 3, support="cost")
