"""Threads of the compiled CPU functions: the same result with any number, errors raised, several callers at once."""

import importlib
import threading

import pytest
import torch

from hf_efcp import create_optimizer
from tests.reference import info, parameters, set_gradients

pytest.importorskip("numba")
SHAPES = ((37, 50), (37, 50), (20, 70), (9,))


@pytest.fixture
def cpu_threads(monkeypatch):
    cpu_threads = importlib.import_module("hf_efcp.kernels.cpu_threads")
    monkeypatch.setattr(cpu_threads, "_SMALL", 1)  # cut small work too
    before = torch.get_num_threads()
    yield cpu_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("pool", ["team", "pool"])
@pytest.mark.parametrize("state", [{}, {"error_dtype": "bf16"}, {"error_format": "int8", "window_format": "low_bit"}], ids=str)
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_mfac"])
def test_a_run_does_not_depend_on_the_number_of_threads(name, state, pool, cpu_threads, monkeypatch):
    if pool == "pool":
        monkeypatch.setattr(cpu_threads, "_gomp_parallel", None)
    compression = {"density": 0.1} if info(name).compression == "sparse" else {"rank": 2}
    ends = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = parameters(SHAPES, torch.float32)
        optimizer = create_optimizer(name, params, lr=0.1, window_size=3, update_rms=0.1, **compression, **state)
        for step in range(5):
            set_gradients(params, torch.Generator().manual_seed(step))
            params[1].grad = None if step == 2 else params[1].grad
            optimizer.step()
        tensors = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
        ends.append([p.detach() for p in params] + tensors)
    for other in ends[1:]:
        assert all(torch.equal(x, y) for x, y in zip(ends[0], other, strict=True))


def test_every_turn_is_taken_once(cpu_threads):
    torch.set_num_threads(3)
    taken = []
    cpu_threads.divide_work(lambda lo, hi, extra: taken.extend((i, extra) for i in range(lo, hi)), 1000, 5, "x")
    assert sorted(taken) == [(i, "x") for i in range(1000)]


@pytest.mark.parametrize("kind", [KeyError, MemoryError, KeyboardInterrupt])
def test_what_a_turn_raises_is_raised(cpu_threads, kind):
    torch.set_num_threads(2)

    def fail(lo, hi):
        if hi == 10:
            raise kind("turn")

    with pytest.raises(kind, match="turn"):
        cpu_threads.divide_work(fail, 10, 100)


def test_two_callers_at_once(cpu_threads):
    torch.set_num_threads(2)
    found, barrier = {}, threading.Barrier(2)

    def train(key):
        params = parameters(SHAPES, torch.float32)
        optimizer = create_optimizer("efcp_sparse_mfac", params, lr=0.1, window_size=3, density=0.1)
        barrier.wait()
        for step in range(10):
            set_gradients(params, torch.Generator().manual_seed(step))
            optimizer.step()
        found[key] = [p.detach() for p in params]

    threads = [threading.Thread(target=train, args=(key,)) for key in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))


def test_out_of_memory_in_a_kernel_is_not_taken_for_a_missing_kernel(cpu_threads, monkeypatch):
    params = parameters(SHAPES, torch.float32)
    optimizer = create_optimizer("efcp_sparse_mfac", params, lr=0.1, window_size=3, density=0.1)
    set_gradients(params, torch.Generator())
    sparse = importlib.import_module("hf_efcp.kernels.cpu_sparse")

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(sparse, "apply", fail)  # a part of the parameters may be updated: never once more
    with pytest.raises(MemoryError, match="no room"):
        optimizer.step()
