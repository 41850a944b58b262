"""The kernels of the metric, and those of the product in bf16, by numba against plain torch; Triton's in its interpreter."""

import pytest
import torch

from hf_efcp import kernels
from hf_efcp.core.accumulated import Accumulated, LowRankEntry
from hf_efcp.core.cells import Layout
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.metric import scaled_
from hf_efcp.core.moments import measured, squares
from hf_efcp.core.windows import LowRankWindow
from hf_efcp.kernels import calls
from tests.kernels.helpers import allocated, coded_error, plain_error
from tests.kernels.test_low_rank import DTYPES, SHAPES, random, staged
from tests.kernels.test_sparse import EVERY_DTYPE, EVERY_FORMAT, EVERY_SHAPE, compressed, window_of
from tests.reference import relative

pytest.importorskip("numba")
CPU = pytest.mark.parametrize("module", ["cpu"], indirect=True)
# fp32 and fp64 as they are, bf16, int8, int4.
FORMATS = [torch.float64, torch.float32, torch.bfloat16, 8, 4]
ERRORS = pytest.mark.parametrize("error", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def none_failed(monkeypatch):
    monkeypatch.setattr(calls, "FAILED", set())
    yield
    assert not calls.FAILED


def scale_of(n, rows, cols, dtype):
    """x (n, rows) and y (n, cols), e^-2 to e^2; one column is cut off, as where D is 0."""
    generator = torch.Generator().manual_seed(5)
    x, y = ((4 * torch.rand(n, k, generator=generator, dtype=torch.float64) - 2).exp().to(dtype) for k in (rows, cols))
    y[-1, cols // 2] = 0
    return x, y


def error_of(kind, n, rows, cols, dtype):
    """An error with numbers in it, in a format; None: none."""
    if kind is None:
        return None
    e = random(n, rows, cols, dtype=dtype, seed=7)
    if isinstance(kind, torch.dtype):
        return plain_error(e.to(kind, copy=True), dtype, step=4)
    error = coded_error(kind, n, rows, cols, dtype)
    error.turn.ok = True
    error.write(e)
    return error


def both(plain, function):
    """What the kernels give, and what plain torch gives."""
    return function(), plain(function)


# Sums of squares ---------------------------------------------------------------------------------------------------------


@SHAPES
@DTYPES
def test_squares_are_summed_in_fp64(n, rows, cols, rank, dtype, plain):
    g = random(n, rows, cols, dtype=dtype)
    fast, slow = both(plain, lambda: squares(g))
    assert kernels.squares(g) is not None
    for got, expected, dim in zip(fast, slow, (2, 1), strict=True):
        assert got.dtype == expected.dtype == torch.float64
        assert relative(got, g.double().square().sum(dim)) < 1e-14
        assert relative(expected, g.double().square().sum(dim)) < 1e-14


def test_squares_of_views_and_lists(plain):
    g = random(3, 20, 30)
    expected = plain(squares, g)
    for odd in ([x.mT.contiguous().mT for x in g], list(g), [(-x)._neg_view() for x in g]):
        for got, sums in zip(squares(odd), expected, strict=True):
            torch.testing.assert_close(got, sums, rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 3e38])
def test_squares_beyond_the_range_of_fp32(size):
    """1e-25 squared is 0 in fp32, 1e25 squared is infinite."""
    rows, cols = kernels.squares(torch.full((1, 4, 5), size))
    stored = torch.tensor(size).double().square()
    torch.testing.assert_close(rows[0], (5 * stored).expand(4), rtol=1e-14, atol=0)
    torch.testing.assert_close(cols[0], (4 * stored).expand(5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_squares_of_what_is_not_finite(bad):
    g = torch.ones(1, 6, 9)
    g[0, 2, 3] = bad
    rows, cols = kernels.squares(g)
    assert not rows[0, 2].isfinite() and not cols[0, 3].isfinite()
    assert rows.isfinite().sum() == 5 and cols.isfinite().sum() == 8


def state_of(n, rows, cols, dtype):
    """r, c and counts; the last tensor has seen nothing."""
    r, c = (random(n, k, dtype=dtype, seed=k).square() for k in (rows, cols))
    c[-1], r[-1] = 0, 0
    return r, c, torch.tensor([3, 1, 0][-n:])


@SHAPES
@DTYPES
@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_the_factors_of_a_metric_are_those_of_its_formulas(n, rows, cols, rank, dtype, beta, plain):
    g, (r, c, count) = random(n, rows, cols, dtype=dtype), state_of(n, rows, cols, dtype)
    assert kernels.measure(list(g), r, c, count, beta, 1e-3) is not None
    new = (beta * r.double() + (1 - beta) * g.double().square().mean(2)).to(dtype)
    mu, k = c.double().mean(1, keepdim=True), count[:, None].double()
    more = torch.where(k > 0, 1e-3 * mu / (1 - beta**k), 0.0)
    left, right = new.double() / (1 - beta ** (k + 1)) + more, torch.where(k > 0, c.double() / mu + 1e-3, 1.0)
    expected = (
        *(new, (left**-0.25).to(dtype), (right**-0.25).to(dtype)),
        *((left[:, :, None] * right[:, None]).sqrt().sum((1, 2)), g.double().square().sum(1)),
    )
    for results in both(plain, lambda: measured(list(g), r, c, count, beta, 1e-3)):
        for got, wanted in zip(results, expected, strict=True):
            bound = 1e-13 if wanted.dtype == torch.float64 else 2e-7  # one number of fp32
            assert got.dtype == wanted.dtype and relative(got.double(), wanted.double()) < bound


@DTYPES
def test_rows_of_zeros_and_rows_that_are_not_finite_are_measured_as_by_torch(dtype, plain):
    g, zeros = torch.zeros(2, 40, 9, dtype=dtype), [torch.zeros(2, k, dtype=dtype) for k in (40, 9)]
    g[0, 3:], g[0, 7, 2], g[0, 20, 1], g[1, 5, 0] = 1.0, torch.nan, torch.inf, 1e-12
    count = torch.zeros(2, dtype=torch.int64)
    for r, x, y, square, cols in both(plain, lambda: measured(g, *zeros, count, 0.5, 1e-3)):
        assert (x[0, :3] == 0).all() and (x[1, 6:] == 0).all() and not cols[0, 1].isfinite() and cols[0, 3].isfinite()
        assert x.isnan().nonzero().tolist() == [[0, 7], [0, 20]] and not r[0, 7].isfinite() and not r[0, 20].isfinite()
        assert not square[0].isfinite() and square[1].isfinite() and (y == 1).all()
        torch.testing.assert_close(x[0, 4], torch.ones((), dtype=dtype))


def test_what_is_measured_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr("hf_efcp.kernels.cpu_threads._SMALL", 1)
    g, state = random(3, 37, 50), state_of(3, 37, 50, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.measure(g, *state, 0.9, 1e-3))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


# a = e + diag(x) g diag(y), low rank -------------------------------------------------------------------------------------


@SHAPES
@DTYPES
@pytest.mark.parametrize("error", [None, *FORMATS], ids=str)
def test_products_of_a_scaled_gradient(n, rows, cols, rank, dtype, error, plain):
    g, scale, e = random(n, rows, cols, dtype=dtype), scale_of(n, rows, cols, dtype), error_of(error, n, rows, cols, dtype)
    q, p = random(n, rank, cols, dtype=dtype, seed=1), random(n, rank, rows, dtype=dtype, seed=2)
    stored = None if e is None else e.stored
    a = Accumulated(g, e, scale=scale)
    dense = scaled_(g.double().clone(), [s.double() for s in scale]) + (0 if e is None else e.read().double())
    expected, bound = (dense @ q.double().mT, p.double() @ dense), 1e-14 if dtype == torch.float64 else 1e-6
    kernel = kernels.times(g, stored, q, scale), kernels.transposed_times(g, stored, p, scale)
    assert all(x is not None for x in kernel)
    fast, slow = both(plain, lambda: (a.times(q.mT), a.transposed_times(p.mT).mT))
    for products in (kernel, fast, slow):
        for got, wanted in zip(products, expected, strict=True):
            assert got.dtype == dtype and relative(got.double(), wanted) < bound


@SHAPES
@DTYPES
@ERRORS
def test_the_error_of_a_scaled_gradient_after_a_low_rank_entry(n, rows, cols, rank, dtype, error, plain):
    ends = []
    g, scale = random(n, rows, cols, dtype=dtype, seed=3), scale_of(n, rows, cols, dtype)
    for fast in (True, False):
        e, entry = error_of(error, n, rows, cols, dtype), staged(n, rows, cols, rank, dtype)
        first = e.buffer[0].clone()
        for absent in ([], [0]):
            e.turn.absent, e.turn.step = absent, torch.tensor(5 + len(absent))
            kept = Accumulated(list(g), e, absent, scale=scale).keep
            kept(entry) if fast else plain(kept, entry)
            assert torch.equal(e.buffer[0], first) == bool(absent)
            first = e.buffer[0].clone()
        ends.append(e.read().double())
    # A sum in another order may be rounded to the next number of bf16, or end at the next code.
    assert relative(*ends) < {torch.bfloat16: 3e-3, 8: 1e-3, 4: 2e-2, torch.float64: 1e-6}.get(error, 1e-6)


# ... sparse --------------------------------------------------------------------------------------------------------------


def beside_torch(module, plain, n, rows, cols, block, density, dtype):
    """The entries of a scaled gradient, without an error and with one in `dtype`."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    g, grid, scale = random(n, rows, cols, dtype=compute), BlockTopK(cols, density, block), scale_of(n, rows, cols, compute)
    for error in (None, plain_error(random(n, rows, cols, dtype=compute, seed=1).to(dtype), compute)):
        entries = both(plain, lambda error=error: grid.compress(Accumulated(list(g), error, scale=scale), torch.tensor(0)))
        assert [(x.shape, x.dtype) for x in entries[0].parts] == [(x.shape, x.dtype) for x in entries[1].parts]
        assert torch.equal(*(entry.dense() for entry in entries))
        assert not torch.equal(entries[0].dense(), plain(compressed, grid, g, error).dense())  # the scale has an effect
    assert module == ["top_k"] * 2


@CPU
@EVERY_DTYPE
@EVERY_SHAPE
def test_top_k_of_a_scaled_gradient(module, plain, n, rows, cols, block, density, dtype):
    beside_torch(module, plain, n, rows, cols, block, density, dtype)


@pytest.mark.parametrize("module", ["gpu"], indirect=True)
@EVERY_DTYPE
def test_top_k_of_a_scaled_gradient_by_triton(module, plain, dtype):
    beside_torch(module, plain, 2, 2, 20, 16, 0.2, dtype)


@CPU
@ERRORS
@EVERY_SHAPE
def test_a_sparse_entry_of_a_scaled_gradient_and_its_error(module, plain, n, rows, cols, block, density, error):
    compute = torch.float64 if error == torch.float64 else torch.float32
    g, scale, ends = random(n, rows, cols, dtype=compute), scale_of(n, rows, cols, compute), []
    grid = BlockTopK(cols, density, block)
    for run in (lambda f, *args: f(*args), plain):
        window, _ = plain(window_of, n, rows, cols, block, density, compute)
        e = error_of(error, n, rows, cols, compute)
        for step in range(3):
            e.turn.step, e.turn.absent = torch.tensor(step), [n - 1] if step == 1 else []
            a = Accumulated(list(g), e, e.turn.absent, scale=scale)
            entry = run(grid.compress, a, torch.tensor(step))
            run(a.keep, window.staged)
        ends.append([x for x in (*e.stored, entry.dense()) if x is not None])
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine, theirs)
    assert module == ["top_k", "keep"] * 3


# u = diag(x) G^T c diag(y) -----------------------------------------------------------------------------------------------


@CPU
@EVERY_FORMAT
@EVERY_SHAPE
def test_apply_with_factors_is_the_scaled_update_and_a_sum(module, plain, n, rows, cols, block, density, dtype):
    window, c = plain(window_of, n, rows, cols, block, density, dtype)
    scale = scale_of(n, rows, cols, window.compute_dtype)
    params = list(torch.randn(n, rows, cols, dtype=window.compute_dtype))
    expected = 0.9 * torch.stack(params) - 0.3 * scaled_(plain(window.combine, c), scale)
    assert window.apply(c, params, -0.3, 0.9, scale)
    tolerance = 1e-13 if window.compute_dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.stack(params), expected, rtol=tolerance, atol=tolerance)
    assert module == ["apply"]


@SHAPES
@pytest.mark.parametrize("update", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_low_rank_window_applies_factors(n, rows, cols, rank, stored, update, plain):
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    update = None if dtype == torch.float64 else update
    window = LowRankWindow(allocated(LowRankWindow.specs(Layout(rows, cols, dtype), 3, rank, stored), n), dtype, update)
    for slot in range(3):
        p, q = random(n, rows, rank, dtype=dtype, seed=slot), random(n, cols, rank, dtype=dtype, seed=9 + slot)
        window.stage(LowRankEntry.of(p, q))
        window.commit(torch.tensor([slot]))
    c, scale, ends = random(n, 3, dtype=torch.float64), scale_of(n, rows, cols, dtype), []
    u = torch.einsum("nm,nmrx,nmry->nxy", c, window.buffers["window_p"].double(), window.buffers["window_q"].double())
    u = scaled_(u, [s.double() for s in scale])
    for fast in (True, False):
        params = list(random(n, rows, cols, dtype=dtype, seed=4))
        run = (lambda f, *args: f(*args)) if fast else plain
        assert run(window.apply, c, params, -0.3, 0.9, scale)
        ends.append(torch.stack(params).double() - 0.9 * random(n, rows, cols, dtype=dtype, seed=4).double())
    for moved in ends:
        assert relative(moved, -0.3 * u) < (1e-13 if dtype == torch.float64 else 1e-5 if update is None else 1e-2)
    assert update is None or relative(*ends) < 1e-2


@SHAPES
@pytest.mark.parametrize("with_sizes", [False, True])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_scaled_and_rounded_once(n, rows, cols, rank, dtype, with_c, with_sizes):
    """To the nearest number of bf16, ties to even, as torch rounds."""
    factor, c = random(n, 3, rank, cols, dtype=dtype), random(n, 3, seed=1) if with_c else None
    sizes = scale_of(n, rows, cols, torch.float32)[1] if with_sizes else None
    got = kernels.scaled(factor, c, sizes)
    expected = factor.float() * (1 if c is None else c[:, :, None, None])
    expected = (expected if sizes is None else expected * sizes[:, None, None]).to(torch.bfloat16)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_what_the_bf16_kernels_leave_to_torch():
    factor, c, sizes = random(1, 3, 2, 8), random(1, 3), random(1, 8)
    assert kernels.scaled(factor.double(), c, sizes) is None
    assert kernels.scaled(factor, c.double(), sizes) is None
    assert kernels.scaled(factor, c, sizes.double()) is None
    assert not kernels.add([random(4, 5)], random(1, 4, 5), 1.0, 1.0)
    assert not kernels.add([random(4, 5, dtype=torch.float64)], random(1, 4, 5).bfloat16(), 1.0, 1.0)


@SHAPES
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_an_update_in_bf16_is_added(n, rows, cols, rank, decay):
    params, u = list(random(n, rows, cols)), random(n, rows, cols, seed=1).bfloat16()
    expected = decay * torch.stack(params).double() - 0.3 * u.double()
    assert kernels.add(params, u, -0.3, decay)
    assert relative(torch.stack(params).double(), expected) < 1e-6
