"""Triton's products of e + g with a few columns in its interpreter, against products in fp64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp.kernels import gpu_low_rank
from tests.kernels.helpers import coded_error, plain_error
from tests.reference import few, relative

SHAPES = pytest.mark.parametrize(
    ("n", "rows", "cols", "rank"), [(2, 20, 300, 3), (1, 5, 300, 16), (1, 70, 9, 8), (3, 1, 20, 1), (2, 9, 1, 1), (1, 40, 40, 20)]
)
ERRORS = pytest.mark.parametrize("kind", [None, torch.bfloat16, torch.float32, torch.float64, 8, 4], ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error_of(kind, *shape):
    """An error in a format: a plain one's dtype, or the bits of a code."""
    e = random(*shape, seed=1)
    if isinstance(kind, torch.dtype):
        return plain_error(e.to(kind), torch.float32)
    error = coded_error(kind, *shape, torch.float32)
    error.turn.ok = True
    error.write(e)
    return error


@SHAPES
@ERRORS
@pytest.mark.parametrize("scaled", few([False, True], bool), ids=["", "scaled"])
def test_products_of_e_plus_g(n, rows, cols, rank, kind, scaled):
    g, q, p = random(n, rows, cols), random(n, rank, cols, seed=2), random(n, rank, rows, seed=3)
    scale = (random(n, rows, seed=4).exp(), random(n, cols, seed=5).exp()) if scaled else None
    error = None if kind is None else error_of(kind, n, rows, cols)
    a = g.double() if scale is None else g.double() * scale[0].double()[:, :, None] * scale[1].double()[:, None]
    a = a if error is None else a + error.read().double()
    stored = None if error is None else error.stored
    got = gpu_low_rank.times(list(g), stored, q, scale)
    assert (got.shape, got.dtype, got.mT.is_contiguous()) == ((n, rows, rank), torch.float32, True)
    assert relative(got.double(), a @ q.double().mT) < 1e-6
    got = gpu_low_rank.transposed_times(g, stored, p, scale)
    assert (got.shape, got.dtype, got.is_contiguous()) == ((n, rank, cols), torch.float32, True)
    assert relative(got.double(), p.double() @ a) < 1e-6


def test_long_sums_are_cut_and_added(monkeypatch):
    grids = []
    for kernel in ("_times", "_transposed_times"):
        launched = getattr(gpu_low_rank, kernel)
        spy = type("Spy", (), {"__getitem__": lambda self, grid, launched=launched: grids.append(grid[0]) or launched[grid]})
        monkeypatch.setattr(gpu_low_rank, kernel, spy())
    for shape in ((1, 4, 600), (1, 600, 4)):
        g, q, p = random(*shape), random(1, 3, shape[2], seed=1), random(1, 3, shape[1], seed=2)
        assert relative(gpu_low_rank.times(g, None, q), g @ q.mT) < 3e-6
        assert relative(gpu_low_rank.transposed_times(g, None, p), p @ g) < 3e-6
    assert grids == [5, 10, 38, 19]


def test_what_is_not_finite_stays_so():
    g = random(1, 20, 30)
    g[0, 3, 5] = torch.nan
    assert gpu_low_rank.times(g, None, random(1, 2, 30))[0, 3].isnan().all()
    assert gpu_low_rank.transposed_times(g, None, random(1, 2, 20)).isnan().all(1)[0].nonzero().tolist() == [[5]]


def test_fp64_and_many_columns_are_left_to_torch():
    g = random(1, 6, 40)
    assert gpu_low_rank.times(g.double(), None, random(1, 2, 40, dtype=torch.float64)) is None
    assert gpu_low_rank.transposed_times(g.double(), None, random(1, 2, 6, dtype=torch.float64)) is None
    assert gpu_low_rank.times(g, None, random(1, 33, 40)) is None
    assert gpu_low_rank.times(g, (random(1, 40, 6).mT, None), random(1, 2, 40)) is None
