"""The fast kernels against plain torch: numba on CPU tensors, Triton in its interpreter."""

import importlib
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hf_efcp import SparseGGT, SparseMFAC
from hf_efcp.core.accumulated import Accumulated
from hf_efcp.core.cells import Layout
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.low_bit_windows import LowBitSparseWindow
from hf_efcp.core.sparse_window import SparseWindow
from hf_efcp.kernels import calls
from tests.kernels.helpers import allocated, coded_error, plain_error
from tests.reference import few, parameters, relative, set_gradients, update_of

STEP = torch.tensor(0)
# n, rows, cols, block, density: one block, a ragged tail, many blocks, k = 1, tiny rows, a full block, one row
SHAPES = [
    (2, 5, 24, 1024, 0.15),
    (1, 3, 70, 32, 0.1),
    (2, 2, 40, 8, 0.3),
    (1, 4, 200, 200, 0.001),
    (2, 3, 3, 1024, 0.4),
    (1, 2, 10, 4, 1.0),
    (1, 1, 1500, 1024, 0.01),
]
EVERY_SHAPE = pytest.mark.parametrize(("n", "rows", "cols", "block", "density"), SHAPES)
# The shapes of many blocks and of tiny rows take as long as all others in Triton's interpreter.
FEW_SHAPES = pytest.mark.parametrize(EVERY_SHAPE.args[0], few(SHAPES, lambda s: s[4] not in (0.3, 0.4, 1.0)))
LOW_BIT = "low_bit"
EVERY_FORMAT = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, LOW_BIT], ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def on_gpu_kernels():
    return calls.MODULES["dots"]["cpu"] == "gpu_sparse"


def compressed(grid, gradients, error=None):
    """The entry of e + g."""
    return grid.compress(Accumulated(gradients, error), STEP)


@EVERY_DTYPE
@FEW_SHAPES
def test_top_k_is_that_of_torch(module, plain, n, rows, cols, block, density, dtype):
    generator = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a, e = (torch.randn(n, rows, cols, generator=generator, dtype=compute) for _ in range(2))
    grid = BlockTopK(cols, density, block)
    for error in (None, plain_error(e.to(dtype), compute)):
        mine, theirs = compressed(grid, a, error), plain(compressed, grid, a, error)
        assert [(x.shape, x.dtype) for x in mine.parts] == [(x.shape, x.dtype) for x in theirs.parts]
        assert torch.equal(mine.dense(), theirs.dense())
    assert module == ["top_k"] * 2


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@pytest.mark.parametrize("kept", [1, 3, 16, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("values", ["normal", "few", "rising", "falling", "one", "subnormal"])
def test_top_k_however_much_is_kept_and_however_it_is_distributed(module, kept, values):
    cols = 257
    a = {
        "normal": torch.randn(1, 4, cols),
        "few": torch.randint(-3, 4, (1, 4, cols)).float(),
        "rising": torch.arange(4.0 * cols).view(1, 4, cols),
        "falling": -torch.arange(4.0 * cols).flip(0).view(1, 4, cols),
        "one": torch.zeros(1, 4, cols).index_fill_(2, torch.tensor(200), 5.0),
        "subnormal": torch.randn(1, 4, cols) * 1e-42,
    }[values]
    indices, values = compressed(BlockTopK(cols, kept / cols, cols), a).parts
    assert torch.equal(values, a.gather(2, indices.long()))
    assert all(len(set(row)) == kept for row in indices[0].tolist())
    assert torch.equal(values.abs().sort(-1).values, a.abs().topk(kept).values.sort(-1).values)


def test_top_k_of_gradients_that_are_views(module):
    a = torch.randn(2, 6, 40)
    grid = BlockTopK(40, 0.1, 40)
    expected = compressed(grid, -a).parts[1]
    for odd in ([x._neg_view() for x in a], [-x.mT.contiguous().mT for x in a], list((-a).expand(2, 6, 40))):
        assert torch.equal(compressed(grid, odd).parts[1].sort(-1).values, expected.sort(-1).values)


def test_top_k_of_ties_zeros_and_what_is_not_finite(module):
    grid = BlockTopK(200, 0.02, 100)
    for a in (torch.zeros(1, 2, 200), torch.ones(1, 2, 200), -torch.ones(1, 2, 200)):
        indices, values = compressed(grid, a).parts
        assert all(len(set(half)) == 2 for half in indices.view(-1, 2).tolist())
        assert values.eq(a.flatten()[0]).all()
    a = torch.randn(1, 2, 200)
    a[0, 0, 150], a[0, 1, 3], a[0, 1, 4] = torch.nan, torch.inf, -torch.inf
    _, values = compressed(grid, a).parts
    assert values[0, 0].isnan().sum() == 1 and values[0, 1].isinf().sum() == 2


def window_of(n, rows, cols, block, density, dtype, m=6, filled=None):
    """A window with `filled` entries and a staged one."""
    generator = torch.Generator().manual_seed(1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grid = BlockTopK(cols, density, block)
    kind, dtype = (LowBitSparseWindow, compute) if dtype == LOW_BIT else (SparseWindow, dtype)
    window = kind(allocated(kind.specs(Layout(rows, cols, compute), m, grid, dtype), n), compute, grid)
    for slot in range(m if filled is None else filled):
        window.stage(compressed(grid, torch.randn(n, rows, cols, generator=generator, dtype=compute)))
        window.commit(torch.tensor([slot]))
    new = torch.randn(n, rows, cols, generator=generator, dtype=compute)
    new[:, 0] = 0  # a row of which nothing is kept
    window.stage(compressed(grid, new))
    return window, torch.randn(n, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("filled", [6, 2])
@EVERY_FORMAT
@FEW_SHAPES
def test_dots_and_combine_are_those_of_torch(module, plain, n, rows, cols, block, density, dtype, filled):
    window, c = plain(window_of, n, rows, cols, block, density, dtype, 6, filled)
    mine, theirs = window.dots(torch.tensor([1])), plain(window.dots, torch.tensor([1]))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for part in (None, slice(rows - 1, rows)):
        mine, theirs = window.combine(c, part), plain(window.combine, c, part)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert module == ["dots", "combine", "combine"]


@EVERY_FORMAT
@EVERY_SHAPE
def test_apply_is_combine_and_a_sum(module, plain, n, rows, cols, block, density, dtype):
    window, c = plain(window_of, n, rows, cols, block, density, dtype)
    params = list(torch.randn(n, rows, cols, dtype=window.compute_dtype))
    expected = 0.9 * torch.stack(params) - 0.3 * plain(window.combine, c)
    assert window.apply(c, params, -0.3, 0.9)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(torch.stack(params), expected, rtol=tolerance, atol=tolerance)
    assert module == (["combine", "apply"] if on_gpu_kernels() else ["apply"])


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@pytest.mark.parametrize("error_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY_SHAPE
def test_the_error_is_torchs_and_rounded_by_the_same_numbers(module, plain, n, rows, cols, block, density, error_dtype):
    compute = torch.float64 if error_dtype == torch.float64 else torch.float32
    e, g = (torch.randn(n, rows, cols, dtype=compute) for _ in range(2))
    kept = []
    for run in (lambda f, *args: f(*args), plain):
        window, _ = plain(window_of, n, rows, cols, block, density, compute)
        error = plain_error(e.to(error_dtype, copy=True), compute, step=4)
        run(Accumulated(list(g), error).keep, window.staged)
        kept.append(error.buffer)
    assert torch.equal(*kept)
    assert module == ["keep"]


@pytest.mark.parametrize("dtype", [torch.float32, LOW_BIT], ids=str)
def test_a_window_with_indices_out_of_range_does_no_harm(module, dtype):
    window, c = window_of(1, 2, 40, 16, 0.2, dtype)
    next(iter(window.buffers.values())).random_(-(2**15), 2**15)
    window.dots(torch.tensor([1]))
    assert window.combine(c).shape == (1, 2, 40)
    around = torch.zeros(6, 40)
    window.apply(c, [around[2:4]], 1.0, 1.0)
    assert not around[:2].any() and not around[4:].any()


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@EVERY_SHAPE
def test_an_error_in_codes_is_read_and_written_as_torch_does(module, plain, n, rows, cols, block, density, bits, dtype):
    g, ends = torch.randn(n, rows, cols, dtype=dtype), []
    g[0, 0] = 0  # a scale of zero
    for run in (lambda f, *args: f(*args), plain):
        window, _ = plain(window_of, n, rows, cols, block, density, dtype)
        error, grid = coded_error(bits, n, rows, cols, dtype), BlockTopK(cols, density, block)
        for step in range(3):
            error.turn.step, error.turn.absent = torch.tensor(step), [n - 1] if step == 1 else []
            entry = run(compressed, grid, g, error)
            run(Accumulated(list(g), error, error.turn.absent).keep, window.staged)
        ends.append([*error.stored, entry.dense()])
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine, theirs)
    assert module == ["top_k", "keep"] * 3


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(SparseMFAC, {}, marks=pytest.mark.slow),
        (SparseMFAC, {"window_dtype": "bf16", "error_dtype": "bf16"}),
        pytest.param(SparseMFAC, {"scope": "layer"}, marks=pytest.mark.slow),
        pytest.param(SparseGGT, {}, marks=pytest.mark.slow),  # to the kernels, both families are one
    ],
)
def test_the_optimizer_gives_the_update_of_torch(module, plain, cls, options):
    sparse = {"density": 0.2, "block_size": 16, "lr": 1.0, "window_size": 3, "update_rms": 0.5}
    shapes = ((7,), (4, 30), (4, 30), (2, 3, 3, 3))
    here, there = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    fast, slow = cls(here, **sparse, **options), cls(there, **sparse, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        grads = set_gradients(here, generator)
        if step == 2:
            here[1].grad = grads[1] = None
        for p, g in zip(there, grads, strict=True):
            p.grad = g
        assert relative(update_of(fast, here), plain(update_of, slow, there)) < 1e-4
    # The tensor without a gradient stays where it is, and its batch is not updated at once.
    assert set(module) == {"top_k", "dots", "combine", "keep", "apply"}


def _steps():
    p = parameters(((64, 300),), torch.float32)
    optimizer = SparseMFAC(p, lr=0.1, window_size=4, density=0.05)
    for _ in range(3):
        p[0].grad = p[0].detach().clone()
        optimizer.step()


def _in_a_fork(queue, window, c):
    queue.put((window.dots(torch.tensor([1])).sum().item(), window.combine(c).sum().item()))


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_processes_may_be_forked_after_a_step_and_use_the_kernels_too(module, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hf_efcp.kernels.cpu_threads"), "_SMALL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _steps()
        window, c = window_of(2, 37, 50, 16, 0.2, torch.float32, m=9)
        expected = window.dots(torch.tensor([1])).sum().item(), window.combine(c).sum().item()
        loader = DataLoader(list(range(8)), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert [b.tolist() for b in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_a_fork, args=(queue, window, c))
        child.start()
        child.join(60)
        assert child.exitcode == 0 and queue.get() == expected
        _steps()
    finally:
        torch.set_num_threads(before)


def test_without_numba_one_line_says_so_and_torch_goes_on():
    script = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
sys.modules["numba"] = None
import torch
from hf_efcp import SparseMFAC
p = torch.nn.Parameter(torch.ones(8, 90))
optimizer = SparseMFAC([p], lr=0.1, window_size=2, density=0.1)
for _ in range(3):
    p.grad = torch.ones(8, 90)
    optimizer.step()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("hf_efcp")]
    assert lines == ["hf_efcp INFO numba is not installed: steps on cpu run in plain torch, which is slower"]


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
def test_a_kernel_that_fails_is_given_up_with_one_line(module, monkeypatch, caplog):
    def fail(*args):
        raise ValueError("no such instruction")

    monkeypatch.setattr(importlib.import_module("hf_efcp.kernels.cpu_top_k"), "top_k", fail)
    with caplog.at_level(logging.INFO, "hf_efcp"):
        _steps()
    assert [r.getMessage() for r in caplog.records] == [
        "no numba kernel for `top_k`: this part of a step on cpu runs in plain torch: ValueError: no such instruction"
    ]
    assert {("cpu", "top_k")} == calls.FAILED and "top_k" not in module
    calls.FAILED.clear()


def test_a_shard_without_rows_is_no_failure(module):
    """As FSDP2 makes them."""
    grid = BlockTopK(40, 0.1, 40)
    specs = SparseWindow.specs(Layout(0, 40, torch.float32), 3, grid, torch.float32)
    window = SparseWindow(allocated(specs, 2), torch.float32, grid)
    window.stage(compressed(grid, torch.zeros(2, 0, 40)))
    assert window.dots(torch.tensor([1])).shape == (2, 3)
    assert window.combine(torch.ones(2, 3)).shape == (2, 0, 40)
    assert not calls.FAILED
