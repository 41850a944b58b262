"""What others do with an optimizer, on the per-tensor toy of tests/toys.py; and its step as on a GPU, where flags are masks."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import hf_efcp.core.compressors
import hf_efcp.core.deferred
import hf_efcp.engine.tensorwise
from tests import toys
from tests.engine.test_toys import build, gradients, problem, train
from tests.optim.helpers import all_finite, differences, same, snapshot, step_quietly, through_a_file
from tests.optim.test_deferred import NoReading

NAME = "efcp_toy_factors"
FORMATS = pytest.mark.parametrize("options", [{}, {"error_dtype": "bf16"}, {"error_format": "int4"}], ids=str)


@pytest.fixture(autouse=True)
def registered():
    with toys.registered():
        yield


class Model(nn.Module):
    """The test problem as a module."""

    def __init__(self):
        super().__init__()
        self.tensors = nn.ParameterList(problem(torch.float32))


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_identically_and_moves_nothing(how, steps):
    model = Model()
    params = list(model.tensors)
    optimizer = build(NAME, params, error_dtype="bf16")
    train(optimizer, params, 0, steps)
    clone, other = how((model, optimizer))
    others = list(clone.tensors)
    before = snapshot(optimizer, params)
    train(other, others, steps, steps + 4)
    assert differences(before, snapshot(optimizer, params)) == []
    train(optimizer, params, steps, steps + 4)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    assert optimizer.diagnostics() == other.diagnostics()


def test_a_compiled_step_is_the_step():
    def run(wrap):
        params = problem(torch.float32)
        optimizer = build(NAME, params)
        step = wrap(optimizer.step)
        for t in range(4):
            gradients(params, t)
            step()
        return snapshot(optimizer, params)

    assert differences(run(lambda step: step), run(lambda step: torch.compile(lambda: step(), backend="eager"))) == []


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    params, others = problem(torch.float32), problem(torch.float32)
    optimizer, other = build(NAME, params), build(NAME, others)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        for p in params:
            p.grad = None
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(3):
        expected = sum(q.detach().square().sum() for q in others)
        assert torch.equal(optimizer.step(closure).detach(), expected)
        for q in others:
            q.grad = 2 * q.detach()
        other.step()
    assert calls == [True] * 3
    assert all(same(p, q) for p, q in zip(params, others, strict=True))


def test_a_group_that_joins_has_fresh_state_and_its_own_options():
    params = problem(torch.float32)
    optimizer = build(NAME, params)
    train(optimizer, params, 0, 5)
    before = snapshot(optimizer, params)
    new, still = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(10, 8))
    optimizer.add_param_group({"params": [new], "compress": False})
    optimizer.add_param_group({"params": [still], "lr": 0.0})
    optimizer.setup()
    assert [d for d in differences(before, snapshot(optimizer, params)) if not d.startswith("group")] == []
    start, start_of_still = new.detach().clone(), still.detach().clone()
    everything = [*params, new, still]
    train(optimizer, everything, 5, 8)
    assert optimizer.state[new].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[still].keys() == {"step", "error", "mean", "right"}
    assert [int(optimizer.state[p]["step"]) for p in (params[0], new, still)] == [8, 3, 3]
    assert not torch.equal(new, start) and same(still.detach(), start_of_still)
    assert optimizer.estimate_footprint() == optimizer.memory_footprint()

    others = [nn.Parameter(p.detach().clone()) for p in everything]
    groups = [{"params": others[:-2]}, {"params": [others[-2]], "compress": False}, {"params": [others[-1]], "lr": 0.0}]
    other = build(NAME, groups)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, everything, 8, 12)
    train(other, others, 8, 12)
    assert differences(snapshot(optimizer, everything), snapshot(other, others)) == []


def test_a_scheduler_sets_the_rate():
    params, others = problem(torch.float32), problem(torch.float32)
    optimizer, other = build(NAME, params), build(NAME, others)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for t in range(5):
        other.param_groups[0]["lr"] = 0.02 / (1 + t)
        train(optimizer, params, t, t + 1)
        train(other, others, t, t + 1)
        scheduler.step()
    assert all(same(p, q) for p, q in zip(params, others, strict=True))


@FORMATS
def test_zero_gradients_allocate_the_state_and_are_no_step(options):
    """The step by which torch.distributed.checkpoint allocates what it loads into."""
    params = problem(torch.float32)
    optimizer = build(NAME, params, **options)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert sum(optimizer.memory_footprint().values()) == sum(optimizer.estimate_footprint().values()) > 0
    assert set(optimizer.state) == set(params)
    assert all_finite(optimizer, params)
    assert all(
        int(entry[name]) == 0 for entry in optimizer.state.values() for name in {"step", "counter", "skipped"} & entry.keys()
    )
    assert all(same(p, s) for p, s in zip(params, start, strict=True))


@pytest.mark.parametrize("steps", [0, 5], ids=["new", "trained"])
def test_state_dicts_of_torch_distributed_checkpoint_go_on_bit_for_bit(steps):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, other_model = Model(), Model()
    params, others = list(model.tensors), list(other_model.tensors)
    optimizer, other = build(NAME, params), build(NAME, others)
    train(optimizer, params, 0, 6)
    saved = through_a_file(dcp.get_optimizer_state_dict(model, optimizer))
    train(other, others, 30, 30 + steps)
    other_model.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other_model, other, optim_state_dict=saved)
    train(optimizer, params, 6, 10)
    train(other, others, 6, 10)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


# As on a GPU -------------------------------------------------------------------------------------------------------------

DEFERRED = pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"error_dtype": "bf16", "stochastic_rounding": True}, torch.bfloat16),
        ({"error_format": "int8"}, torch.float32),
        ({"error_format": "int4", "weight_decay_mode": "l2"}, torch.float64),
    ],
    ids=str,
)


@pytest.fixture
def deferred(monkeypatch):
    """From here on, reading a flag of the CPU counts as waiting. A GPU has no kernels for low rank."""
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")

    def switch(on=True):
        for module in (hf_efcp.engine.tensorwise, hf_efcp.core.deferred, hf_efcp.core.compressors):
            monkeypatch.setattr(module, "readable", lambda device: not on)

    return switch


@DEFERRED
def test_skipped_steps_leave_no_trace_and_the_others_are_the_same_to_the_bit(options, dtype, deferred):
    params, others = problem(dtype), problem(dtype)
    optimizer, twin = build(NAME, params, **options), build(NAME, others, **options)
    deferred()
    for t in range(8):
        if t >= 2:
            gradients(params, 99)
            params[t % len(params)].grad.view(-1)[-1] = torch.nan if t % 2 else torch.inf
            before = snapshot(optimizer, params, without=["skipped"])
            step_quietly(optimizer)
            assert differences(before, snapshot(optimizer, params, without=["skipped"])) == []
        with warnings.catch_warnings():  # of a step late, and none else
            warnings.filterwarnings("ignore", ".*a gradient is not finite", RuntimeWarning)
            train(optimizer, params, t, t + 1)
    deferred(False)
    train(twin, others, 0, 8)
    assert differences(snapshot(twin, others, ["skipped"]), snapshot(optimizer, params, ["skipped"])) == []
    assert optimizer.diagnostics() == {**twin.diagnostics(), "skipped_steps": 6.0}


def test_a_first_gradient_that_is_not_finite_allocates_and_counts(deferred):
    deferred()
    params = problem(torch.float32)
    optimizer = build(NAME, params)
    start = [p.detach().clone() for p in params]
    gradients(params, 0)
    params[2].grad.fill_(torch.nan)
    step_quietly(optimizer)
    assert optimizer.diagnostics() == {"step": 0.0, "skipped_steps": 1.0}
    assert all(same(p, s) for p, s in zip(params, start, strict=True)) and all_finite(optimizer, params)


@DEFERRED
def test_a_step_reads_nothing_from_the_device(options, dtype, deferred):
    params = problem(dtype)
    optimizer = build(NAME, params, **options)
    deferred()
    train(optimizer, params, 0, 3)
    gradients(params, 3)
    with NoReading(optimizer.setup().skips._copy):
        optimizer.step()
    deferred(False)
    with pytest.raises(AssertionError, match="would wait"), NoReading():
        optimizer.step()
