"""The product G^T c in bf16: within the bound of its roundings, for every window that has a product."""

import pytest
import torch

from hf_efcp.core import linalg
from hf_efcp.core.accumulated import DenseEntry, LowRankEntry
from hf_efcp.core.cells import Layout
from hf_efcp.core.low_bit_windows import LowBitDenseWindow, LowBitLowRankWindow
from hf_efcp.core.windows import DenseWindow, LowRankWindow
from tests.kernels.helpers import allocated

UNIT = 2.0**-8  # a number is off by at most this part of it, rounded to the nearest bf16
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = pytest.mark.parametrize(("n", "rows", "cols", "rank"), [(1, 700, 33, 4), (3, 20, 64, 1), (2, 5, 5, 3), (1, 5, 301, 5)])
WINDOWS = pytest.mark.parametrize("window_size", [1, 7])
LOW_RANK = {"fp32": (LowRankWindow, FP32), "bf16": (LowRankWindow, BF16), "low_bit": (LowBitLowRankWindow, FP32)}
DENSE = {"fp32": (DenseWindow, FP32), "bf16": (DenseWindow, BF16), "low_bit": (LowBitDenseWindow, FP32)}
KERNELS = pytest.mark.parametrize("kernels", ["0", "1"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coefficients(n, m):
    """Of all sizes, some of them zero."""
    c = random(n, m, seed=9).double() * torch.logspace(-6, 3, m, dtype=torch.float64)
    c[:, ::3] = 0 if m > 1 else 1.5
    return c


def low_rank(format, n, m, rows, cols, rank):
    """The same full window twice: with the product in bf16, and as the arithmetic is."""
    kind, dtype = LOW_RANK[format]
    buffers = allocated(kind.specs(Layout(rows, cols, FP32), m, rank, dtype), n)
    windows = kind(buffers, FP32, BF16), kind(buffers, FP32)
    for j in range(m):
        windows[0].stage(LowRankEntry.of(random(n, rows, rank, seed=j) / rows**0.5, random(n, cols, rank, seed=50 + j)))
        windows[0].commit(torch.tensor([j]))
    return windows


def dense(format, n, m, rows, cols):
    kind, dtype = DENSE[format]
    buffers = allocated(kind.specs(Layout(rows, cols, FP32), m, dtype), n)
    windows = kind(buffers, FP32, BF16), kind(buffers, FP32)
    for j in range(m):
        windows[0].stage(DenseEntry(random(n, rows, cols, seed=j)))
        windows[0].commit(torch.tensor([j]))
    return windows


def sum_of_sizes(window, c):
    """The sum over all terms of |c_i| |P_i|^T |Q_i|."""
    p, q = (factor.double().abs() for factor in window._factors(slice(None)))
    return torch.einsum("nm,nmra,nmrb->nab", c.abs(), p, q)


@KERNELS
@pytest.mark.parametrize("format", LOW_RANK)
@WINDOWS
@SHAPES
def test_low_rank_is_off_by_three_roundings_of_each_term(n, rows, cols, rank, window_size, format, kernels, monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", kernels)
    fast, exact = low_rank(format, n, window_size, rows, cols, rank)
    c = coefficients(n, window_size)
    bound = 3.05 * UNIT * sum_of_sizes(fast, c) + 1e-30
    for part in (None, slice(1, 4)):
        u, expected = fast.combine(c, part), exact.combine(c, part)
        assert u.dtype == FP32
        assert u.shape == expected.shape
        assert ((u - expected).abs() <= bound[:, part or slice(None)]).all()
        assert not torch.equal(u, expected)


@KERNELS
@pytest.mark.parametrize("format", LOW_RANK)
@WINDOWS
@SHAPES
def test_low_rank_adds_the_same_to_the_parameters(n, rows, cols, rank, window_size, format, kernels, monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", kernels)
    window, _ = low_rank(format, n, window_size, rows, cols, rank)
    c, params = coefficients(n, window_size), list(random(n, rows, cols, seed=3))
    expected = 0.9 * torch.stack(params) - 0.1 * window.combine(c)
    assert window.apply(c, params, -0.1, 0.9)
    assert torch.allclose(torch.stack(params), expected, rtol=2 * UNIT, atol=0.1 * UNIT * float(sum_of_sizes(window, c).max()))


@KERNELS
def test_a_window_that_is_converted_in_parts(kernels, monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", kernels)
    monkeypatch.setitem(linalg.CHUNK_BYTES, "cpu", 2**10)
    monkeypatch.setattr("hf_efcp.core.windows.chunks", lambda total, bytes_each, limit=2**10: _pieces(total, 2))
    fast, exact = low_rank("fp32", 3, 7, 20, 64, 2)
    c, params = coefficients(3, 7), list(torch.zeros(3, 20, 64))
    bound = 3.05 * UNIT * sum_of_sizes(fast, c)
    assert ((fast.combine(c) - exact.combine(c)).abs() <= bound).all()
    assert fast.apply(c, params, 1.0, 0.5)
    assert ((torch.stack(params) - exact.combine(c)).abs() <= bound).all()


def _pieces(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@WINDOWS
@SHAPES
def test_dense_entries_in_bf16_are_off_by_the_rounding_of_u(n, rows, cols, rank, window_size):
    fast, exact = dense("bf16", n, window_size, rows, cols)
    c = coefficients(n, window_size)
    terms = torch.einsum("nm,nmab->nab", c.abs(), fast.buffers["window_rows"].double().abs())
    for part in (None, slice(1, 4)):
        u, expected = fast.combine(c, part), exact.combine(c, part)
        assert u.dtype == FP32
        bound = 1.05 * UNIT * expected.abs() + 2.0**-14 * terms[:, part or slice(None)]
        assert ((u - expected).abs() <= bound).all()


@pytest.mark.parametrize("format", ["fp32", "low_bit"])
def test_dense_entries_that_would_have_to_be_converted_keep_their_product(format):
    fast, exact = dense(format, 2, 7, 12, 30)
    c = coefficients(2, 7)
    assert torch.equal(fast.combine(c), exact.combine(c))


@pytest.mark.parametrize("format", LOW_RANK)
def test_inner_products_stay_as_they_are(format):
    fast, exact = low_rank(format, 2, 5, 12, 30, 2)
    for window in (fast, exact):
        window.stage(LowRankEntry.of(random(2, 12, 2, seed=70) / 12**0.5, random(2, 30, 2, seed=71)))
    j = torch.tensor([2])
    assert torch.equal(fast.dots(j), exact.dots(j))
