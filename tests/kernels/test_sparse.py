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
from hf_efcp.core.error_feedback import ErrorFeedback, QuantizedErrorFeedback
from torch.utils.data import DataLoader

from hf_efcp import SparseGGT, SparseMFAC, kernels
from hf_efcp.core.codecs import SparseCodec
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.low_bit_windows import LowBitSparseWindow
from hf_efcp.core.windows import SparseWindow
from tests.reference import parameters, relative, set_gradients, update_of

NEEDS = {"cpu": "numba", "gpu": "triton"}
OPERATIONS = ("top_k", "dots", "combine", "apply", "keep")
STEP = torch.tensor(0)
PLAIN = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
# n, rows, cols, block, density: one block, a ragged tail, many blocks, k = 1, tiny rows, a full block, one row
SHAPES = [
    (2, 5, 24, 1024, 0.15),
    (1, 3, 70, 32, 0.1),
    (3, 2, 64, 8, 0.3),
    (1, 4, 200, 200, 0.001),
    (2, 3, 3, 1024, 0.4),
    (1, 2, 10, 4, 1.0),
    (1, 1, 1500, 1024, 0.01),
]
EVERY_SHAPE = pytest.mark.parametrize(("n", "rows", "cols", "block", "density"), SHAPES)
LOW_BIT = "low_bit"
EVERY_FORMAT = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, LOW_BIT], ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=["cpu", "gpu"])
def module(request, monkeypatch):
    pytest.importorskip(NEEDS[request.param])
    if request.param == "gpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("test_cuda.py is for GPUs")
    monkeypatch.setattr(kernels, "_failed", set())
    used = []
    for operation in OPERATIONS:
        modules = kernels._MODULES[operation]
        if request.param == "gpu":
            modules = {"cpu": modules["cuda"]} if "cuda" in modules else {}
            monkeypatch.setitem(kernels._MODULES, operation, modules)
        for module in modules.values():
            if module.startswith(request.param):
                loaded = importlib.import_module(f"hf_efcp.kernels.{module}")
                monkeypatch.setattr(loaded, operation, _counting(getattr(loaded, operation), used))
    yield used
    assert not kernels._failed


def on_gpu_kernels():
    return kernels._MODULES["dots"]["cpu"] == "gpu_sparse"


def _counting(function, used):
    def counted(*args):
        result = function(*args)
        if result is not None:
            used.append(function.__name__)
        return result

    return counted


@pytest.fixture
def plain(monkeypatch):
    """Runs a function without the kernels."""

    def run(function, *args):
        monkeypatch.setenv("HF_EFCP_KERNELS", "0")
        try:
            return function(*args)
        finally:
            monkeypatch.delenv("HF_EFCP_KERNELS")

    return run


def dense(compressor, indices, values, cols):
    zeros = torch.zeros(*indices.shape[:2], cols, dtype=values.dtype)
    return zeros.scatter(2, indices.long() + compressor.offsets(zeros.device), values)


@EVERY_DTYPE
@EVERY_SHAPE
def test_top_k_is_that_of_torch(module, plain, n, rows, cols, block, density, dtype):
    generator = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a, e = (torch.randn(n, rows, cols, generator=generator, dtype=compute) for _ in range(2))
    compressor = BlockTopK(cols, density, block)
    for feedback in (ErrorFeedback(None), ErrorFeedback(e.to(dtype))):
        mine, theirs = compressor.compress(a, STEP, feedback), plain(compressor.compress, a, STEP, feedback)
        assert [x.shape for x in mine] == [x.shape for x in theirs] and [x.dtype for x in mine] == [x.dtype for x in theirs]
        assert torch.equal(dense(compressor, *mine, cols), dense(compressor, *theirs, cols))
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
    indices, found = BlockTopK(cols, kept / cols, cols).compress(a, STEP)
    assert torch.equal(found, a.gather(2, indices.long()))
    assert all(len(set(row)) == kept for row in indices[0].tolist())
    assert torch.equal(found.abs().sort(-1).values, a.abs().topk(kept).values.sort(-1).values)


def test_top_k_of_gradients_that_are_views(module):
    a = torch.randn(2, 6, 40)
    top, expected = BlockTopK(40, 0.1, 40), BlockTopK(40, 0.1, 40).compress(-a, STEP)[1]
    for odd in ([x._neg_view() for x in a], [-x.mT.contiguous().mT for x in a], list((-a).expand(2, 6, 40))):
        assert torch.equal(top.compress(odd, STEP)[1].sort(-1).values, expected.sort(-1).values)


def test_top_k_of_ties_zeros_and_what_is_not_finite(module):
    compressor = BlockTopK(200, 0.02, 100)
    for a in (torch.zeros(1, 2, 200), torch.ones(1, 2, 200), -torch.ones(1, 2, 200)):
        indices, values = compressor.compress(a, STEP)
        assert all(len(set(half)) == 2 for half in indices.view(-1, 2).tolist())
        assert values.eq(a.flatten()[0]).all()
    a = torch.randn(1, 2, 200)
    a[0, 0, 150], a[0, 1, 3], a[0, 1, 4] = torch.nan, torch.inf, -torch.inf
    _, values = compressor.compress(a, STEP)
    assert values[0, 0].isnan().sum() == 1 and values[0, 1].isinf().sum() == 2


def window_of(n, rows, cols, block, density, dtype, m=6, filled=None):
    """A window with `filled` rows and a staged one."""
    generator = torch.Generator().manual_seed(1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    compressor = BlockTopK(cols, density, block)
    offsets = compressor.offsets(torch.device("cpu"))
    like = {"compute_dtype": compute, "device": torch.device("cpu")}
    if dtype == LOW_BIT:
        codec = SparseCodec(compressor.block, compressor.full, compressor.kept, compressor.kept_tail)
        window = LowBitSparseWindow(n, m, rows, cols, offsets, compressor.blocks, codec, **like)
    else:
        window = SparseWindow(n, m, rows, cols, offsets, compressor.blocks, dtype=dtype, **like)
    for slot in range(m if filled is None else filled):
        window.stage(compressor.compress(torch.randn(n, rows, cols, generator=generator, dtype=compute), STEP))
        window.commit(torch.tensor([slot]))
    new = torch.randn(n, rows, cols, generator=generator, dtype=compute)
    new[:, 0] = 0  # a row of which nothing is kept
    window.stage(compressor.compress(new, STEP))
    return window, torch.randn(n, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("filled", [6, 2])
@EVERY_FORMAT
@EVERY_SHAPE
def test_dots_and_combine_are_those_of_torch(module, plain, n, rows, cols, block, density, dtype, filled):
    window, c = plain(window_of, n, rows, cols, block, density, dtype, 6, filled)
    mine, theirs = window.dots(torch.tensor([1])), plain(window.dots, torch.tensor([1]))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for part in (None, slice(rows - 1, rows)):
        mine, theirs = window.combine(c, part), plain(window.combine, c, part)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert module == ([] if on_gpu_kernels() and dtype == LOW_BIT else ["dots", "combine", "combine"])


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@EVERY_FORMAT
@EVERY_SHAPE
def test_apply_is_combine_and_a_sum(module, plain, n, rows, cols, block, density, dtype):
    window, c = plain(window_of, n, rows, cols, block, density, dtype)
    params = list(torch.randn(n, rows, cols, dtype=window.compute_dtype))
    expected = 0.9 * torch.stack(params) - 0.3 * plain(window.combine, c)
    assert window.apply(c, params, -0.3, 0.9)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(torch.stack(params), expected, rtol=tolerance, atol=tolerance)
    assert module == ["apply"]


@pytest.mark.parametrize("module", ["cpu"], indirect=True)
@pytest.mark.parametrize("error_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY_SHAPE
def test_the_error_is_torchs_and_rounded_by_the_same_numbers(module, plain, n, rows, cols, block, density, error_dtype):
    compute = torch.float64 if error_dtype == torch.float64 else torch.float32
    e, g = (torch.randn(n, rows, cols, dtype=compute) for _ in range(2))
    kept = []
    for run in (lambda f, *args: f(*args), plain):
        window, _ = plain(window_of, n, rows, cols, block, density, compute)
        feedback = ErrorFeedback(e.to(error_dtype), torch.arange(n) + 5, (7, 3))
        run(feedback.keep, list(g), window, torch.tensor(4))
        kept.append(feedback.error)
    assert torch.equal(*kept)
    assert module == ["keep"]


@pytest.mark.parametrize("dtype", [torch.float32, LOW_BIT], ids=str)
def test_a_window_with_indices_out_of_range_does_no_harm(module, dtype):
    if dtype == LOW_BIT and on_gpu_kernels():
        pytest.skip("no kernel; torch raises")
    window, c = window_of(1, 2, 40, 16, 0.2, dtype)
    next(iter(window.state.values())).random_(-(2**15), 2**15)
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
        feedback = QuantizedErrorFeedback(bits, (n, rows, cols), dtype, torch.arange(n) + 5, (7, 3))
        compressor = BlockTopK(cols, density, block)
        for step in range(3):
            absent = [n - 1] if step == 1 else []
            parts = run(compressor.compress, g, STEP, feedback)
            run(feedback.keep, list(g), window, torch.tensor(step), True, absent)
        ends.append([feedback.error, feedback.scale, dense(compressor, *parts, cols)])
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine, theirs)
    assert module == ["top_k", "keep"] * 3


@pytest.mark.parametrize("options", [{}, {"window_dtype": "bf16", "error_dtype": "bf16"}, {"scope": "layer"}])
@pytest.mark.parametrize("cls", [SparseMFAC, SparseGGT])
def test_the_optimizer_gives_the_update_of_torch(module, plain, cls, options):
    sparse = {"density": 0.2, "block_size": 16, "lr": 1.0, "window_size": 3, "update_rms": 0.5}
    shapes = ((7,), (4, 30), (4, 30), (2, 3, 3, 3))
    here, there = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    fast, slow = cls(here, **sparse, **options), cls(there, **sparse, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        grads = set_gradients(here, generator)
        if step == 3:
            here[1].grad = grads[1] = None
        for p, g in zip(there, grads, strict=True):
            p.grad = g
        assert relative(update_of(fast, here), plain(update_of, slow, there)) < 1e-4
    assert set(module) == {"top_k", "dots", *(("combine",) if on_gpu_kernels() else ("apply", "keep"))}


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
        "no numba kernels, steps on cpu run in plain torch: ValueError: no such instruction"
    ]
    assert kernels._failed == {"cpu"} and not module
    kernels._failed.clear()


def test_a_shard_without_rows_is_no_failure(module):
    """As FSDP2 makes them."""
    window = SparseWindow(2, 3, 0, 40, BlockTopK(40, 0.1, 40).offsets(torch.device("cpu")), (40, 4, 0), **PLAIN)
    top = BlockTopK(40, 0.1, 40)
    window.stage(top.compress(torch.zeros(2, 0, 40), torch.tensor(0)))
    assert window.dots(torch.tensor([1])).shape == (2, 3)
    assert window.combine(torch.ones(2, 3)).shape == (2, 0, 40)
    assert not kernels._failed
