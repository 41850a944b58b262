"""Exact inner products, precision guards, counted noise."""

import threading

import pytest
import torch

from hf_efcp.core.linalg import chunks, ieee_matmul, inner, orthonormalize
from hf_efcp.core.random import counted_noise, stochastic_round


@pytest.mark.parametrize("length", [0, 1, 1000, 200_000])
def test_inner_is_exact_for_fp32_rows(length):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, length, generator=generator), torch.randn(2, 3, length, generator=generator)
    torch.testing.assert_close(inner(a, b), a.double() @ b.double().mT, rtol=1e-13, atol=1e-11)


def test_chunks_cover_once():
    assert [x for s in chunks(10, 3, limit=9) for x in range(s.start, s.stop)] == list(range(10))
    assert [s.stop - s.start for s in chunks(3, 100, limit=9)] == [1, 1, 1]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_ieee_matmul_restores_the_users_choice(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16), ieee_matmul(torch.device("cpu")):
            product = a @ a
        assert product.dtype == torch.float32
        torch.testing.assert_close(product.double(), a.double() @ a.double(), rtol=1e-5, atol=1e-4)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_counted_noise_is_uniform_and_does_not_depend_on_the_shape_around_it():
    noise = counted_noise(torch.tensor(5), torch.arange(3), 200, 300)
    assert noise.shape == (3, 200, 300) and noise.abs().max() < 1
    assert noise.mean().abs() < 0.01 and (noise.var() - 1 / 3).abs() < 0.01
    assert torch.equal(noise[1:2, :7, :9], counted_noise(torch.tensor(5), torch.tensor([1]), 7, 9))
    # White in both directions: no low-rank structure that a compressor could mistake for a gradient.
    largest = torch.linalg.matrix_norm(noise, 2).max() / 3**-0.5
    assert largest < 1.1 * (200**0.5 + 300**0.5)
    assert (noise * counted_noise(torch.tensor(6), torch.arange(3), 200, 300)).mean().abs() < 0.01


def test_inside_ieee_matmul_both_names_of_the_setting_agree():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with ieee_matmul(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_keeps_small_additions_in_the_mean(dtype):
    x = torch.ones(1, 8, 64, dtype=torch.bfloat16)
    for t in range(1000):
        x = stochastic_round(x.to(dtype) + 1e-3, torch.bfloat16, torch.tensor(t), torch.tensor([0]))
    assert (x.float().mean() - 2).abs() < 0.02


def test_a_basis_from_the_gram_matrix_is_that_of_qr_up_to_signs():
    a = torch.randn(2, 50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a[1] *= torch.tensor([1, 1e-6, 1e5, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(orthonormalize(a, lambda t: t).abs(), orthonormalize(a).abs(), rtol=0, atol=1e-13)


def test_full_precision_lasts_as_long_as_any_thread_needs_it():
    before, cpu = torch.get_float32_matmul_precision(), torch.device("cpu")
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = ieee_matmul(cpu), ieee_matmul(cpu)
        first.__enter__()
        other = threading.Thread(target=second.__enter__)
        other.start()
        other.join()
        first.__exit__(None, None, None)  # the one who came first goes first, while the other still computes
        assert torch.get_float32_matmul_precision() == "highest"
        other = threading.Thread(target=second.__exit__, args=(None, None, None))
        other.start()
        other.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
