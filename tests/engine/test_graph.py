"""Steps with the learning rate on the device, as a CUDA graph takes them; and, on a GPU, steps by a graph."""

import pytest
import torch

from hf_efcp.core.linalg import ieee_matmul
from hf_efcp.engine import graph
from hf_efcp.engine.setup import RATE
from tests.reference import NAMES, make, names, parameters, relative, set_gradients

METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "residual": "momentum"}
OPTIONS = [{}, {"weight_decay": 0.1}, {"momentum": 0.5, "weight_decay": 0.1}, METRIC, {**METRIC, "error_dtype": "bf16"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_on_the_device_is_that_number(name, options, dtype):
    results = []
    for on_device in (False, True):
        params = parameters(dtype=dtype)
        optimizer = make(name, params, window_size=3, update_rms=0.5, **{"lr": 0.01, **options})
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            set_gradients(params, generator)
            if not on_device:
                optimizer.step()
                continue
            setup = optimizer.builder.prepare(optimizer.param_groups, optimizer.state, stepping=True)
            groups = [{**g, RATE: torch.tensor(g["lr"], dtype=setup.dtype), "lr": None} for g in optimizer.param_groups]
            with torch.no_grad(), ieee_matmul(params[0].device):
                optimizer.method.step(setup, groups, optimizer.options)
        results.append(torch.cat([p.detach().double().flatten() for p in params]))
    assert relative(results[1], results[0]) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_without_a_gpu_there_is_no_graph(monkeypatch):
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    params = parameters()
    optimizer = make(NAMES[0], params, window_size=3)
    for _ in range(4):
        set_gradients(params, torch.Generator().manual_seed(0))
        optimizer.step()
    assert optimizer.builder.graph._made == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", names(family="mfac"))
@pytest.mark.filterwarnings("ignore:.*a gradient is not finite:RuntimeWarning")
def test_steps_by_a_graph_are_the_same(name, options, monkeypatch):
    results, replays = [], []
    monkeypatch.setattr(graph.torch.cuda.CUDAGraph, "replay", _counting(torch.cuda.CUDAGraph.replay, replays))
    for wanted in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", wanted)
        params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(dtype=torch.float32)]
        optimizer = make(name, params, window_size=3, update_rms=0.5, **{"lr": 0.01, **options})
        generator = torch.Generator().manual_seed(0)
        for p in params:
            p.grad = torch.zeros_like(p)
        for t in range(12):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
            for p in params:  # in place: gradients stay where they are
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            if t == 8:
                params[1].grad[0, 0] = torch.nan
            optimizer.step()
        results.append(torch.cat([p.detach().double().flatten() for p in params]).cpu())
        assert int(optimizer.setup().counters.skipped) == 1
    assert len(replays) >= 8
    assert relative(results[1], results[0]) < 1e-5


def _counting(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted
