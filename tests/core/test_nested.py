"""Nested adapters against brute force in fp64, and the area under accuracy over rank."""

import math

import pytest
import torch

from hf_efcp.core.nested import RANK_SCALES, aurac, masks, powers_of_two, rank_scale_of, staircase, training_diagonals

S = [1, 2, 4, 8, 16, 32]


def pair(r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (12, r), (r, 9))]


@pytest.mark.parametrize("rank_scale", RANK_SCALES)
@pytest.mark.parametrize("ranks", [[1, 2, 4, 8], [8], [3, 5, 8], [2, 8]], ids=str)
def test_p_is_the_sum_of_all_nested_adapters(ranks, rank_scale):
    x, a, b = pair(8)
    scale = {"none": lambda rho: 1.0, "rank": lambda rho: 1 / rho, "sqrt": lambda rho: rho**-0.5}[rank_scale]
    nested = sum(scale(rho) * a[:, :rho] @ b[:rho] for rho in ranks)
    p = staircase(8, ranks, rank_scale)
    torch.testing.assert_close((x @ a * p) @ b, x @ nested, rtol=1e-12, atol=1e-12)


def test_the_staircase_of_the_paper():
    p = staircase(32, S, "sqrt")
    found = [float(p[i]) for i in (0, 1, 2, 3, 4, 7, 8, 15, 16, 31)]
    expected = [2.9875, 1.9875, 1.2804, 1.2804, 0.7804, 0.7804, 0.4268, 0.4268, 0.1768, 0.1768]  # sums of rounded numbers
    assert found == pytest.approx(expected, abs=1e-4)


def test_columns_after_the_largest_rank_are_dead():
    assert staircase(6, [1, 4], "none").tolist() == [2, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("rank_scale", RANK_SCALES)
def test_the_mean_of_what_dylora_draws_is_p_over_the_number_of_ranks(rank_scale):
    drawn = training_diagonals("dylora", 32, S, rank_scale)
    assert drawn.shape == (6, 32) and torch.equal(drawn, masks(32, S, rank_scale))
    torch.testing.assert_close(drawn.mean(0), staircase(32, S, rank_scale) / 6, rtol=1e-14, atol=0)


def test_one_rank_is_lora():
    assert torch.equal(staircase(8, [8], "rank"), torch.full((8,), 1 / 8, dtype=torch.float64))


def test_the_gradient_of_a_is_the_dense_one_times_p():
    x, a, b = pair(8)
    p = staircase(8, [1, 2, 4, 8], "sqrt")
    a.requires_grad_()
    b.requires_grad_()
    weights = torch.arange(45, dtype=torch.float64).view(5, 9)
    (weights * ((x @ a * p) @ b)).sum().backward()
    dense = x.T @ weights  # of x W
    torch.testing.assert_close(a.grad, dense @ b.detach().T * p, rtol=1e-12, atol=0)
    torch.testing.assert_close(b.grad, p[:, None] * (a.detach().T @ dense), rtol=1e-12, atol=0)


def test_powers_of_two_end_with_r():
    assert [powers_of_two(r) for r in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("version", [1, 2])
def test_aurac_of_a_constant_is_the_constant(version):
    assert aurac([1, 3, 7, 20], [0.7] * 4, version=version) == pytest.approx(0.7, abs=1e-15)


def test_aurac_of_what_is_linear_on_its_axis_is_the_mean_of_the_ends():
    ranks = [1, 2, 4, 16]
    assert aurac(ranks, ranks, version=1) == pytest.approx(8.5, abs=1e-12)
    assert aurac(ranks, [math.log2(r) for r in ranks], version=2) == pytest.approx(2, abs=1e-12)
    assert aurac(ranks, ranks, version=2) != pytest.approx(8.5, abs=0.1)


def test_aurac_of_doublings_weighs_each_the_same_in_any_order():
    accuracies = [0.1, 0.5, 0.6, 0.8]
    expected = (0.1 / 2 + 0.5 + 0.6 + 0.8 / 2) / 3
    assert aurac([1, 2, 4, 8], accuracies) == pytest.approx(expected, abs=1e-15)
    assert aurac([8, 1, 4, 2], [0.8, 0.1, 0.6, 0.5]) == pytest.approx(expected, abs=1e-15)
    assert aurac([4], [0.25]) == 0.25


@pytest.mark.parametrize(
    ("ranks", "accuracies", "version", "message"),
    [([], [], 2, "got 0 and 0"), ([1, 2], [0.5], 2, "got 2 and 1"), ([1, 1], [0.5, 0.6], 2, "different"),
     ([0, 1], [0.5, 0.6], 2, "integers >= 1"), ([1], [0.5], 3, "version=3: must be 1")],
)  # fmt: skip
def test_aurac_says_what_is_wrong(ranks, accuracies, version, message):
    with pytest.raises(ValueError, match=message):
        aurac(ranks, accuracies, version=version)


def test_scales():
    assert [rank_scale_of(4, s) for s in RANK_SCALES] == [1.0, 0.5, 0.25]
