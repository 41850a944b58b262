"""A first run on a GPU is told that kernels are compiled; a run that finds them on disk, and every other process, is not."""

import pytest
import torch

from hf_efcp.kernels import calls, gpu_compiling


@pytest.fixture
def launch(monkeypatch, caplog):
    """Launch a kernel of another name each time, on a GPU that is none; return what has been said so far."""
    clock = [100.0]
    monkeypatch.setattr(calls.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(calls, "_WORKED", set())

    class Kernels:
        seconds = 0.0

        def __getattr__(self, name):
            def kernel(x):
                clock[0] += self.seconds
                return x

            return kernel

    kernels = Kernels()
    monkeypatch.setattr(calls, "_loaded", dict.fromkeys(("gpu_keep", "gpu_update", "gpu_windows"), kernels))

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")
        is_cuda = True

    def launched(name, seconds):
        kernels.seconds = seconds
        with caplog.at_level("WARNING", "hf_efcp.compiling"):
            assert calls.attempt(name, torch.ones(3).as_subclass(OnGpu), "done") == "done"
        return [r.message for r in caplog.records]

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(calls, "ANNOUNCEMENT", gpu_compiling.Announcement())
    return launched


def test_a_launch_that_compiles_is_announced_once(launch):
    assert launch("keep", 0.05) == []
    (said,) = launch("add", 0.9)
    assert said.startswith("compiling GPU kernels")
    assert launch("store", 0.9) == [said]


def test_kernels_from_the_disk_are_not_announced(launch):
    assert launch("keep", 0.05) == launch("add", 0.05) == []


def test_a_later_launch_that_takes_long_is_not_announced(launch):
    assert launch("keep", 0.05) == launch("keep", 3.0) == []


def test_other_processes_of_a_machine_are_silent(launch, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(calls, "ANNOUNCEMENT", gpu_compiling.Announcement())
    assert launch("keep", 3.0) == []
