"""The metric's state, whose names begin with `metric`: what it takes, its dtypes, saved and loaded in the middle of a run."""

import copy

import pytest
import torch

from hf_efcp import OptionError
from tests.optim.helpers import EVERY, M, clones, differences, fresh, pairwise, resumed, snapshot, started, through_a_file, train
from tests.optim.metric_runs import METRICS
from tests.reference import names, parameters

WINDOWED = pytest.mark.parametrize("name", names(windowed=True))
ALL_METRICS = ["tensor", "diagonal", "factored"]
MORE = {"window_momentum": 0.8, "window_nesterov": True, "rms_mode": "adam", "update_rms": 0.1}


def metric_entries(optimizer, p):
    return {name: t for name, t in optimizer.state[p].items() if name.startswith("metric")}


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pairwise(
    name=names(windowed=True),
    options=[{}, {"scope": "layer", "momentum": 0.9}, {"error_dtype": "bf16", "window_dtype": "bf16"}, {"centered": True}],
    metric=ALL_METRICS,
)
def test_a_run_goes_on_bit_for_bit(name, metric, options):
    options = {**MORE, **options, "metric": metric}
    for steps in (1, M + 2):
        optimizer, params = started(name, steps=steps, **options)
        other, others = resumed(name, optimizer, params, **options)
        assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
        train(optimizer, params, steps, steps + M + 1)
        train(other, others, steps, steps + M + 1)
        assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@METRICS
@WINDOWED
def test_a_run_goes_on_where_a_tensor_has_had_no_gradient_yet(name, metric):
    """Each tensor counts its own gradients, and the count is saved."""
    options = {**MORE, "metric": metric}
    optimizer, params = started(name, steps=0, shapes=[(12, 30), (12, 30), (7,)], **options)
    for t in range(M):
        train_without(optimizer, params, t, 1)
    other, others = resumed(name, optimizer, params, **options)
    for t in range(M, 3 * M):
        for run, theirs in ((optimizer, params), (other, others)):
            train(run, theirs, t, t + 1)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


def train_without(optimizer, params, t, absent):
    for i, p in enumerate(params):
        p.grad = None if i == absent else torch.full_like(p, 0.1 * (t + 1))
    optimizer.step()


@METRICS
@WINDOWED
def test_a_copy_goes_on_bit_for_bit(name, metric):
    optimizer, params = started(name, metric=metric, **MORE)
    other, others = copy.deepcopy((optimizer, params))
    train(optimizer, params, 20, 20 + M)
    train(other, others, 20, 20 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@pairwise(name=names(windowed=True), dtype=[torch.bfloat16, torch.float16, torch.float32, torch.float64], metric=ALL_METRICS)
def test_its_numbers_are_fp32_for_low_precision_parameters_and_after_loading(name, metric, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    optimizer, params = started(name, dtype=dtype, metric=metric, window_dtype="bf16", error_dtype="bf16")
    other, others = resumed(name, optimizer, params, metric=metric, window_dtype="bf16", error_dtype="bf16")
    for run, theirs in ((optimizer, params), (other, others)):
        entries = [metric_entries(run, p) for p in theirs]
        assert all(any(t.is_floating_point() for t in entry.values()) for entry in entries)
        assert {t.dtype for entry in entries for t in entry.values() if t.is_floating_point()} == {expected}
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@pairwise(name=names(windowed=True), metric=ALL_METRICS, scope=["model", "layer"])
def test_the_footprint_has_it_and_the_estimate_too(name, metric, scope):
    optimizer, params = started(name, metric=metric, scope=scope)
    footprint = optimizer.memory_footprint()
    held = [t for p in params for t in metric_entries(optimizer, p).values()]
    assert footprint["metric"] == size(held) > 0
    assert fresh(name, clones(params), metric=metric, scope=scope).estimate_footprint() == footprint
    saved = through_a_file(optimizer.state_dict())
    assert sum(footprint.values()) == size(t for entry in saved["state"].values() for t in entry.values())


@EVERY
def test_without_a_metric_there_is_no_state_of_it(name):
    optimizer, params = started(name)
    assert "metric" not in optimizer.memory_footprint()
    assert not any(metric_entries(optimizer, p) for p in params)


@pytest.mark.parametrize(
    ("metric", "matrix", "vector"),
    # Bytes beside the few numbers that each tensor has: its count, its mean.
    [("tensor", 0, 0), ("diagonal", 4 * 300 * 400, 4 * 500), ("factored", 4 * (300 + 400), 4 * 500)],
)
@WINDOWED
def test_bytes(name, metric, matrix, vector):
    params = parameters([(300, 400), (500,)], torch.float32)
    optimizer = fresh(name, params, metric=metric)
    train(optimizer, params, 0, 1)
    for p, expected in zip(params, (matrix, vector), strict=True):
        assert 0 <= size(metric_entries(optimizer, p).values()) - expected <= 64


@METRICS
@WINDOWED
def test_every_other_metric_is_refused_at_loading(name, metric):
    optimizer, params = started(name, metric=metric)
    saved = through_a_file(optimizer.state_dict())
    for other in {"none", "tensor", "diagonal", "factored"} - {metric}:
        stranger = fresh(name, clones(params), metric=other)
        with pytest.raises(OptionError, match="metric"):
            stranger.load_state_dict(saved)
