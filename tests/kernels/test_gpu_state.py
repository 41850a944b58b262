"""Triton's kernels of small state in its interpreter, against the plain torch of `Metric` and `PowerIteration`."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU: test_on_gpu.py", allow_module_level=True)

from hf_efcp.core.cells import Cell, Layout, Turn
from hf_efcp.core.metric import Diagonal, Factored
from hf_efcp.kernels import gpu_state

BETA, EPS = 0.9, 1e-3
OK = pytest.mark.parametrize("ok", [True, torch.tensor(True), torch.tensor(False)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def metric(cls, shapes, n, layout, ok, seed=0):
    """A metric with some state, the first tensor's of which is empty."""
    generator, turn = torch.Generator().manual_seed(seed), Turn(torch.arange(n))
    turn.ok = ok
    cells = {}
    for name, shape in shapes.items():
        buffer = torch.rand(n, *shape, generator=generator, dtype=torch.float64).to(layout.dtype)
        buffer[0] = 0
        cells[name] = Cell(buffer, turn, layout.dtype)
    cells["count"] = Cell(torch.arange(n), turn, torch.int64)
    return cls(cells, layout, BETA, EPS)


def state(made):
    return {name: cell.buffer.clone() for name, cell in made.cells.items()}


def assert_same(mine, theirs, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@OK
@DTYPES
@pytest.mark.parametrize("cols", [1, 7, 1500])
def test_the_metric_of_vectors(cols, dtype, ok, monkeypatch):
    n, layout = 3, Layout(1, cols, dtype, vector=True)
    gradients = list(torch.randn(n, 1, cols, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype))
    gradients[1] = torch.zeros_like(gradients[1])
    results = []
    for fast in (True, False):
        made = metric(Diagonal, {"values": (1, cols), "mean": ()}, n, layout, ok)
        if fast:
            for name in ("measure_vectors", "remember_diagonal"):
                monkeypatch.setattr(f"hf_efcp.kernels.{name}", getattr(gpu_state, name))
        else:
            monkeypatch.setenv("HF_EFCP_KERNELS", "0")
            monkeypatch.undo()
        made.measure(gradients)
        white, square = made.whitened(gradients).clone(), made.square.clone()
        made.commit(gradients)
        update = made.unwhiten_(torch.ones(n, 1, cols, dtype=dtype))
        results.append(state(made) | {"white": white, "square": square, "update": update, "means": made.means})
    assert_same(*results, dtype)
    assert (results[0]["update"] == 0).all() == (ok is not True and not ok)


@OK
@DTYPES
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 40), (1030, 3), (3, 1100)])
def test_a_factored_metric_remembers(rows, cols, dtype, ok, monkeypatch):
    n, layout = 3, Layout(rows, cols, dtype)
    gradients = list(torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype))
    gradients[1] = torch.zeros_like(gradients[1])
    gradients[2] = gradients[2] * (1e18 if dtype == torch.float32 else 1e150)  # its mean square does not fit beside others
    results = []
    for fast in (True, False):
        made = metric(Factored, {"rows": (rows,), "cols": (cols,)}, n, layout, ok)
        if fast:
            monkeypatch.setattr("hf_efcp.kernels.remember_factored", gpu_state.remember_factored)
        else:
            monkeypatch.undo()
        made.measure(gradients)
        made.commit(gradients)
        results.append(state(made) | {"x": made.scale[0], "y": made.scale[1]})
    assert_same(*results, dtype)


@OK
def test_what_is_alive_is_remembered(ok):
    old, new = torch.zeros(3, 700, 2), torch.randn(3, 700, 2)
    alive = torch.tensor([True, False, True])
    assert gpu_state.remember(old, new, alive, ok)
    kept = alive if ok else torch.zeros(3, dtype=torch.bool)
    assert torch.equal(old, torch.where(kept[:, None, None], new, 0.0))
    assert not gpu_state.remember(old, new.double(), alive, ok)
