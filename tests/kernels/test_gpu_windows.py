"""Triton's kernels of windows in its interpreter: inner products, slots, factors in bf16."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp.kernels import gpu_windows
from tests.kernels.helpers import needs_tiles_of_one_number
from tests.reference import relative

# n, slots, rank, length
SHAPES = pytest.mark.parametrize(("n", "m", "rank", "length"), [(1, 2, 16, 70), (2, 5, 3, 33), (3, 1, 1, 1), (1, 2, 8, 1100)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@SHAPES
@DTYPES
def test_inner_products_are_formed_in_fp64(n, m, rank, length, dtype):
    a, b = random(n, m * rank, length, dtype=dtype), random(n, rank, length, dtype=dtype, seed=1)
    got = gpu_windows.inner(a, b)
    assert (got.shape, got.dtype) == ((n, m * rank, rank), torch.float64)
    assert relative(got, a.double() @ b.double().mT) < 1e-14


def test_a_long_sum_is_cut_and_added():
    a, b = random(1, 2, 30_000), random(1, 1, 30_000, seed=1)
    assert relative(gpu_windows.inner(a, b), a.double() @ b.double().mT) < 1e-13


def test_rows_may_lie_apart():
    a, b = random(2, 20, 90), random(2, 4, 40, seed=1)
    for view in (a[:, ::2, 7:47], a[:, :9, :80:2], a.mT[:, :12, :].expand(2, 12, 20)):
        other = b[..., : view.shape[2]]
        assert relative(gpu_windows.inner(view, other), view.double() @ other.double().mT) < 1e-14


def test_many_columns_are_left_to_torch():
    a = random(1, 17, 40)
    assert gpu_windows.inner(a, a) is None
    wide = a[:, None], a[:, None]
    assert gpu_windows.factor_dots(wide, (a, a), torch.tensor([0])) is None


@SHAPES
@DTYPES
def test_factor_dots_are_those_of_the_products(n, m, rank, length, dtype):
    rows, cols, j = length, 40, m // 2
    window = random(n, m, rank, rows, dtype=dtype), random(n, m, rank, cols, dtype=dtype, seed=1)
    entry = random(n, rank, rows, dtype=dtype, seed=2), random(n, rank, cols, dtype=dtype, seed=3)
    for x in window:
        x[:, j] = torch.nan  # not read: what is there may be anything
    got = gpu_windows.factor_dots(window, entry, torch.tensor([j]))
    for x, own in zip(window, entry, strict=True):
        x[:, j] = own
    dense = (window[0].double().mT @ window[1].double()).flatten(2)
    own = (entry[0].double().mT @ entry[1].double()).flatten(1)
    assert relative(got, (dense @ own[:, :, None]).squeeze(2)) < 1e-13


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 5), 1), ((2, 7, 4, 3), 2), ((1, 2, 3, 900), 1), ((1, 3, 1), 1)])
def test_an_entry_is_written_where_it_is_accepted(shape, dim, dtype):
    if shape[:dim] + shape[dim + 1 :] == (1, 1):
        needs_tiles_of_one_number()
    buffer, entry = (10 * random(*shape)).to(dtype), (10 * random(*shape[:dim], *shape[dim + 1 :], seed=1)).to(dtype)
    written = buffer.index_copy(dim, torch.tensor([1]), entry.unsqueeze(dim))
    for accepted, expected in ((False, buffer), (True, written)):
        for flag in (accepted, torch.tensor(accepted)):
            found = buffer.clone()
            assert gpu_windows.store(found, entry, dim, torch.tensor([1]), flag)
            assert torch.equal(found, expected)


def test_other_dtypes_and_views_are_left_to_torch():
    buffer, j = random(2, 3, 4), torch.tensor([0])
    assert not gpu_windows.store(buffer, random(2, 4, dtype=torch.float64), 1, j, True)
    assert not gpu_windows.store(buffer.mT, random(2, 3), 1, j, True)
    assert torch.equal(buffer, random(2, 3, 4))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_scaled_and_rounded_once(n, m, rank, length, dtype):
    factor, c, sizes = random(n, m, rank, length + 3, dtype=dtype), random(n, m, seed=1), random(n, length, seed=2).exp()
    view = factor[..., 3:]
    for weights, factors in ((c, None), (None, sizes), (c, sizes), (None, None)):
        expected = view.float()
        if weights is not None:
            expected = expected * weights[:, :, None, None]
        if factors is not None:
            expected = expected * factors[:, None, None]
        assert torch.equal(gpu_windows.scaled(view, weights, factors), expected.bfloat16())


def test_scaling_fp64_is_left_to_torch():
    assert gpu_windows.scaled(random(1, 1, 1, 4, dtype=torch.float64), None) is None
    assert gpu_windows.scaled(random(1, 1, 1, 4), random(1, 1, dtype=torch.float64)) is None
