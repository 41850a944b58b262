"""Saved and resumed is the run that was not interrupted, bit for bit."""

import copy

import pytest
import torch

from tests.optim.helpers import (
    CHECKPOINT_OPTIONS,
    EVERY,
    M,
    clones,
    count,
    differences,
    fresh,
    gradients_at,
    resumed,
    same,
    snapshot,
    started,
    through_a_file,
    train,
)
from tests.reference import parameters


@CHECKPOINT_OPTIONS
@EVERY
def test_save_and_resume_is_the_uninterrupted_run(name, options):
    """Bit for bit, from before the first step, while the window fills, at the wrap-around and after it."""
    points, stop = (0, 2, M, 2 * M + 1), 2 * M + 3
    dtype = torch.bfloat16 if "weight_decay" in options else torch.float32
    optimizer, params = started(name, steps=0, dtype=dtype, **options)
    runs = []
    for t in range(stop):
        if t in points:
            runs.append((t, *resumed(name, optimizer, params, **options)))
        train(optimizer, params, t, t + 1)
    expected = snapshot(optimizer, params)
    for t, other, others in runs:
        train(other, others, t, stop)
        assert differences(expected, snapshot(other, others)) == [], f"saved at {t}"


@EVERY
def test_save_and_resume_again_and_again(name):
    optimizer, params = started(name, steps=0)
    other, others = started(name, steps=0)
    for t in range(2 * M + 1):
        other, others = resumed(name, other, others)
        train(other, others, t, t + 1)
        train(optimizer, params, t, t + 1)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
def test_resume_after_skips_absent_gradients_and_a_group_added_mid_run(name):
    optimizer, params = started(name)
    gradients_at(90, params)
    params[0].grad.fill_(float("nan"))
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    new = parameters([(12, 30), (6, 9)], torch.float32, seed=7)
    optimizer.add_param_group({"params": new, "lr": 0.5, "weight_decay": 0.3})
    everything = [*params, *new]
    gradients_at(91, everything)
    everything[1].grad = everything[7].grad = None
    optimizer.step()
    others = clones(everything)
    n = len(params)
    other = fresh(name, [{"params": others[:n]}, {"params": others[n:], "lr": 7.0}])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[1]["lr"] == 0.5 and count(other, "skipped") == 1
    train(optimizer, everything, 92, 92 + M)
    train(other, others, 92, 92 + M)
    assert differences(snapshot(optimizer, everything), snapshot(other, others)) == []


@EVERY
def test_resume_with_parameters_frozen_from_the_start(name):
    params = parameters(dtype=torch.float32)
    for i in (0, 3):
        params[i].requires_grad_(False)
    optimizer = fresh(name, params)
    train(optimizer, [p for p in params if p.requires_grad], 0, M + 1)
    other, others = resumed(name, optimizer, params)
    train(optimizer, [p for p in params if p.requires_grad], 10, 10 + M)
    train(other, [p for p in others if p.requires_grad], 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@pytest.mark.parametrize("unfrozen", [0, 3, None], ids=["first unfrozen", "third unfrozen", "added"])
@EVERY
def test_resume_from_before_the_first_step_of_a_newcomer(name, unfrozen):
    params, new = parameters(dtype=torch.float32), []
    if unfrozen is not None:
        params[unfrozen].requires_grad_(False)
    optimizer = fresh(name, params)
    train(optimizer, [p for p in params if p.requires_grad], 0, M + 1)
    if unfrozen is None:
        new = parameters([(12, 30), (9,)], torch.float32, seed=7)
        optimizer.add_param_group({"params": new, "lr": 0.5})
    else:
        params[unfrozen].requires_grad_(True)
    saved, n = through_a_file(optimizer.state_dict()), len(params)
    runs = [(optimizer, [*params, *new])]
    for steps in (0, 2):  # into a new optimizer, and into one that has trained the newcomer
        others = clones([*params, *new])
        other = fresh(name, [{"params": part} for part in (others[:n], others[n:]) if part])
        was = clones(others)
        train(other, others, 0, steps)
        with torch.no_grad():
            for p, q in zip(others, was, strict=True):
                p.copy_(q)
        other.load_state_dict(saved)
        runs.append((other, others))
    for run in runs:
        train(*run, 10, 10 + M + 1)
    expected, *found = [snapshot(*run) for run in runs]
    assert [differences(expected, run) for run in found] == [[], []]


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_dense_ggt"])
def test_resume_with_a_parameter_frozen_mid_run(name):
    """The uninterrupted run keeps that parameter's rows, and K counts them: so must the resumed one."""
    optimizer, params = started(name)
    params[1].requires_grad_(False)
    params[1].grad = None
    live = [p for p in params if p.requires_grad]
    train(optimizer, live, 10, 11)
    other, others = resumed(name, optimizer, params)
    train(optimizer, live, 11, 11 + M)
    train(other, [p for p in others if p.requires_grad], 11, 11 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
def test_a_checkpoint_of_nothing(name):
    """Saved before the first step, or after zero gradients: loading it makes a trained optimizer a new one."""
    empty, params = started(name, steps=0)
    allocated, more = started(name, steps=0)
    for p in more:
        p.grad = torch.zeros_like(p)
    allocated.step()
    expected, reference = started(name, steps=0)
    train(expected, reference, 0, M + 2)
    for source in (empty, allocated):
        optimizer, _ = started(name)
        others = clones(params)
        optimizer = fresh(name, others)
        train(optimizer, others, 30, 30 + M + 1)
        optimizer.load_state_dict(through_a_file(source.state_dict()))
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q)
        assert count(optimizer) == 0
        train(optimizer, others, 0, M + 2)
        assert differences(snapshot(optimizer, others), snapshot(expected, reference)) == []


@EVERY
def test_loading_into_a_trained_optimizer_replaces_all_of_it(name):
    optimizer, params = started(name, momentum=0.5)
    other, others = started(name, steps=2 * M + 1, momentum=0.5, lr=3.0)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.diagnostics() == {} or other.diagnostics() == optimizer.diagnostics()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    train(optimizer, params, 20, 20 + M)
    train(other, others, 20, 20 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
def test_a_saved_state_shares_no_memory(name):
    """Neither with the optimizer it came from, nor with those it is loaded into."""
    optimizer, params = started(name, momentum=0.5)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    runs = []
    for _ in range(2):
        others = clones(params)
        other = fresh(name, others, momentum=0.5)
        other.load_state_dict(saved)
        train(other, others, 10, 12)
        runs.append(snapshot(other, others))
    train(optimizer, params, 10, 12)
    assert differences(runs[0], runs[1]) == [] and differences(runs[0], snapshot(optimizer, params)) == []
    for i, entry in kept["state"].items():
        assert all(same(saved["state"][i][key], value) for key, value in entry.items())
    assert saved["param_groups"] == kept["param_groups"]
