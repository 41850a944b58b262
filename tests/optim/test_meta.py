"""An optimizer of parameters without numbers: it is made, says what it would take, and says what to do where it cannot go on."""

import copy

import pytest
import torch
from torch import nn

from hf_efcp import OptionError
from tests.optim.helpers import assert_unchanged, snapshot, started
from tests.reference import NAMES, make

BY_NAME = pytest.mark.parametrize("name", NAMES)
MESSAGE = r"made of parameters on the meta device, \(3, 4\) for one.*its weights, then make the optimizer"


def on_meta(name):
    with torch.device("meta"):
        return make(name, nn.Linear(4, 3).parameters(), window_size=2)


@pytest.mark.parametrize("use", ["step", "memory_footprint", "setup", "diagnosed"])
@BY_NAME
def test_what_needs_numbers_says_what_to_do(name, use):
    optimizer = on_meta(name)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    if use == "diagnosed":
        assert optimizer.diagnostics() == {} and sum(optimizer.estimate_footprint().values()) > 0
    else:
        with pytest.raises(OptionError, match=MESSAGE):
            getattr(optimizer, use)()
    assert copy.deepcopy(optimizer).state_dict()["state"] == {}


@BY_NAME
def test_a_step_without_gradients_says_it_too(name):
    with pytest.raises(OptionError, match=MESSAGE):
        on_meta(name).step()


@BY_NAME
def test_a_checkpoint_is_refused(name):
    shapes = [(3, 4), (3,)]
    saved, _ = started(name, shapes=shapes)
    optimizer = make(name, [nn.Parameter(torch.ones(s, device="meta")) for s in shapes], window_size=4)
    with pytest.raises(OptionError, match=MESSAGE):
        optimizer.load_state_dict(saved.state_dict())


@BY_NAME
def test_some_on_meta(name):
    optimizer = make(name, [nn.Parameter(torch.ones(3, 4, device=device)) for device in ("cpu", "meta")], window_size=2)
    with pytest.raises(OptionError, match=MESSAGE):
        optimizer.step()


@BY_NAME
def test_a_step_in_inference_mode_says_where_it_belongs(name):
    optimizer, params = started(name)
    before = snapshot(optimizer, params)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\): call it outside"):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


@BY_NAME
def test_made_anew_it_trains(name):
    """What the message says to do."""
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    model.to_empty(device="cpu").load_state_dict(nn.Linear(4, 3).state_dict())
    optimizer = make(name, model.parameters(), lr=0.1, window_size=2)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(("key", "value"), [("lr", None), ("lr", [0.1]), ("weight_decay", "x"), ("weight_decay", None)])
@BY_NAME
def test_a_group_that_was_changed_to_no_number(name, key, value):
    optimizer, params = started(name)
    optimizer.param_groups[0][key] = value
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=rf"{key}=.* in a parameter group: expected a number"):
        optimizer.step()
