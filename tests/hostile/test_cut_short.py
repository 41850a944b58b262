"""A step that raises in its middle: as if it had not begun, or refused until a checkpoint is loaded; nothing is written twice."""

import contextlib
import copy
import itertools
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efcp.engine import together
from hf_efcp.kernels import calls
from tests.hostile.conftest import Record
from tests.optim.helpers import EVERY, compressed_names, differences, gradients_at, snapshot, started
from tests.reference import each

SHAPES = ((7,), (12, 30), (12, 30), (40, 11), (3, 4), ())
FORMATS = (
    {},
    {"window_format": "low_bit", "error_format": "int8", "metric": "factored", "residual": "momentum", "update_rms": 0.1},
)
RECORD = Record("faults in a step")
FAULTS = 6  # of each kind in a case, spread over the step


class Fault(TorchDispatchMode):
    """Counts operations of torch; raises at one of them, before it is done.

    Args:
        at: number of the operation; None: at none.
        error: what is raised.
    """

    def __init__(self, at=None, error=MemoryError):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error("injected")
        return function(*args, **(kwargs or {}))


class KernelFault:
    """The same for calls of compiled functions of the CPU, raising before or after one of them has done its work."""

    def __init__(self, at=None, error=RuntimeError, after=False):
        self.patches, self.at, self.error, self.after, self.count = pytest.MonkeyPatch(), at, error, after, 0

    def __enter__(self):
        for name, module in [*sys.modules.items()]:
            if name.startswith("hf_efcp.kernels.") and hasattr(module, "divide_work") and not name.endswith("cpu_threads"):
                self.patches.setattr(module, "divide_work", self._wrapped(module.divide_work))
        return self

    def __exit__(self, *error):
        self.patches.undo()

    def _wrapped(self, divide_work):
        def wrapped(*args):
            self.count += 1
            hit = self.count - 1 == self.at
            if hit and not self.after:
                raise self.error("injected")
            divide_work(*args)
            if hit:
                raise self.error("injected")

        return wrapped


class Run:
    """An optimizer before a step that can be taken again and again, and what the step leads to."""

    def __init__(self, name, options):
        self.optimizer, self.params = started(name, steps=5, shapes=SHAPES, **options)
        self.saved = copy.deepcopy(self.optimizer.state_dict())
        self.values = [p.detach().clone() for p in self.params]
        self.gradients()
        self.before = snapshot(self.optimizer, self.params)
        self.optimizer.step()
        self.after = snapshot(self.optimizer, self.params)
        self.restore()

    def gradients(self):
        gradients_at(5, self.params)

    def restore(self):
        with torch.no_grad():
            for p, value in zip(self.params, self.values, strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.saved))
        self.gradients()
        together.stacks_of(self.optimizer.setup())  # what is compiled when it is built, is

    def is_at(self, there):
        return not differences(snapshot(self.optimizer, self.params), there)

    def check(self, fault, label):
        """Take a step with the fault; give what became of it."""
        calls.FAILED.clear()
        raised = None
        with fault:
            try:
                self.optimizer.step()
            except BaseException as error:
                raised = error
        if raised is None:  # a kernel did not do it, and torch did
            now = snapshot(self.optimizer, self.params)
            for key in differences(now, self.after):
                assert "parameter" not in key or torch.allclose(now[key], self.after[key], rtol=1e-4, atol=1e-6), (label, key)
            outcome = "done otherwise"
        else:
            assert isinstance(raised, fault.error) and "injected" in str(raised), (label, raised)
            if not self.optimizer.builder.torn:
                assert self.is_at(self.before), (label, differences(snapshot(self.optimizer, self.params), self.before))
                outcome = "not begun"
            else:
                there = snapshot(self.optimizer, self.params)
                for refused in (self.optimizer.step, self.optimizer.state_dict, lambda: copy.deepcopy(self.optimizer)):
                    with pytest.raises(RuntimeError, match=r"half-way, in \w+.*load_state_dict"):
                        refused()
                assert self.is_at(there), label
                self.restore()
                outcome = "refused"
            calls.FAILED.clear()
            self.optimizer.step()
            assert self.is_at(self.after), (label, differences(snapshot(self.optimizer, self.params), self.after))
        self.restore()
        RECORD.add(label, "refused" if outcome == "refused" else "survived")
        return outcome


@pytest.fixture(autouse=True)
def forget_failures(caplog):
    before = set(calls.FAILED)
    yield
    calls.FAILED.clear()
    calls.FAILED |= before


@pytest.mark.parametrize("options", FORMATS, ids=["plain", "codes"])
@EVERY
def test_at_an_operation_of_torch(name, options):
    run, errors = Run(name, options), itertools.cycle((torch.OutOfMemoryError, KeyboardInterrupt, MemoryError))
    with Fault() as counted:
        run.optimizer.step()
    run.restore()
    found = set()
    for i in range(FAULTS):
        at = i * counted.count // FAULTS
        found.add(run.check(Fault(at, next(errors)), f"{name} {options}: operation {at} of {counted.count}"))
    assert {"not begun", "refused"} <= found


@pytest.mark.parametrize("options", FORMATS, ids=["plain", "codes"])
@EVERY
def test_at_a_kernel(name, options):
    pytest.importorskip("numba")
    faults_at_kernels(name, options)


@pytest.mark.parametrize("name", each(compressed_names()))
def test_at_a_kernel_that_takes_many_shapes_together(name, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(together, "_MANY", 2)
    faults_at_kernels(name, {})


def faults_at_kernels(name, options):
    """Raise at calls of compiled functions, before and after their work."""
    run, errors = Run(name, options), itertools.cycle((RuntimeError, KeyboardInterrupt, ValueError))
    with KernelFault() as counted:
        run.optimizer.step()
    run.restore()
    found = set()
    for after in (False, True):
        for at in sorted({i * counted.count // FAULTS for i in range(min(FAULTS, counted.count))}):
            label = f"{name} {options}: kernel {at} of {counted.count}, {'after' if after else 'before'} its work"
            found.add(run.check(KernelFault(at, next(errors), after), label))
    assert found or not counted.count


def test_a_pool_that_gets_no_thread_does_the_work_once(monkeypatch):
    threads = pytest.importorskip("hf_efcp.kernels.cpu_threads")
    monkeypatch.setattr(threads, "_gomp_parallel", None)
    monkeypatch.setattr(threads, "_SMALL", 1)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    done, there = [], threads._pool(threads.os.getpid())

    def no_thread(work):
        submit(work)  # it is in the queue, as with a ThreadPoolExecutor that cannot start a thread
        raise RuntimeError("can't start new thread")

    submit = there.submit
    monkeypatch.setattr(there, "submit", no_thread)
    with contextlib.suppress(AttributeError):
        threads.divide_work(lambda lo, hi: done.extend(range(lo, hi)), 1000, 5)
    assert sorted(done) == list(range(1000))
