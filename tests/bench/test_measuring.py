"""What is measured: full windows, phases, temporaries, bytes of state."""

import time

import pytest
import torch

import hf_efcp
from hf_efcp.bench import measuring
from hf_efcp.engine.phases import PHASES
from tests.bench.helpers import CPU, phases_of, started, workload
from tests.optim.helpers import differences, snapshot
from tests.reference import NAMES, args_known_to, names, stack_of, window


@pytest.mark.parametrize("name", names(windowed=True))
def test_a_filled_window_is_one_that_steps_could_have_made(name):
    """Full, no two rows alike, K's diagonal true, and a step on it is taken without the way out for dependent rows."""
    shapes_ = {"a.weight": (64, 48), "b.weight": (50, 60), "a.bias": (48,)}
    optimizer, work = started(name, "window_size=16", 4, shapes_)
    kept = window(optimizer, work.params)[:4]
    measuring.fill(optimizer)
    rows = window(optimizer, work.params)
    assert torch.equal(rows[:4], kept)
    k = optimizer.setup().counters.matrix[0]
    assert torch.allclose(k.diagonal(), rows.square().sum(1))
    cosines = (rows @ rows.T) / (rows.norm(dim=1) * rows.norm(dim=1)[:, None])
    assert (cosines - torch.eye(16)).abs().max() < 0.6
    assert int(optimizer.setup().counters.step) == 16
    for _ in range(17):
        work.new_gradients()
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 0
    assert optimizer.diagnostics()["kappa"] < 10


@pytest.mark.parametrize("name", names(windowed=False))
def test_without_a_window_there_is_nothing_to_fill(name):
    optimizer, work = started(name)
    before = snapshot(optimizer, work.params)
    measuring.fill(optimizer)
    assert differences(before, snapshot(optimizer, work.params)) == []


def test_phases_add_up_to_the_step_and_are_told_apart(monkeypatch):
    optimizer, work = started("efcp_dense_mfac", "window_size=4")
    stack = stack_of(optimizer, work.params[0])
    original = type(stack.window).combine

    def slow(self, *args):
        time.sleep(0.05)
        return original(self, *args)

    monkeypatch.setattr(type(stack.window), "combine", slow)
    with measuring.phases(CPU) as times:
        whole = measuring.seconds(optimizer.step, CPU)
    assert set(times) == set(measuring.PHASES) - {"rest"}
    assert 0.1 <= times["update"] < sum(times.values()) <= whole
    assert min(times.values()) > 0
    assert max(t for phase, t in times.items() if phase != "update") < 0.1
    heard = dict(times)
    optimizer.step()
    assert times == heard  # nobody listens to a later step


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_names_every_phase(name):
    optimizer, _ = started(name, args_known_to(name, "window_size=4"))
    with measuring.phases(CPU) as times:
        optimizer.step()
    assert tuple(times) == PHASES and {phase for phase in times if times[phase] > 0} == set(phases_of(name))


def test_on_a_gpu_a_phase_lasts_from_event_to_event(monkeypatch):
    """Events that take the host's clock, as no GPU is needed to see where they stand; they are read when the device is done."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            assert done
            return 1e3 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    optimizer, _ = started("efcp_dense_mfac", "window_size=4")
    with measuring.phases(torch.device("cuda")) as times:
        whole = measuring.seconds(optimizer.step, CPU)
    assert min(times.values()) > 0 and sum(times.values()) <= whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_phases_on_a_gpu():
    model = torch.nn.Linear(512, 512, device="cuda")
    optimizer = hf_efcp.create_optimizer("efcp_lowrank_mfac", model, lr=0.1, window_size=4)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with measuring.phases(torch.device("cuda")) as times:
        whole = measuring.seconds(optimizer.step, torch.device("cuda"))
    assert min(times.values()) > 0 and sum(times.values()) <= 1.1 * whole


def test_temporaries():
    assert 4 * 2**20 <= measuring.temporaries(lambda: torch.zeros(2**20) + 1, CPU) <= 9 * 2**20
    assert measuring.temporaries(lambda: None, CPU) == 0


def test_state_bytes_of_others_counts_what_hides_in_objects():
    work = workload()
    params = work.params
    optimizer = torch.optim.AdamW(params, lr=0.1)
    work.new_gradients()
    optimizer.step()
    count = sum(p.numel() for p in params)
    assert measuring.state_bytes(optimizer) == {"exp_avg": 4 * count, "exp_avg_sq": 4 * count, "step": 8}

    class Projector:
        def __init__(self):
            self.basis = torch.zeros(10)
            self.same = self.basis
            self.gradient = params[0].grad

    optimizer.state[params[0]]["projector"] = Projector()
    assert measuring.state_bytes(optimizer)["projector"] == 40
