"""What a step allocates beside its state: no more than the largest tensor and a few chunks."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.reference import NAMES, few, info, make, names

MIB = 2**20


def peak(step, trace):
    """The most bytes that were allocated at once during step(), above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    if not events:
        return 0
    totals = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    first = min(events, key=lambda e: e["ts"])["args"]
    return max(totals) - (first["Total Allocated"] - first["Bytes"])


LOW_BIT = {"window_format": "low_bit", "error_format": "int4", "stochastic_rounding": True}


@pytest.mark.parametrize("formats", [{}, LOW_BIT], ids=["plain", "low-bit"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", few(NAMES, names(family="mfac").__contains__))
def test_a_step_allocates_little_more_than_the_largest_tensor(name, dtype, formats, tmp_path):
    """Three times as much is in tensors of middle size: the whole model is never held."""
    if formats and not (info(name).family == "mfac" and dtype == torch.bfloat16):
        pytest.skip("once for each kind of row")
    largest = 64 * MIB
    if formats and info(name).compression == "dense":
        largest *= 2.5  # the gradient, the row as stored, its codes
    if "shampoo_beta" in info(name).options():
        largest *= 11  # blocks are handled a stack at a time
    shapes = [(8192, 2048)] + [(1024, 1024)] * 48
    params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    options = {"error_dtype": "bf16", **formats, "momentum": 0.9, "weight_decay": 0.1, "weight_decay_mode": "l2"}
    options |= {"density": 0.01, "block_size": 1024} if info(name).compression == "sparse" else {}
    optimizer = make(name, params, lr=0.1, window_size=1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # allocates the state
    assert 64 * MIB <= peak(optimizer.step, tmp_path / "trace.json") < largest + 48 * MIB
    assert peak(optimizer.diagnostics, tmp_path / "trace.json") < 48 * MIB


@pytest.mark.parametrize(("metric", "largest"), [("factored", 64), ("tensor", 64), ("diagonal", 128)])
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_mfac"])
def test_a_metric_allocates_little_more(name, metric, largest, tmp_path):
    """A diagonal metric: the whitened gradient of the largest tensor too."""
    params = [torch.nn.Parameter(torch.zeros(s)) for s in [(8192, 2048), (1024, 1024)]]
    options = {"rank": 2} if info(name).compression == "low rank" else {"density": 0.01, "block_size": 1024}
    optimizer = make(name, params, window_size=1, weight_decay=0.1, weight_decay_mode="l2", metric=metric, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # allocates the state
    assert peak(optimizer.step, tmp_path / "trace.json") < (largest + 48) * MIB
