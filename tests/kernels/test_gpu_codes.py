"""Triton's kernels of windows in few bits, in its interpreter: codes bit for bit those of `core.codecs`, and whole windows."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp import kernels
from hf_efcp.core.accumulated import DenseEntry, LowRankEntry, SparseEntry
from hf_efcp.core.cells import Layout
from hf_efcp.core.codecs import BlockQuantizer, SparseCodec, decode_float8, encode_float8
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.low_bit_windows import LowBitDenseWindow, LowBitLowRankWindow, LowBitSparseWindow
from hf_efcp.kernels import calls, gpu_codes, gpu_windows
from hf_efcp.kernels.devices import pretending
from tests.kernels.helpers import allocated
from tests.reference import few, relative

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# n, m, rows, cols: a run, runs and a tail, rows that are shorter than one, one number in a row
SHAPES = pytest.mark.parametrize(("n", "m", "rows", "cols"), [(2, 3, 1, 256), (1, 9, 3, 700), (3, 2, 20, 33), (2, 4, 3, 2)])
few_shapes = pytest.mark.parametrize(*SHAPES.args[:1], few(SHAPES.args[1], lambda s: s[1] in (2, 9)))
INT8 = BlockQuantizer(8)
# E4M3 has no larger number, times the codec's scale; beyond, newer versions of torch no longer give NaN.
LARGEST_FLOAT8 = 464 / 256


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def halves(cols, dtype):
    """Numbers that lie just between two codes of int8, of either sign, beside 127."""
    return torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127.0), torch.zeros(max(0, cols - 255))])[:cols].to(dtype)


@DTYPES
@pytest.mark.parametrize("cols", [1, 255, 256, 257, 700])
def test_int8_is_that_of_the_codec(cols, dtype):
    range_ = torch.finfo(dtype)
    x = random(2, 12, cols, dtype=dtype)
    x[:, 1], x[:, 2], x[:, 3] = 0, range_.tiny / 4, range_.max
    x[:, 4], x[:, 5] = halves(cols, dtype), 3 * halves(cols, dtype)
    x[:, 6] *= range_.tiny * 100
    codes, scales, numbers = gpu_codes.encode(x, False, False)
    expected = INT8.encode(x)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert torch.equal(numbers, INT8.decode(*expected, cols))
    assert torch.equal(gpu_codes.encode(x, False, True)[0], codes) and torch.equal(x, numbers)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_run_that_is_not_finite_comes_back_as_nan(bad):
    x = random(1, 2, 600)
    x[0, 1, 300] = bad
    _, scales, numbers = gpu_codes.encode(x, False, False)
    codes, expected = INT8.encode(x)
    torch.testing.assert_close(scales, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(numbers, INT8.decode(codes, expected, 600), rtol=0, atol=0, equal_nan=True)
    assert gpu_codes.encode(torch.full((1, 1, 2), bad), True, False)[2].isnan().all()


@DTYPES
def test_e4m3_is_that_of_torch(dtype):
    every = torch.arange(256, dtype=torch.uint8)
    numbers = decode_float8(every, dtype)
    between = (numbers[:-1] + numbers[1:]) / 2  # ties, also between the largest number and NaN
    bits = torch.arange(0, 2**31, 99_991, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([numbers, between, numbers * 1.0001, bits, random(999), random(999) * 1e-4]).to(dtype)
    x = torch.cat([x, -x])[None, None]
    x[x.abs() > LARGEST_FLOAT8] = 1
    codes, scales, back = gpu_codes.encode(x, True, False)
    assert torch.equal(codes, encode_float8(x)) and not scales.numel()
    torch.testing.assert_close(back, decode_float8(codes, dtype), rtol=0, atol=0, equal_nan=True)
    assert codes.unique().numel() == 256


@DTYPES
@pytest.mark.parametrize(("cols", "block", "kept", "tail"), [(70, 32, 3, 1), (64, 8, 8, 0), (1500, 1024, 10, 5), (9, 9, 4, 0)])
def test_sparse_entries_are_those_of_the_codec(cols, block, kept, tail, dtype):
    codec, per_row = SparseCodec(block, cols // block, kept, tail), cols // block * kept + tail
    indices = torch.randint(0, min(block, cols), (2, 11, per_row), dtype=torch.int16)
    indices[0, 0, 0] = block - 1
    values, range_ = random(2, 11, per_row, dtype=dtype), torch.finfo(dtype)
    values[:, 1], values[:, 2], values[:, 3] = 0, range_.max, range_.tiny
    values[:, 4], values[:, 5], values[:, 6] = 31.0, 62.0 * 2.0**-140, 31.0 * 2.0**-127
    values[:, 7] = torch.arange(per_row) + 0.5
    values[:, 8, 0], values[:, 9, 0] = torch.nan, -torch.inf
    values[:, 10] = 1e-45
    entries, scales, numbers = gpu_codes.encode_sparse(indices, values, (block, kept, tail), cols)
    expected = codec.encode(indices, values)
    assert torch.equal(entries, expected[0]) and torch.equal(scales, expected[1])
    torch.testing.assert_close(numbers, codec.decode(*expected, dtype)[1], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def fast(monkeypatch):
    """Let the windows go the way of a GPU; give the names of the kernels that ran."""
    used, attempt = [], kernels._try
    monkeypatch.setattr(calls, "FAILED", set())

    def noted(name, *args):
        result = attempt(name, *args)
        used.extend([name] * (result is not None and result is not False))
        return result

    monkeypatch.setattr(kernels, "_try", noted)
    with pretending("cuda"):
        yield used
    assert not calls.FAILED


def dense(n, m, rows, cols, dtype, update):
    specs = LowBitDenseWindow.specs(Layout(rows, cols, dtype), m, dtype)
    return LowBitDenseWindow(allocated(specs, n), dtype, update), lambda seed: DenseEntry(
        random(n, rows, cols, dtype=dtype, seed=seed)
    )


def low_rank(n, m, rows, cols, dtype, update):
    rank = min(3, rows, cols)
    specs = LowBitLowRankWindow.specs(Layout(rows, cols, dtype), m, rank, dtype)

    def entry(seed):
        p = torch.linalg.qr(random(n, rows, rank, dtype=dtype, seed=seed)).Q
        return LowRankEntry.of(p, random(n, cols, rank, dtype=dtype, seed=seed + 100))

    return LowBitLowRankWindow(allocated(specs, n), dtype, update), entry


def sparse(n, m, rows, cols, dtype, update):
    grid = BlockTopK(cols, 0.03, 128)
    specs = LowBitSparseWindow.specs(Layout(rows, cols, dtype), m, grid, dtype)

    def entry(seed):
        indices = torch.empty(n, rows, grid.per_row, dtype=torch.int16)
        values = torch.empty(indices.shape, dtype=dtype)
        grid.choose(random(n, rows, cols, dtype=dtype, seed=seed), indices, values)
        return SparseEntry(indices, values, grid)

    return LowBitSparseWindow(allocated(specs, n), dtype, grid), entry


def run(kind, shape, dtype, update, sized, part):
    """What a window gives and holds: inner products, G^T c and parameters that it was added to, buffers, staged entry."""
    n, m, rows, cols = shape
    window, entry = kind(*shape, dtype, update)
    for slot in range(m - 1):  # the last one stays empty
        window.stage(entry(slot))
        window.commit(torch.tensor([slot]))
    nothing, staged = entry(51), entry(50)
    for x in nothing.parts:
        x.zero_()
    window.stage(nothing)
    assert not any(x.any() for x in window.staged.parts[-1:])
    window.stage(staged)
    found = {"dots": window.dots(torch.tensor([0])), "combine": window.combine(random(n, m, dtype=torch.float64), part)}
    params, sizes = (
        list(random(n, rows, cols, dtype=dtype, seed=60)),
        (random(n, rows, dtype=dtype), random(n, cols, dtype=dtype)),
    )
    if window.apply(random(n, m, dtype=torch.float64), params, -0.3, 0.9, sizes if sized else None):
        found["apply"] = torch.stack(params)
    return found, [*window.buffers.values(), *window._codes, *window.staged.parts]


# What each window has kernels for.
KERNELS = {
    dense: {"encode", "dense_dots", "dense_combine", "store"},
    low_rank: {"encode", "factor_dots", "decode", "add", "store"},
    sparse: {"encode_sparse", "dots", "combine", "apply", "store"},
}


@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("dtype", "update"),
    [
        pytest.param(torch.float32, None, id="fp32"),
        pytest.param(torch.float64, None, id="fp64", marks=pytest.mark.slow),
        pytest.param(torch.float32, torch.bfloat16, id="bf16", marks=pytest.mark.slow),
    ],
)
@few_shapes
def test_a_window_is_that_of_plain_torch(kind, n, m, rows, cols, dtype, update, fast, monkeypatch):
    tolerance = {"dots": 1e-13, "combine": 1e-15 if dtype == torch.float64 else 1e-6}
    tolerance["apply"] = 5e-3 if update == torch.bfloat16 and kind is low_rank else 10 * tolerance["combine"]
    for sized, part in ((False, None), (True, slice(rows // 2, rows))):
        mine, held = run(kind, (n, m, rows, cols), dtype, update, sized, part)
        with monkeypatch.context() as patch:
            patch.setenv("HF_EFCP_KERNELS", "0")
            theirs, expected = run(kind, (n, m, rows, cols), dtype, update, sized, part)
        assert len(held) == len(expected) and all(map(torch.equal, held, expected))
        for name in mine.keys() & theirs.keys():
            if kind is low_rank and update == torch.bfloat16:
                tolerance["combine"] = 5e-3
            assert relative(mine[name].double(), theirs[name].double()) < tolerance[name], name
    assert KERNELS[kind] <= set(fast)


def test_what_the_kernels_leave_to_torch():
    x = random(1, 2, 40)
    assert gpu_codes.encode(x.half(), False, False) is None
    assert gpu_codes.encode(x.mT, False, True) is None
    assert gpu_codes.encode_sparse(torch.zeros(1, 2, 3, dtype=torch.int16), x[..., :3].bfloat16(), (40, 3, 0), 40) is None
    codes, scales = (y[None] for y in INT8.encode(random(3, 2, 300)))
    compute = torch.float32, torch.float32
    assert gpu_windows.decode(codes[..., 7:], scales, compute, None, None) is None
    assert gpu_windows.decode(codes, scales.mT.contiguous().mT, compute, None, None) is None
    assert gpu_windows.decode(codes, scales.double(), compute, None, None) is None
    assert gpu_windows.decode(codes, scales, (torch.float64, torch.bfloat16), None, None) is None
    assert torch.equal(
        gpu_windows.decode(codes[:, 1:], scales[:, 1:], compute, None, None), INT8.decode(codes, scales, 300)[:, 1:]
    )
