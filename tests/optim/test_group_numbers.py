"""Numbers of groups that are changed after the optimizer was made, and state that no machine has room for."""

import math

import pytest
import torch

from hf_efcp.options import OptionError
from tests.optim.helpers import EVERY, WINDOWED, differences, gradients_at, snapshot, started
from tests.reference import make, parameters


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@EVERY
def test_a_number_that_would_destroy_the_parameters_is_refused(name, key):
    optimizer, params = started(name, steps=2)
    optimizer.add_param_group({"params": parameters(((5, 4),), torch.float32, seed=9)})
    gradients_at(2, params)
    optimizer.step()
    before = snapshot(optimizer, params)
    for bad in (math.nan, math.inf, -1.0, -1e-6, torch.tensor(math.nan)):
        value, optimizer.param_groups[1][key] = optimizer.param_groups[1][key], bad
        with pytest.raises(OptionError, match=rf"{key}=\S+ in parameter group 1: expected a finite number >= 0"):
            optimizer.step()
        optimizer.param_groups[1][key] = value
        assert not differences(snapshot(optimizer, params), before)


def test_a_schedule_may_end_a_rounding_error_below_zero():
    optimizer, params = started("efcp_lowrank_mfac", steps=1)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = -1e-18
    gradients_at(1, params)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@WINDOWED
def test_a_window_that_no_machine_has_room_for(name):
    params = parameters(((64, 64),), torch.float32)
    optimizer = make(name, params, window_size=10**9)
    gradients_at(0, params)
    with pytest.raises(OptionError, match=r"window_size=1000000000.*: the state would take \S+ GiB, and cpu has \S+ GiB in all"):
        optimizer.step()


@WINDOWED
def test_frozen_parameters_have_no_part_in_the_size_of_an_update(name):
    """update_rms is a root mean square over what is trained."""
    moved = []
    for frozen in (False, True):
        params = parameters(((12, 30), (7,)), torch.float32)
        more = parameters(((100, 100),), torch.float32)[0].requires_grad_(False)
        before = [p.detach().clone() for p in params]
        optimizer = make(name, [*params, more] if frozen else params, lr=1.0, update_rms=0.1, window_size=2)
        gradients_at(0, params)
        optimizer.step()
        moved.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(params, before, strict=True)]))
    assert torch.equal(*moved)
    assert math.isclose(moved[0].square().mean().sqrt(), 0.1, rel_tol=1e-2)
