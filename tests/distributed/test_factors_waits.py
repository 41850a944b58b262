"""comm="factors" on a GPU: nothing in backward waits, neither the host nor the stream that backward runs on."""

import contextlib
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efcp.bench import launches
from hf_efcp.core import deferred
from hf_efcp.distributed.ddp import Replicas
from hf_efcp.kernels.devices import pretending
from tests.cli.helpers import module
from tests.distributed.factor_runs import batch, build, start
from tests.distributed.processes import run
from tests.reference import names

SHAPES = {"a": (24, 16), "b": (24, 16), "c": (16,), "d": (24, 16), "e": (40, 30)}
METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8}
OPTIONS = [{}, METRIC, {**METRIC, "power_iterations": 2, "weight_decay": 0.1, "weight_decay_mode": "l2"}, {"error_dtype": "bf16"}]
LOW_RANK = names(compression="low rank", family="mfac")


class Bucket:
    """What DDP gives its hook."""

    def __init__(self, number, params):
        self.number, self.params = number, params
        self.flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)

    def index(self):
        return self.number

    def buffer(self):
        return self.flat

    def parameters(self):
        return self.params

    def gradients(self):
        parts = self.flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for p, part in zip(self.params, parts, strict=True)]


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes, of which the other is only said to be there."""
    monkeypatch.setattr(Replicas, "gather", lambda self, mine: [mine, mine])
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def backward(optimizer, buckets):
    for i, params in enumerate(buckets):
        bucket = Bucket(i, params)
        future = optimizer.builder.sync.reduce(bucket, optimizer.setup(), optimizer.param_groups, optimizer.options)
        assert future.done()
        for p, g in zip(params, bucket.gradients(), strict=True):
            p.grad = g


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LOW_RANK)
def test_only_a_new_bucket_copies_from_the_host(name, options, two_processes):
    counter, model = launches._Counter(None), module(SHAPES)
    waits, steps = [], []
    with FakeTensorMode(allow_non_fake_inputs=True), pretending("cuda"), launches._without_launches(counter):
        work = launches.Workload(model, torch.device("cpu"))
        optimizer = build(name, work.model, comm="factors", **options)
        optimizer.builder.sync.replicas = Replicas()
        a, b, c, d, e = work.params
        with counter:  # it reads flags
            optimizer.setup().started = True
        for buckets in 3 * [[[d, e, c], [b, a]]] + 2 * [[[e, d, b], [c, a]]]:
            with counter, torch.no_grad():
                counter.tallies["rest"] = launches.Tally()
                backward(optimizer, buckets)
                tally = counter.tallies["rest"]
                waits.append(tally.waits.total())
                assert not tally.reads and tally.launches > 20
                for phase in counter.tallies:
                    counter.tallies[phase] = launches.Tally()
                optimizer.step()
                steps.append(sum(t.waits.total() + t.reads.total() for t in counter.tallies.values()))
    assert [bool(count) for count in waits] == [True, False, False, True, False]
    assert not any(steps[2:])


class Names(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def waits_of_backwards(rank, options):
    """How often each backward waits, in the way of a GPU, on the buckets that DDP makes and makes again."""
    optimizer, model = start(LOW_RANK[0], **options)
    sync, found = optimizer.builder.sync, []
    original = sync._reduce

    def watched(*args):
        with pretending("cuda"), Names() as mode:
            original(*args)
        found[-1] += mode.names

    sync._reduce = watched
    for step in range(5):
        optimizer.zero_grad()
        found.append(Counter())
        model(batch(step, rank, 2)).backward()
        optimizer.step()
    assert all(names["mm"] + names["bmm"] for names in found)
    return [sum(names[n] for n in deferred.WAITS | deferred.NUMBERS | deferred.SIZES) for names in found]


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
def test_from_the_third_backward_of_a_real_ddp_nothing_waits(options, monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")
    for waits in run(2, waits_of_backwards, options):
        assert waits[0] and not any(waits[2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward_and_step_return_while_the_device_is_busy(options, tmp_path):
    """One process with the hook of several; NCCL is on its own stream all the same."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2))).cuda()
        optimizer = build(LOW_RANK[0], model, comm="factors", **options)
        model = DistributedDataParallel(model, bucket_cap_mb=0.02)
        sync = optimizer.builder.sync
        sync.replicas = Replicas()
        model.register_comm_hook(
            None,
            torch.no_grad()(lambda _, bucket: sync.reduce(bucket, optimizer.setup(), optimizer.param_groups, optimizer.options)),
        )
        x = torch.randn(8, 64, device="cuda")
        for sleeping in (False, False, False, False, True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            torch.cuda.synchronize()
            done = torch.cuda.Event()
            with _nothing_waits() if sleeping else contextlib.nullcontext():
                torch.cuda._sleep(10**9 if sleeping else 1)
                done.record()
                begin = time.perf_counter()
                loss.backward()
                optimizer.step()
            assert not sleeping or not done.query(), f"{time.perf_counter() - begin:.3f} s"
        torch.cuda.synchronize()
        assert all(p.isfinite().all() for p in model.parameters())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _nothing_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
