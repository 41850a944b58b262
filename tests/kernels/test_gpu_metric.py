"""Triton's kernels of the metric in its interpreter, against the metric's formulas and plain torch."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp.core.moments import measured
from hf_efcp.kernels import gpu_metric
from tests.reference import relative

SHAPES = pytest.mark.parametrize(
    ("n", "rows", "cols"), [(2, 70, 33), (3, 20, 300), (2, 1, 5), (1, 5, 1), (1, 4, 1500), (1, 300, 7)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@SHAPES
@DTYPES
def test_squares_are_summed_in_fp64(n, rows, cols, dtype):
    g = random(n, rows, cols, dtype=dtype)
    for got, dim in zip(gpu_metric.squares(g), (2, 1), strict=True):
        assert got.dtype == torch.float64
        assert relative(got, g.double().square().sum(dim)) < 1e-14


def test_squares_of_views_and_lists():
    g = random(3, 20, 30)
    expected = gpu_metric.squares(g)
    for odd in ([x.mT.contiguous().mT for x in g], list(g), [(-x)._neg_view() for x in g]):
        assert all(torch.equal(got, sums) for got, sums in zip(gpu_metric.squares(odd), expected, strict=True))


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 3e38])
def test_squares_beyond_the_range_of_fp32(size):
    rows, cols = gpu_metric.squares(torch.full((1, 4, 5), size))
    stored = torch.tensor(size).double().square()
    torch.testing.assert_close(rows[0], (5 * stored).expand(4), rtol=1e-14, atol=0)
    torch.testing.assert_close(cols[0], (4 * stored).expand(5), rtol=1e-14, atol=0)


def state_of(n, rows, cols, dtype):
    """r, c and counts; the last tensor has seen nothing."""
    r, c = (random(n, k, dtype=dtype, seed=k).square() for k in (rows, cols))
    c[-1], r[-1] = 0, 0
    return r, c, torch.tensor([3, 1000, 0][-n:])


@SHAPES
@DTYPES
@pytest.mark.parametrize("beta", [0.999, 0.0])
def test_what_is_measured_is_torchs(n, rows, cols, dtype, beta, plain):
    g, state = random(n, rows, cols, dtype=dtype), state_of(n, rows, cols, dtype)
    found = gpu_metric.measure(list(g), *state, beta, 1e-3)
    for got, wanted in zip(found, plain(measured, list(g), *state, beta, 1e-3), strict=True):
        bound = 1e-12 if wanted.dtype == torch.float64 else 2e-7  # one number of fp32
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert relative(got.double(), wanted.double()) < bound


@DTYPES
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype, plain):
    g, zeros = torch.zeros(2, 80, 9, dtype=dtype), [torch.zeros(2, k, dtype=dtype) for k in (80, 9)]
    g[0, 3:], g[0, 7, 2], g[0, 20, 1], g[1, 5, 0] = 1.0, torch.nan, torch.inf, 1e-12
    arguments = g, *zeros, torch.zeros(2, dtype=torch.int64), 0.5, 1e-3
    _, x, y, square, cols = found = gpu_metric.measure(*arguments)
    assert (x[0, :3] == 0).all() and (x[1, 6:] == 0).all() and not cols[0, 1].isfinite() and cols[0, 3].isfinite()
    assert x.isnan().nonzero().tolist() == [[0, 7], [0, 20]]
    assert not square[0].isfinite() and square[1].isfinite() and (y == 1).all()
    for got, wanted in zip(found, plain(measured, *arguments), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0, equal_nan=True)


def test_columns_of_zeros_are_cut_off(plain):
    g, (r, c, count) = random(1, 6, 9), state_of(2, 6, 9, torch.float32)
    c[0, 4] = 0
    arguments = g, r[:1], c[:1], count[:1], 0.9, 0.0
    y = gpu_metric.measure(*arguments)[2]
    assert y[0, 4] == 0
    torch.testing.assert_close(y, plain(measured, *arguments)[2])


def test_a_state_in_another_dtype_is_left_to_torch():
    state = state_of(1, 4, 5, torch.float64)
    assert gpu_metric.measure(random(1, 4, 5), *state, 0.9, 1e-3) is None
