"""Steps with the learning rate on the device, as a CUDA graph takes them; and, on a GPU, steps by a graph."""

import gc

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


@pytest.mark.parametrize(("asked", "memory", "level"), [(None, 39, "DEBUG"), (None, 41, None), ("1", 39, None), ("0", 39, None)])
def test_models_that_are_small_for_the_gpu_have_graphs(asked, memory, level, monkeypatch, caplog):
    """The memory is given in sizes of the parameters; whether a step goes on to a graph is seen by its rates on the device."""
    params = parameters()
    optimizer = make("efcp_lowrank_mfac", params, window_size=3)
    monkeypatch.setattr(graph, "_memory", lambda device: memory * sum(p.nbytes for p in params))
    monkeypatch.setattr(graph, "_unfit", lambda method, setup: None)
    monkeypatch.delenv("HF_EFCP_CUDA_GRAPH", raising=False)
    if asked is not None:
        monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", asked)
    set_gradients(params, torch.Generator().manual_seed(0))
    with caplog.at_level("DEBUG", "hf_efcp"):
        optimizer.step()
    assert bool(optimizer.builder.graph._rates) == (level is None and asked != "0")
    said = [r.levelname for r in caplog.records if "no CUDA graph" in r.message]
    assert said == ([level] if level else [])


def test_without_the_cache_of_memory_no_graph_is_tried(monkeypatch, caplog):
    """As compute-sanitizer's runs are started: torch would ask CUDA for memory while the graph is made, which fails."""
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    monkeypatch.setattr(graph, "kind", lambda device: "cuda")
    params = parameters()
    optimizer = make("efcp_lowrank_mfac", params, window_size=3)
    set_gradients(params, torch.Generator().manual_seed(0))
    optimizer.step()
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" in caplog.text and not optimizer.builder.graph._rates


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "false")
    params = parameters()
    optimizer = make("efcp_lowrank_mfac", params, window_size=3)
    set_gradients(params, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="HF_EFCP_CUDA_GRAPH='false': must be 0 or 1"):
        optimizer.step()


def _moving(params, numbers, kept):
    """Put gradients elsewhere; those of the step before become NaN, and stay, so that no address comes again."""
    kept.append([p.grad for p in params])
    for p, g in zip(params, numbers, strict=True):
        if p.grad is not None:
            p.grad.fill_(torch.nan)
        p.grad = g.cuda().to(p.dtype)


def _staying(params, numbers, kept):
    for p, g in zip(params, numbers, strict=True):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.copy_(g)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placed", [_staying, _moving])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names(family="mfac"))
@pytest.mark.filterwarnings("ignore:.*a gradient is not finite:RuntimeWarning")
def test_steps_by_a_graph_are_the_same(name, dtype, options, placed, monkeypatch):
    results, replays = [], []
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    monkeypatch.setattr(graph.torch.cuda.CUDAGraph, "replay", _counting(torch.cuda.CUDAGraph.replay, replays))
    for most in (0, 8):  # without a graph the rate is on the device too, so that the same numbers come out
        monkeypatch.setattr(graph, "_MOST", most)
        params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(dtype=dtype)]
        optimizer = make(name, params, window_size=3, update_rms=0.5, **{"lr": 0.01, **options})
        generator, kept = torch.Generator().manual_seed(0), []
        for t in range(12):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
            placed(params, [torch.randn(p.shape, generator=generator) for p in params], kept)
            if t == 8:
                params[1].grad[0, 0] = torch.nan
            optimizer.step()
        results.append(torch.cat([p.detach().double().flatten() for p in params]).cpu())
        assert int(optimizer.setup().counters.skipped) == 1
        assert len(replays) == (9 if most else 0)
    assert relative(results[1], results[0]) < (1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", names(family="mfac"))
def test_many_steps_are_queued_before_the_first_is_done(name, monkeypatch):
    """The host writes tables for steps to come while the device is still busy: each has to read its own."""
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    results = []
    for wait in (True, False):
        params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(dtype=torch.float32)]
        optimizer = make(name, params, window_size=3, lr=0.01)
        generator = torch.Generator().manual_seed(0)
        gradients = [[torch.randn(p.shape, generator=generator).cuda() for p in params] for _ in range(12)]
        for some in gradients:
            for p, g in zip(params, some, strict=True):
                p.grad = g
            if wait:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(10**7)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]).cpu())
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", names(family="mfac"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_a_graph(name, dtype, monkeypatch, record_property):
    """A graph keeps the temporaries of one step, and copies of the gradients that torch reads: less than the state and they."""
    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    params = [torch.nn.Parameter(torch.randn(1024, 1024, device="cuda").to(dtype)) for _ in range(8)]
    optimizer = make(name, params, window_size=8, lr=0.01)
    gc.collect()  # graphs of other tests
    torch.cuda.empty_cache()
    before = _in_pools()
    for _ in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    made = optimizer.builder.graph._graph
    pool, copies = _in_pools() - before, sum(x.nbytes for x in made._copies.values())
    state = sum(optimizer.memory_footprint().values())
    record_property("pool, copies, state", (pool, copies, state))
    print(f"{name} {dtype}: pool {pool / 2**20:.1f} MiB, copies {copies / 2**20:.1f} MiB, state {state / 2**20:.1f} MiB")
    assert copies <= sum(p.nbytes for p in params)
    assert 0 < pool < 2 * state + 2**28


def _in_pools():
    torch.cuda.synchronize()
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))


def _counting(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted
