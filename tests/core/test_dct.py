"""The cosine basis from its sum, the Fourier transform against it, and the choice of columns."""

import math

import pytest
import torch

from hf_efcp.core import dct
from hf_efcp.core.accumulated import Accumulated
from hf_efcp.core.cells import Layout
from hf_efcp.core.columns import Columns, carried
from tests.reference import relative

CPU = torch.device("cpu")
SIZES = [1, 2, 3, 7, 8, 30, 193, 256]


def summed(size):
    """D, (size, size), from its definition."""
    return torch.tensor(
        [
            [math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * k * (2 * j + 1) / (2 * size)) for k in range(size)]
            for j in range(size)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_basis_is_orthonormal_and_both_products_with_it_are_those_of_its_sum(size):
    d = dct.basis(size, torch.float64, CPU)
    torch.testing.assert_close(d, summed(size), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.T @ d, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    for method in ("matmul", "fft", "auto"):
        assert relative(dct.transform(x, method), x @ summed(size)) < 1e-13
        assert relative(dct.transform(x.mT.contiguous().mT.float(), method).double(), x @ summed(size)) < 1e-6


def test_auto_is_the_matrix_below_the_measured_size_and_the_fourier_transform_from_it_on(monkeypatch):
    asked = []
    monkeypatch.setattr(dct, "dct", lambda x: asked.append(x.shape[-1]) or x)
    for size in (dct.FFT_FROM["cpu"] - 1, dct.FFT_FROM["cpu"]):
        dct.transform(torch.zeros(1, 1, size))
    assert asked == [dct.FFT_FROM["cpu"]]


def test_one_basis_serves_all_who_ask():
    assert dct.basis(17, torch.float32, CPU) is dct.basis(17, torch.float32, CPU)
    assert dct.basis(17, torch.float32, CPU) is not dct.basis(17, torch.float64, CPU)


@pytest.mark.parametrize("ell_norm", [1, 2])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
def test_the_columns_of_largest_norm_are_chosen_and_the_rest_is_lost(shape, ell_norm):
    a = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = Columns(Layout(*shape, torch.float64), 5, ell_norm)
    i, h = columns.choose(Accumulated(a))
    for a_i, i_i, h_i, lost in zip(a, i, h, columns.entry(columns.vectors(i), h).subtract_from_(a.clone()), strict=True):
        s = (a_i if shape[0] > shape[1] else a_i.T) @ summed(12)
        best = torch.linalg.vector_norm(s, ell_norm, dim=0).topk(5).indices.sort().values
        assert torch.equal(i_i, best)
        assert relative(h_i, s[:, best]) < 1e-13
        assert lost.square().sum().item() == pytest.approx((s.square().sum() - s[:, best].square().sum()).item())
    torch.testing.assert_close(columns.times(Accumulated(a), columns.vectors(i)), h, rtol=0, atol=1e-13)


def test_both_sides_agree_on_the_transposed_matrix():
    a = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (i, h), (j, k) = (Columns(Layout(*x.shape[1:], torch.float64), 4).choose(Accumulated(x)) for x in (a, a.mT.contiguous()))
    assert torch.equal(i, j) and relative(h, k) < 1e-14


@pytest.mark.parametrize("shape", [(700, 8), (8, 700)], ids=str)
def test_a_large_matrix_is_transformed_a_part_at_a_time(shape, monkeypatch):
    a = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    columns = Columns(Layout(*shape, torch.float64), 3)
    i, h = columns.choose(Accumulated(a))
    for name in ("columns", "linalg"):
        monkeypatch.setattr(f"hf_efcp.core.{name}.chunk_bytes", lambda device: 8 * 8 * 100)
    assert len(list(columns._transformed(Accumulated(a)))) == 7
    j, k = columns.choose(Accumulated(a))
    assert torch.equal(i, j) and relative(k, h) < 1e-13


def test_columns_that_differ_by_rounding_only_are_chosen_by_their_number():
    """A row of equal numbers lies along column 0 alone: the others have norms that are rounding errors, or 0."""
    a = torch.ones(1, 20, 8) + torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(3)) * 1e-7
    assert Columns(Layout(20, 8, torch.float32), 3).choose(Accumulated(a))[0].tolist() == [[0, 1, 2]]
    tiny = 1e-30 * torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(3))
    by_size = [Columns(Layout(20, 8, torch.float32), 3, 2).choose(Accumulated(x))[0].tolist() for x in (tiny, tiny * 1e30)]
    assert by_size[0] == by_size[1]


def test_carrying_by_index_is_the_product_of_both_bases():
    generator = torch.Generator().manual_seed(4)
    d, x = summed(9), torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)
    old, new = (torch.stack([torch.randperm(9, generator=generator)[:4].sort().values for _ in range(6)]) for _ in range(2))
    for i, moved in enumerate(carried(x, old, new, 9)):
        torch.testing.assert_close(moved, x[i] @ d[:, old[i]].T @ d[:, new[i]], rtol=0, atol=1e-12)
