"""The CPU kernels of methods that couple no tensors against plain torch."""

import pytest
import torch

from hf_efcp import MicroAdam, create_optimizer, kernels, optim_defaults
from hf_efcp.core.accumulated import Accumulated, LowRankEntry
from hf_efcp.core.cells import Layout, cell, matrix_specs
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.sparse_window import SparseWindow, adam, move
from hf_efcp.kernels import calls
from tests.kernels.helpers import allocated, plain_error, turn_of
from tests.reference import NAMES, info, known_to, relative

pytest.importorskip("numba")
STEP = torch.tensor(4)


@pytest.fixture(autouse=True)
def none_failed(monkeypatch):
    monkeypatch.setattr(calls, "FAILED", set())
    yield
    assert not calls.FAILED


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("format", ["minmax4", "bf16"])
@pytest.mark.parametrize(("cols", "block"), [(70, 32), (513, 1024), (1, 1024), (40, 7)])
def test_extract_is_top_k_and_keep_bit_for_bit(cols, block, format):
    n, rows, grid = 3, 5, BlockTopK(cols, 0.1, block)
    e, g, found = random(n, rows, cols, seed=1), list(random(n, rows, cols)), []
    for at_once in (True, False):
        error = plain_error(e.bfloat16(), torch.float32, step=4)
        if format != "bf16":
            specs = matrix_specs("error", Layout(rows, cols, torch.float32), None, format)
            error = cell(specs[0], allocated(specs, n), torch.float32, turn_of(n, 4))
            error.write(e)
        error.turn.absent = [1]
        a = Accumulated(g, error, [1])
        if at_once:
            indices, values = kernels.extract(error.stored, g, grid.blocks, (STEP, error.turn.ids, error.turn.origin), [1])
            assert torch.equal(a.rows()[1], Accumulated(g, error).rows()[1])
        else:
            entry = grid.compress(a, STEP)
            indices, values = entry.parts
            a.keep(entry)
        found.append((indices[[0, 2]], values, *(x for x in error.stored if x is not None)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_ring_moves_is_what_the_update_moves(dtype, decay, monkeypatch):
    n, rows, cols, m = 2, 3, 45, 4
    grid = BlockTopK(cols, 0.1, 20)
    specs = SparseWindow.specs(Layout(rows, cols, torch.float32), m, grid, torch.bfloat16)
    buffers = allocated(specs, n)
    for slot in range(m):
        indices, values = grid.compress(Accumulated(random(n, rows, cols, seed=slot)), STEP).parts
        buffers["window_indices"][:, :, slot], buffers["window_values"][:, :, slot] = indices, values
    w1, w2 = random(n, m, dtype=torch.float64), random(n, m, dtype=torch.float64).square()
    params = list(random(n, rows, cols, seed=9, dtype=dtype))
    u = adam(buffers, w1, w2, 1e-8, grid, slice(0, rows), torch.float32)
    expected = [p.float().mul(decay).add_(x, alpha=-0.3).to(dtype) for p, x in zip(params, u, strict=True)]
    assert move(buffers, w1, w2, 1e-8, grid, params, -0.3, decay, torch.float32)
    assert relative(torch.stack(params).double(), torch.stack(expected).double()) < (1e-7 if dtype == torch.float32 else 1e-3)
    assert torch.equal(torch.stack(params)[u == 0], torch.stack(expected)[u == 0])
    buffers["window_indices"].fill_(-(2**15))  # a damaged checkpoint: nothing beside the row is read or written
    before = [p.clone() for p in params]
    assert move(buffers, w1, w2, 1e-8, grid, params, -0.3, 1.0, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_is_torchs(dtype):
    mine, theirs = (torch.nn.Parameter(random(7, 33, dtype=dtype)) for _ in range(2))
    group = {"params": [mine], "compress": False, "weight_decay": 0.1}
    optimizers = MicroAdam([group], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for seed in range(6):
        for p, optimizer in zip((mine, theirs), optimizers, strict=True):
            p.grad = random(7, 33, seed=seed + 1, dtype=dtype)
            optimizer.step()
    assert ("cpu", "adamw") in calls._WORKED
    assert relative(mine.double(), theirs.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("rows", "rank"), [(9, 4), (700, 18), (3, 21)])
def test_wide_products_and_what_they_leave(rows, rank):
    n, cols = 2, 37
    g, e = random(n, rows, cols), random(n, rows, cols, seed=1, dtype=torch.bfloat16)
    p, q, a = random(n, rank, rows, seed=2), random(n, rank, cols, seed=3), (g + e).double()
    found = kernels.times(g, (e, None), q, wide=True), kernels.transposed_times(g, (e, None), p, wide=True)
    for got, expected in zip(found, (a @ q.double().mT, p.double() @ a), strict=True):
        assert relative(got.double(), expected) < 1e-6
    error = plain_error(e.float(), torch.float32)
    Accumulated(list(g), error, wide=True).keep(LowRankEntry(p, q, wide=True))
    assert relative(error.buffer.double(), a - p.double().mT @ q.double()) < 1e-6
    assert kernels.times(g, (e, None), random(n, 300, cols), wide=True) is None


@pytest.mark.parametrize("name", [name for name in NAMES if not info(name).windowed])
def test_a_run_is_that_of_plain_torch(name, monkeypatch):
    ends = []
    for on in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_KERNELS", on)
        params = [torch.nn.Parameter(random(*shape)) for shape in [(20, 30), (30, 20), (20, 30), (9,)]]
        options = {**optim_defaults(name), **known_to(name, {"error_format": "plain", "error_dtype": torch.float32})}
        optimizer = create_optimizer(name, params, lr=1e-2, weight_decay=0.1, **options)
        for seed in range(5):
            for i, p in enumerate(params):
                p.grad = None if (seed, i) == (2, 0) else random(*p.shape, seed=10 * seed + i)
            versions = [p._version for p in params]
            optimizer.step()
            moved = [after != before for after, before in zip([p._version for p in params], versions, strict=True)]
            assert moved == [p.grad is not None for p in params]
        ends.append(torch.cat([p.detach().flatten() for p in params]).double())
    assert relative(*ends) < 1e-4
