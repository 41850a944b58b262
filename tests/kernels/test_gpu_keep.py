"""Triton's keep, in its interpreter, against plain torch: every format of the error, every kind of entry."""

import importlib
import os

import pytest
import torch

from hf_efcp.core.accumulated import Accumulated, DenseEntry, LowRankEntry, SparseEntry
from hf_efcp.core.compressors import BlockTopK
from tests.kernels.helpers import coded_error, needs_tiles_of_one_number, plain_error
from tests.reference import few, relative

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "int8": 8, "int4": 4}
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS)
# scale, decay, absent, accepted
PLAIN = False, 1.0, [], True
CASES = [PLAIN, (True, 0.8, [1], torch.tensor(True)), (False, 0.8, [0], torch.tensor(False))]
# n, rows, cols, block: one row with several runs; tails; a block that is no multiple of a tile
SHAPES = [(2, 1, 600, 256), (2, 9, 301, 1024), (2, 3, 45, 16), (2, 2, 1, 1024)]


@pytest.fixture(scope="module")
def gpu_keep():
    return importlib.import_module("hf_efcp.kernels.gpu_keep")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error_of(format, n, rows, cols, dtype, absent=(), accepted=True):
    """An error that is not zero."""
    kind, e = FORMATS[format], random(n, rows, cols, dtype=dtype, seed=1)
    error = coded_error(kind, n, rows, cols, dtype) if isinstance(kind, int) else plain_error(e.to(kind), dtype)
    if isinstance(kind, int):
        error.write(e)
    error.turn.step, error.turn.absent, error.turn.ok = torch.tensor(4), absent, accepted
    return error


def both(gpu_keep, monkeypatch, format, g, entry, scale, decay, absent, accepted, changed=True):
    """The error after the kernel, and after plain torch, from the same numbers."""
    shape = (len(g), *g[0].shape)
    mine, theirs = (error_of(format, *shape, g[0].dtype, absent, accepted) for _ in range(2))
    turn, before = mine.turn, mine.read().clone()
    blocks = entry.grid.blocks if isinstance(entry, SparseEntry) else None
    rounding = turn.step, turn.ids, turn.origin
    assert gpu_keep.keep(mine.stored, g, entry.parts, rounding, absent, blocks, scale, decay, accepted)
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")
    Accumulated(g, theirs, absent, scale=scale, decay=decay).keep(entry)
    same = (mine.read() == before).flatten(1).all(1)
    assert same.tolist() == [i in absent or not changed for i in range(len(g))]
    return mine, theirs


def check(mine, theirs, exact):
    """A sum in another order may be rounded to the next number that can be stored."""
    for x, y in zip(mine.stored, theirs.stored, strict=True):
        if exact:
            assert x is y is None or torch.equal(x, y)
        elif x is not None and (not x.is_floating_point() or x.dtype == torch.bfloat16):
            assert (x == y).double().mean() > 0.98
    bound = {torch.bfloat16: 3e-3, torch.int8: 1e-3, torch.uint8: 2e-2}.get(mine.buffer.dtype, 1e-6)
    if mine.buffer.dtype == mine.dtype == torch.float64:
        bound = 1e-14
    assert relative(mine.read().double(), theirs.read().double()) < bound


def operands(n, rows, cols, dtype, scaled):
    scale = (random(n, rows, dtype=dtype, seed=4).abs(), random(n, cols, dtype=dtype, seed=5).abs()) if scaled else None
    return list(random(n, rows, cols, dtype=dtype, seed=3)), scale


@EVERY_FORMAT
@pytest.mark.parametrize(("scaled", "decay", "absent", "accepted"), CASES)
@pytest.mark.parametrize(("n", "rows", "cols", "block"), few(SHAPES, lambda s: s[1] in (2, 9)))
def test_a_sparse_entry_is_kept_back_as_by_torch(
    gpu_keep, monkeypatch, n, rows, cols, block, format, scaled, decay, absent, accepted
):
    if rows == 1 and "int" in format and accepted is not True:
        needs_tiles_of_one_number()
    dtype = torch.float64 if format == "fp64" else torch.float32
    g, scale = operands(n, rows, cols, dtype, scaled)
    grid = BlockTopK(cols, 0.02, block)
    entry = grid.compress(Accumulated(g, error_of(format, n, rows, cols, dtype)), torch.tensor(0))
    if cols == 1 and accepted is True:
        entry.parts[1].mul_(0.5)  # all that there is, is kept: e would be zero
    changed = accepted is True or bool(accepted)
    mine, theirs = both(gpu_keep, monkeypatch, format, g, entry, scale, decay, absent, accepted, changed)
    check(mine, theirs, exact=(scaled, decay) == PLAIN[:2] or not changed)


@EVERY_FORMAT
@pytest.mark.parametrize(("scaled", "decay", "absent", "accepted"), CASES)
@pytest.mark.parametrize(("n", "rows", "cols", "rank"), few([(2, 1, 600, 1), (2, 9, 301, 3)], lambda s: s[1] == 9))
def test_a_low_rank_entry_is_kept_back_as_by_torch(
    gpu_keep, monkeypatch, n, rows, cols, rank, format, scaled, decay, absent, accepted
):
    if rows == 1 and "int" in format and accepted is not True:
        needs_tiles_of_one_number()
    dtype = torch.float64 if format == "fp64" else torch.float32
    g, scale = operands(n, rows, cols, dtype, scaled)
    stored = torch.bfloat16 if scaled else dtype
    entry = LowRankEntry.of(random(n, rows, rank, dtype=stored, seed=6) / 4, random(n, cols, rank, dtype=stored, seed=7))
    changed = accepted is True or bool(accepted)
    mine, theirs = both(gpu_keep, monkeypatch, format, g, entry, scale, decay, absent, accepted, changed)
    check(mine, theirs, exact=not changed)


@EVERY_FORMAT
@pytest.mark.parametrize(("scaled", "decay", "absent", "accepted"), CASES)
@pytest.mark.parametrize(("n", "rows", "cols"), few([(2, 1, 600), (2, 9, 301)], lambda s: s[1] == 9))
def test_a_dense_entry_is_kept_back_as_by_torch(gpu_keep, monkeypatch, n, rows, cols, format, scaled, decay, absent, accepted):
    if rows == 1 and "int" in format and accepted is not True:
        needs_tiles_of_one_number()
    dtype = torch.float64 if format == "fp64" else torch.float32
    g, scale = operands(n, rows, cols, dtype, scaled)
    entry = DenseEntry(random(n, rows, cols, dtype=torch.bfloat16 if scaled else dtype, seed=6) / 4)
    changed = accepted is True or bool(accepted)
    mine, theirs = both(gpu_keep, monkeypatch, format, g, entry, scale, decay, absent, accepted, changed)
    check(mine, theirs, exact=(scaled, decay) == PLAIN[:2] or not changed)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_gradients_in_fp64_with_an_error_of_few_bits(gpu_keep, monkeypatch, format):
    g, _ = operands(2, 3, 301, torch.float64, False)
    grid = BlockTopK(301, 0.05, 128)
    entry = grid.compress(Accumulated(g), torch.tensor(0))
    check(*both(gpu_keep, monkeypatch, format, g, entry, None, 1.0, [], True), exact=True)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_run_with_a_number_that_is_not_finite_is_marked(gpu_keep, monkeypatch, format, bad):
    g, _ = operands(2, 2, 601, torch.float32, False)
    g[1][0, 300] = bad
    entry = SparseEntry(torch.zeros(2, 2, 3, dtype=torch.int16), torch.zeros(2, 2, 3), BlockTopK(601, 0.001, 256))
    mine, theirs = both(gpu_keep, monkeypatch, format, g, entry, None, 1.0, [], True)
    torch.testing.assert_close(mine.read(), theirs.read(), rtol=0, atol=0, equal_nan=True)
    assert mine.scale.isnan().nonzero().tolist() == [[1, 0, 1]]
    zero = 0 if format == "int8" else 0x88
    assert (mine.buffer[1, 0, 256 * FORMATS[format] // 8 : 512 * FORMATS[format] // 8] == zero).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_and_the_smallest_scales(gpu_keep, monkeypatch, format, dtype):
    range_ = torch.finfo(dtype)
    g = [torch.zeros(3, 5, dtype=dtype)]
    g[0][0, 1], g[0][1, 2], g[0][2, 4] = range_.max, range_.tiny, -range_.tiny * 1000
    entry = SparseEntry(torch.zeros(1, 3, 1, dtype=torch.int16), torch.zeros(1, 3, 1, dtype=dtype), BlockTopK(5, 0.1, 8))
    mine, theirs = both(gpu_keep, monkeypatch, format, g, entry, None, 0.0, [], True)
    assert mine.scale[0, 1] == 0 and mine.read().isfinite().all()
    check(mine, theirs, exact=True)


def test_indices_out_of_range_do_no_harm(gpu_keep):
    g = list(torch.ones(2, 3, 40))
    around = torch.zeros(4, 3, 40)
    indices = torch.tensor([-1, 16, 2**15 - 1, -(2**15), 15, 8], dtype=torch.int16).expand(2, 3, 6)
    rounding = torch.tensor(0), torch.arange(2), (0, 0)
    assert gpu_keep.keep((around[1:3], None), g, (indices, torch.ones(2, 3, 6)), rounding, [], (16, 2, 2))
    assert not around[0].any() and not around[3].any()
    assert (around[1:3] == 1).all()


def test_what_the_kernel_leaves_to_torch(gpu_keep):
    g, e = list(torch.ones(1, 3, 200)), torch.zeros(1, 3, 200)
    rounding, factors = (torch.tensor(0), torch.arange(1), (0, 0)), (torch.ones(1, 65, 3), torch.ones(1, 65, 200))
    sparse = torch.zeros(1, 3, 65, dtype=torch.int16), torch.ones(1, 3, 65)
    assert not gpu_keep.keep(None, g, factors, rounding, [])
    assert not gpu_keep.keep((e, None), g, factors, rounding, [])
    assert not gpu_keep.keep((e, None), g, sparse, rounding, [], (200, 65, 0))
    assert not gpu_keep.keep((torch.zeros(1, 200, 3).mT, None), g, [x[:, :2] for x in factors], rounding, [])
    assert not gpu_keep.keep((e, None), [x.half() for x in g], [x[:, :2] for x in factors], rounding, [])
    assert gpu_keep.keep((e, None), g, [x[:, :2] for x in factors], rounding, [], accepted=False)
    assert not e.any()
