"""The Triton kernels on a GPU against plain torch there: many blocks, tails, more than 64 slots. By hand: -m gpu."""

import pytest
import torch

from hf_efcp.core.accumulated import Accumulated
from hf_efcp.core.cells import Cell, Layout, Turn
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.sparse_window import SparseWindow
from hf_efcp.kernels import calls
from tests.reference import NAMES, make, names, relative, update_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# n, rows, cols, block, density
SHAPES = [
    (2, 5, 24, 1024, 0.15),
    (1, 3, 70, 32, 0.1),
    (3, 2, 64, 8, 0.3),
    (1, 4, 200, 200, 0.001),
    (1, 1, 1500, 1024, 0.01),
    (3, 130, 768, 1024, 0.01),
    (14, 768, 768, 1024, 0.01),
    (1, 30522, 768, 1024, 0.01),
    (1, 4, 2**20, 1024, 0.01),
    (1, 8, 65536, 32768, 0.001),
]


@pytest.mark.parametrize("m", [6, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "rows", "cols", "block", "density"), SHAPES)
def test_sparse_kernels_are_torch(monkeypatch, n, rows, cols, block, density, dtype, m):
    monkeypatch.setattr(calls, "FAILED", set())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator("cuda").manual_seed(0)
    step = torch.tensor(0, device="cuda")

    def random(kind=compute):
        return torch.randn(n, rows, cols, generator=generator, dtype=compute, device="cuda").to(kind)

    def plain(function, *args):
        with monkeypatch.context() as patch:
            patch.setenv("HF_EFCP_KERNELS", "0")
            return function(*args)

    def compress(a, error=None):
        return grid.compress(Accumulated(a, error), step)

    grid = BlockTopK(cols, density, block)
    specs = SparseWindow.specs(Layout(rows, cols, compute), m, grid, dtype)
    buffers = {s.name: torch.zeros(n, *s.shape, dtype=s.dtype, device="cuda") for s in specs}
    error = Cell(random(dtype), Turn(torch.arange(n, device="cuda"), (0, 0), step), compute)
    a = random()
    assert torch.equal(compress(a, error).dense(), plain(compress, a, error).dense())
    window = SparseWindow(buffers, compute, grid)
    for slot in range(3):
        window.stage(plain(compress, random()))
        window.commit(torch.tensor([slot], device="cuda"))
    window.stage(plain(compress, random()))
    slots = torch.tensor([1], device="cuda")
    mine, theirs = window.dots(slots), plain(window.dots, slots)
    assert relative(mine, theirs) < 1e-12
    c = torch.randn(n, m, generator=generator, dtype=torch.float64, device="cuda")
    mine, theirs = window.combine(c), plain(window.combine, c)
    assert relative(mine, theirs) < (1e-14 if compute == torch.float64 else 1e-6)
    assert torch.equal(mine, window.combine(c))
    assert not calls.FAILED


WHOLE = [(3000, 768), (768, 768), (768, 768), (768, 768), (768, 3072), (3072, 768), (2, 768), (768,), (768,), (3072,), (2,)]
METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "window_nesterov": True}
BF16 = {"error_dtype": "bf16", "window_dtype": "bf16"}
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    METRIC,
    {**METRIC, **BF16, "residual": "momentum"},
    {**METRIC, "error_format": "int8"},
    {**METRIC, "error_format": "int4", "residual": "momentum"},
    {"error_format": "int8", "window_format": "low_bit"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_models_shapes_are_those_of_torch(name, options, dtype, monkeypatch):
    if name in names(compression="sparse") and dtype == torch.bfloat16:
        pytest.skip("gradients have equal magnitudes: which of them is kept is open")
    monkeypatch.setattr(calls, "FAILED", set())
    updates = []
    for off in ("1", "0"):
        monkeypatch.setenv("HF_EFCP_KERNELS", "1" if off == "0" else "0")
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter((0.01 * torch.randn(s, generator=generator)).to("cuda", dtype)) for s in WHOLE]
        optimizer = make(name, params, window_size=4, update_rms=0.5, **options)
        for _ in range(6):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) / 100).to("cuda", dtype)
            updates.append(update_of(optimizer, params))
    few = "int" in str(options) or "bf16" in str(options) or dtype == torch.bfloat16
    for mine, theirs in zip(updates[6:], updates[:6], strict=True):
        assert relative(mine, theirs) < (5e-2 if few else 1e-3)
    assert not calls.FAILED
