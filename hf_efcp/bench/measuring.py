"""What `bench` measures: the machine's rates, times of steps and of their phases, and the memory that a step takes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..core.gram import GramMatrix
from ..core.linalg import ieee_matmul
from ..engine.base import EngineOptimizer
from ..engine.phases import PHASES as STEP_PHASES
from ..engine.phases import heard_by

# What tells the time; see `cpu_time`.
_clock: contextvars.ContextVar[Callable[[], float]] = contextvars.ContextVar("clock", default=time.perf_counter)
# What lies between the phases of the step is "rest".
PHASES = (*STEP_PHASES, "rest")
# By device type: bytes of the buffer that is copied, and the size of the square matrices.
_COPY = {"cpu": 128 * 2**20, "cuda": 2**30}
# Slots of a window that are filled at once: a multiple of the steps before.
_COPIED_SLOTS = 64
_SQUARE = {"cpu": {torch.float32: 2048, torch.float64: 1536}, "cuda": {torch.float32: 8192, torch.float64: 4096}}


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were taken on."""
    facts: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts["numba"] = importlib.metadata.version("numba")
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    numbers = ", ".join(f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts)
    return f"{facts.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()


@contextlib.contextmanager
def cpu_time(on: bool = True) -> Iterator[None]:
    """Where `on`, measure CPU time of this thread in place of wall time: what else runs on the machine takes none of it."""
    token = _clock.set(time.thread_time if on else time.perf_counter)
    try:
        yield
    finally:
        _clock.reset(token)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call, and of the work that it starts on the device: wall time, but for `cpu_time`."""
    clock = _clock.get()
    _wait(device)
    start = clock()
    call()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, mean, least and most."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "mean": statistics.fmean(values), "min": min(values), "max": max(values)}


class Rates:
    """Rates of the machine: bytes read plus bytes written, and operations of matrix products in fp32 and fp64, per second.

    `bandwidth` is the faster of a copy and of a scaling in place: a CPU's caches read a line before they write to it, which a
    copy pays for and an update in place does not.
    Sampled once a round, between the optimizers, so that what else the machine does hits all alike. fp32 is IEEE fp32, as in a
    step: no TF32.
    """

    def __init__(self, device: torch.device, small: bool = False):
        self._device = device
        kind = device.type if device.type in _COPY else "cuda"
        size, squares = (2**20, dict.fromkeys(_SQUARE[kind], 128)) if small else (_COPY[kind], _SQUARE[kind])
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        self._work: dict[str, tuple[float, Callable[[], object]]] = {
            "copy_bytes": (2 * size, lambda: target.copy_(source)),
            "scale_bytes": (2 * size, lambda: target.mul_(1.0)),
        }
        for dtype, n in squares.items():
            a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
            out = torch.empty_like(a)
            self._work[f"fp{dtype.itemsize * 8}_flops"] = (2 * n**3, functools.partial(torch.mm, a, b, out=out))
        self._samples: dict[str, list[float]] = {name: [] for name in ("bandwidth", *self._work)}
        self._measure()  # first touches, libraries' start
        self.sample()

    def sample(self) -> None:
        """Measure each once."""
        for name, rate in self._measure().items():
            self._samples[name].append(rate)

    def _measure(self) -> dict[str, float]:
        with ieee_matmul(self._device):
            rates = {name: amount / seconds(call, self._device) for name, (amount, call) in self._work.items()}
        return {"bandwidth": max(rates["copy_bytes"], rates["scale_bytes"]), **rates}

    def report(self) -> dict[str, dict[str, float]]:
        """Name -> spread, per second."""
        return {name: spread(samples) for name, samples in self._samples.items()}


def fill(optimizer: EngineOptimizer) -> None:
    """Make the window full after a few steps: filling m = 1024 by steps would take longer than the measurement.

    The other slots become copies of the entries so far, in the window's own format, rotated along the tensors' rows by another
    amount for each, so that no two are alike; K gets their norms and zeros between them, which is nearly true of random entries.
    A method without a window stays as it is.
    """
    setup = optimizer.setup()
    gram = setup.counters
    if not isinstance(gram, GramMatrix) or int(gram.step) >= gram.window_size:
        return
    m, written = gram.window_size, int(gram.step)
    for s in setup.stacks:
        specs = setup.specs[s.params[0]]
        for name, buffer in s.buffers.items():
            spec, slot = specs[name], written
            if spec.slot is None:
                continue
            dim = spec.slot + 1  # in front is the stack's own dimension
            while slot < m:  # a multiple of `written`: a copy of a copy has turned once for each
                number = min(slot, m - slot, _COPIED_SLOTS)
                entries = buffer.narrow(dim, 0, number)
                entries = entries if spec.rows is None else entries.roll(slot // written, spec.rows + 1)
                buffer.narrow(dim, slot, number).copy_(entries)
                slot += number
    norms = gram.matrix.diagonal(dim1=-2, dim2=-1)[:, torch.arange(m, device=gram.matrix.device) % written].clone()
    gram.matrix[:, written:] = 0
    gram.matrix[:, :, written:] = 0
    gram.matrix.diagonal(dim1=-2, dim2=-1).copy_(norms)
    gram.step.fill_(m)


@contextlib.contextmanager
def phases(device: torch.device) -> Iterator[dict[str, float]]:
    """Time the phases of the steps that are taken inside.

    Args:
        device: of the parameters. On a GPU a phase lasts from one event on the stream to another; meanwhile the device may
            also have waited for the host.

    Yields:
        Phase -> seconds, without "rest"; on a GPU they are there afterwards.
    """
    times = dict.fromkeys(STEP_PHASES, 0.0)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def on_host(name: str) -> Iterator[None]:
        """Add the phase's time by the host's clock."""
        clock = _clock.get()
        start = clock()
        yield
        times[name] += clock() - start

    @contextlib.contextmanager
    def on_device(name: str) -> Iterator[None]:
        """Put an event before the phase's work and one behind it: they are read when the device has passed them."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        events.append((name, start, end))

    with heard_by(on_device if device.type == "cuda" else on_host):
        yield times
    _wait(device)
    for name, start, end in events:
        times[name] += start.elapsed_time(end) / 1e3


def temporaries(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated at once during a call, above those before.

    On a CPU as torch's profiler sees torch's allocator: the work space of libraries is not in it.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    if not events:
        return 0
    events.sort(key=lambda e: e["ts"])
    first = events[0]["args"]
    return max(0, max(e["args"]["Total Allocated"] for e in events) - (first["Total Allocated"] - first["Bytes"]))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what libraries write to the process's standard error: the profiler tells there that it starts and stops."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of state by name, for any optimizer: ours say it themselves, of others all tensors are counted that they hold."""
    if hasattr(optimizer, "memory_footprint"):
        return optimizer.memory_footprint()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    seen = {id(t) for p in params for t in (p, p.grad)}
    seen |= {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if t is not None}
    sizes: dict[str, int] = {}

    def walk(name: str, value: object, depth: int) -> None:
        """Count the storages that are reached from `value`, each once, under `name` or a key near the top."""
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
            for inner in value.__tensor_flatten__()[0]:
                walk(name, getattr(value, inner), depth + 1)
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[name] = sizes.get(name, 0) + storage.nbytes()
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(key if isinstance(key, str) and depth < 2 else name, inner, depth + 1)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(name, inner, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ not in sys.stdlib_module_names:
            walk(name, vars(value), depth + 1)

    for entry in optimizer.state.values():
        walk("state", entry, 1)
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "defaults"):
            walk(name, value, 3)
    return sizes
