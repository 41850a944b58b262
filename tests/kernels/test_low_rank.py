"""The low-rank family's passes by numba against plain torch."""

import pytest
import torch

from hf_efcp import LowRankGGT, LowRankMFAC, kernels
from hf_efcp.core.accumulated import Accumulated, LowRankEntry
from hf_efcp.core.cells import Layout
from hf_efcp.core.linalg import inner
from hf_efcp.core.windows import LowRankWindow
from hf_efcp.kernels import calls
from tests.kernels.helpers import allocated, coded_error, plain_error
from tests.reference import parameters, relative, set_gradients

pytest.importorskip("numba")
SHAPES = pytest.mark.parametrize(("n", "rows", "cols", "rank"), [(1, 700, 33, 4), (3, 20, 64, 1), (2, 1, 5, 3), (1, 5, 300, 16)])
BF16 = {"error_dtype": "bf16", "window_dtype": "bf16", "weight_decay_mode": "l2", "weight_decay": 0.1}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def none_failed(monkeypatch):
    monkeypatch.setattr(calls, "FAILED", set())
    yield
    assert not calls.FAILED


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@SHAPES
@DTYPES
@pytest.mark.parametrize("error_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_products_of_e_plus_g(n, rows, cols, rank, dtype, error_dtype):
    g, q, p = random(n, rows, cols, dtype=dtype), random(n, rank, cols, dtype=dtype), random(n, rank, rows, dtype=dtype)
    e = None if error_dtype is None else random(n, rows, cols, dtype=error_dtype, seed=1)
    a = (g if e is None else g + e.to(dtype)).double()
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    stored = None if e is None else (e, None)
    found = kernels.times(g, stored, q), kernels.transposed_times(g, stored, p)
    for got, expected in zip(found, (a @ q.double().mT, p.double() @ a), strict=True):
        assert got.dtype == dtype
        assert relative(got.double(), expected) < bound


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inner_products_are_formed_in_fp64(n, rows, cols, rank, dtype):
    a, b = random(n, rows, cols, dtype=dtype), random(n, rank, cols, dtype=dtype, seed=1)
    assert relative(kernels.inner(a, b), a.double() @ b.double().mT) < 1e-14


def test_many_columns_are_left_to_torch():
    a = random(1, 20, 40)
    assert kernels.inner(a, a) is None
    assert relative(inner(a, a), a.double() @ a.double().mT) < 1e-14


def staged(n, rows, cols, rank, dtype):
    """An entry as a window stores it."""
    window = LowRankWindow(allocated(LowRankWindow.specs(Layout(rows, cols, dtype), 2, rank, dtype), n), dtype)
    window.stage(LowRankEntry.of(random(n, rows, rank, dtype=dtype) / 8, random(n, cols, rank, dtype=dtype, seed=1)))
    return window.staged


@SHAPES
@DTYPES
@pytest.mark.parametrize("error_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_error_is_torchs_and_rounded_by_the_same_numbers(n, rows, cols, rank, dtype, error_dtype, monkeypatch):
    errors = []
    for off in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_KERNELS", off)
        error = plain_error(random(n, rows, cols, dtype=error_dtype, seed=2), dtype, step=4)
        Accumulated(random(n, rows, cols, dtype=dtype, seed=3), error).keep(staged(n, rows, cols, rank, dtype))
        errors.append(error.buffer)
    # A sum in another order may be rounded to the next number of bf16.
    assert (errors[0] == errors[1]).double().mean() > (0.98 if error_dtype == torch.bfloat16 else 0)
    assert relative(errors[1].double(), errors[0].double()) < {torch.bfloat16: 3e-3}.get(error_dtype, 1e-6)


@SHAPES
@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
def test_errors_in_codes(n, rows, cols, rank, dtype, bits, monkeypatch):
    ends, g = [], random(n, rows, cols, dtype=dtype, seed=3)
    for off in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_KERNELS", off)
        error, entry = coded_error(bits, n, rows, cols, dtype), staged(n, rows, cols, rank, dtype)
        error.turn.step = torch.tensor(4)
        Accumulated(list(g), error).keep(entry)
        codes = error.buffer.clone()
        error.turn.step, error.turn.absent = torch.tensor(5), [0]
        Accumulated(list(g), error, [0]).keep(entry)
        assert torch.equal(error.buffer[0], codes[0])
        q, a = random(n, rank, cols, dtype=dtype), Accumulated(g, error).rows()
        products = kernels.times(g, error.stored, q) if off == "1" else a @ q.mT
        ends.append((a, products, error.scale))
    for mine, theirs in zip(*ends, strict=True):
        # A sum in another order may end at the next code.
        assert relative(mine.double(), theirs.double()) < (1e-3 if bits == 8 else 2e-2)


@pytest.mark.parametrize("cls", [LowRankMFAC, LowRankGGT])
@pytest.mark.parametrize(
    "options", [{}, {"error_dtype": "bf16", "window_dtype": "bf16", "weight_decay_mode": "l2", "weight_decay": 0.1}]
)
def test_a_run_is_that_of_plain_torch(cls, options, monkeypatch):
    ends = []
    for off in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_KERNELS", off)
        params = parameters(dtype=torch.float32 if options else torch.float64)
        optimizer = cls(params, 0.01, window_size=4, rank=2, update_rms=0.3, **options)
        for seed in range(10):
            set_gradients(params, torch.Generator().manual_seed(seed))
            if seed == 5:
                params[0].grad = None
            optimizer.step()
        ends.append(torch.cat([p.detach().double().flatten() for p in params]))
    assert relative(*ends) < (1e-2 if options else 1e-9)


def test_a_gradient_that_is_not_finite_is_skipped():
    params = parameters()
    optimizer = LowRankMFAC(params, 0.01, window_size=4, rank=2)
    set_gradients(params, torch.Generator().manual_seed(0))
    params[0].grad.view(-1)[0] = torch.inf
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_factors_are_rounded_to_the_nearest_bf16(dtype):
    factor, c = random(3, 5, 2, 701, dtype=dtype), random(3, 5, seed=1)
    factor[0, 0, 0, :4] = torch.tensor([1.00390625, 1.01171875, 3e38, -0.0])  # two ties, and what overflows
    c[0, 0], c[1, 1] = 1.0, 0.0
    c[0, 1] = 3e38
    expected = (factor.float() * c[:, :, None, None]).bfloat16()
    assert torch.equal(kernels.scaled(factor, c), expected)
    assert torch.equal(kernels.scaled(factor[:, 1:4, :, 5:40], c[:, 1:4]), expected[:, 1:4, :, 5:40])


@SHAPES
def test_an_update_in_bf16_is_added(n, rows, cols, rank):
    params, u = list(random(n, rows, cols)), random(n, rows, cols, dtype=torch.bfloat16, seed=1)
    expected = 0.9 * torch.stack(params).double() - 0.1 * u.double()
    assert kernels.add(params, u, -0.1, 0.9)
    assert relative(torch.stack(params).double(), expected) < 1e-7


def test_what_cannot_be_added_in_place_is_left_to_torch():
    u = random(1, 4, 6, dtype=torch.bfloat16)
    assert not kernels.add([random(1, 6, 4)[0].mT], u, 1.0, 1.0)
    assert not kernels.add([random(4, 6, dtype=torch.float64)], u, 1.0, 1.0)
    assert not kernels.add([random(4, 6)], u.float(), 1.0, 1.0)
