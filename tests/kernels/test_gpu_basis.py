"""Triton's kernels of a power iteration's start, and of orthonormal bases, in its interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp.core.compressors import DEAD, PowerIteration
from hf_efcp.kernels import gpu_basis
from tests.kernels.helpers import plain_error
from tests.reference import relative

SHAPES = pytest.mark.parametrize(("n", "rows", "rank"), [(2, 70, 3), (1, 33, 16), (3, 1, 1), (1, 700, 8), (1, 40, 20)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def started(last, plain=None):
    cell = plain_error(last, last.dtype)
    step = torch.tensor(11)
    if plain is not None:
        return plain(PowerIteration(cell).start, step)
    return gpu_basis.start(last, step, cell.turn.ids, DEAD * torch.finfo(last.dtype).eps)


@SHAPES
@DTYPES
def test_starts_are_torchs(n, rows, rank, dtype, plain):
    last = random(n, rows, rank, dtype=dtype) * 1e-20
    last[-1, :, rank // 2] *= torch.finfo(dtype).eps  # rounding errors
    last[0, :, 0] = 0
    got = started(last)
    assert got.mT.is_contiguous()
    torch.testing.assert_close(got, started(last, plain), rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    assert torch.equal(started(0 * last), started(0 * last, plain))


def test_long_columns_are_measured_in_parts(plain, monkeypatch):
    monkeypatch.setattr(gpu_basis, "_READ", 100)
    last = random(2, 5000, 3)
    last[0, :, 1] *= 1e-12
    torch.testing.assert_close(started(last), started(last, plain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_start_with_what_is_not_finite_is_torchs(bad, plain):
    last = random(2, 30, 3)
    last[0, 5, 1] = bad
    torch.testing.assert_close(started(last), started(last, plain), rtol=1e-6, atol=0, equal_nan=True)


def conditioned(n, rows, rank, condition, dtype, seed=0):
    """Random matrices with singular values from 1 to 1 / condition."""
    u, _, v = torch.linalg.svd(random(n, rows, rank, dtype=torch.float64, seed=seed), full_matrices=False)
    return (u * torch.logspace(0, -torch.tensor(condition).log10().item(), u.shape[2], dtype=torch.float64) @ v).to(dtype)


def check_orthonormal(q):
    identity = torch.eye(q.shape[2], dtype=torch.float64)
    assert (q.double().mT @ q.double() - identity).abs().max() < ORTHONORMAL[q.dtype]


@SHAPES
@DTYPES
@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_the_basis_is_that_of_qr(n, rows, rank, dtype, condition):
    a = conditioned(n, rows, rank, condition, dtype)
    got = gpu_basis.orthonormal(a)
    assert (got.shape, got.dtype, got.mT.is_contiguous()) == (a.shape, dtype, True)
    check_orthonormal(got)
    q = torch.linalg.qr(a.double()).Q
    signs = (q * got.double()).sum(1, keepdim=True).sign()
    assert relative(got.double() * signs, q) < max(1e-14 * condition, ORTHONORMAL[dtype])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
def test_sizes_of_columns_do_not_matter(scale):
    a = random(1, 50, 4)
    a[..., 1] *= scale
    got = gpu_basis.orthonormal(a)
    check_orthonormal(got)
    assert relative(got.double().abs(), torch.linalg.qr(a.double()).Q.abs()) < 1e-6


@DTYPES
def test_dependent_columns_become_zero(dtype):
    a = random(3, 40, 5, dtype=dtype)
    a[0, :, 2] = 0
    a[1, :, 3] = a[1, :, 0]
    a[2] = 0
    got = gpu_basis.orthonormal(a)
    dead = got.eq(0).all(1)
    assert dead.nonzero().tolist() == [[0, 2], [1, 3], *([2, k] for k in range(5))]
    check_orthonormal(got[:1, :, ~dead[0]])
    check_orthonormal(got[1:2, :, ~dead[1]])
    q = got[1:2].double()
    assert relative(q @ (q.mT @ a[1:2].double()), a[1:2].double()) < 1e-6


def test_more_columns_than_rows():
    got = gpu_basis.orthonormal(random(1, 3, 5))
    assert got.eq(0).all(1).tolist() == [[False] * 3 + [True] * 2]
    check_orthonormal(got[..., :3])


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(dtype, bad):
    a = random(2, 40, 3, dtype=dtype)
    a[0, 7, 1] = bad
    got = gpu_basis.orthonormal(a)
    assert got[0, :, 1].isnan().all()
    check_orthonormal(got[1:])


def test_the_layout_of_the_argument_does_not_matter():
    a = random(2, 30, 3)
    assert torch.equal(gpu_basis.orthonormal(a), gpu_basis.orthonormal(a.mT.contiguous().mT))


def test_many_columns_and_bf16_are_left_to_torch():
    assert gpu_basis.orthonormal(random(1, 40, 33)) is None
    assert gpu_basis.orthonormal(random(1, 40, 3, dtype=torch.bfloat16)) is None
