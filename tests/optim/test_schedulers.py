"""Learning-rate schedulers: they work on each group, and resume with the optimizer."""

import copy
import math

import pytest
import torch

from hf_efcp import OptionError
from tests.optim.helpers import (
    EVERY,
    WINDOWED,
    M,
    clones,
    differences,
    fresh,
    gradients_at,
    same,
    shared,
    snapshot,
    started,
    through_a_file,
    train,
)
from tests.reference import parameters, row

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda t: 0.5**t, lambda t: 1 / (1 + t)]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.0001, total_iters=4),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def scheduled(name, kind, params):
    groups = [{"params": params[:3], "lr": 0.1, "weight_decay": 0.1}, {"params": params[3:], "lr": 0.02}]
    optimizer = fresh(name, groups)
    return optimizer, SCHEDULERS[kind](optimizer)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_schedulers_work_and_resume(name, kind):
    params = parameters(dtype=torch.float32)
    optimizer, scheduler = scheduled(name, kind, params)
    rates, steps, point = [], 9, 5
    for t in range(steps):
        if t == point:
            others = clones(params)
            other, again = scheduled(name, kind, others)
            other.load_state_dict(through_a_file(optimizer.state_dict()))
            again.load_state_dict(through_a_file(scheduler.state_dict()))
        rates.append([g["lr"] for g in optimizer.param_groups])
        train(optimizer, params, t, t + 1)
        scheduler.step()
    assert len({r for r, _ in rates}) > 1, "the schedule must do something"
    for t in range(point, steps):
        assert [g["lr"] for g in other.param_groups] == rates[t]
        train(other, others, t, t + 1)
        again.step()
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@WINDOWED
def test_a_schedule_acts_on_each_group_alone(name):
    """Two lambdas: a group whose lr is 0 stands still while the other moves; the window does not notice."""
    params, plain = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer = fresh(name, [{"params": params[:3]}, {"params": params[3:]}])
    reference = fresh(name, [{"params": plain[:3]}, {"params": plain[3:]}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: float(t % 2), lambda t: 1.0])
    for t in range(M + 2):
        gradients_at(t, params, pull=0.0)
        gradients_at(t, plain, pull=0.0)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        reference.step()
        scheduler.step()
        moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert moved == [t % 2 == 1] * 3 + [True] * (len(params) - 3)
    assert all(
        torch.equal(row(optimizer, p, i), row(reference, q, i)) for p, q in zip(params, plain, strict=True) for i in range(M)
    )
    assert same(shared(optimizer, "gram"), shared(reference, "gram"))


def test_a_trained_scale_survives_a_plateau_scheduler():
    optimizer, params = started("efcp_lowrank_ggt")
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for t in range(4):
        train(optimizer, params, 10 + t, 11 + t)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.01 and math.isfinite(optimizer.diagnostics()["update_norm"])


@EVERY
def test_a_schedule_that_would_vary_the_momentum_is_told_what_to_pass(name):
    """AdamW, the control, has betas."""
    schedules = [
        lambda o, **more: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, **more),
        lambda o, **more: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, **more),
    ]
    for schedule in schedules:
        schedule(torch.optim.AdamW(parameters(dtype=torch.float32)))
        for optimizer in (fresh(name, parameters(dtype=torch.float32)), copy.deepcopy(fresh(name, parameters()))):
            with pytest.raises(OptionError, match="pass cycle_momentum=False"):
                schedule(optimizer)
            schedule(optimizer, cycle_momentum=False)
            assert "lr" in optimizer.defaults and "betas" not in optimizer.defaults
