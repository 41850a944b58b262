"""A load that is refused leaves everything as it was; a pickle of the first 0.1 is still read."""

import pickle

import pytest
import torch

from hf_efcp import OptionError
from tests.optim.helpers import differences, fresh, snapshot, started, train
from tests.reference import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_load_with_state_for_a_frozen_parameter_changes_nothing(name):
    """The checkpoint has state of the first parameter, which this run never trained; another entry is damaged."""
    saved = started(name)[0].state_dict()
    _, params = started(name)
    params[0].requires_grad_(False)
    optimizer = fresh(name, params)
    train(optimizer, [p for p in params if p.requires_grad], 0, 6)
    before = snapshot(optimizer, params)
    entry = saved["state"][2]
    key = next((k for k in entry if k.startswith(("window", "exp_avg"))), "error")
    entry[key] = entry[key][..., :-1]
    with pytest.raises(OptionError, match="parameter 2"):
        optimizer.load_state_dict(saved)
    assert differences(before, snapshot(optimizer, params)) == []
    others = [p for p in params if p.requires_grad]
    train(optimizer, others, 6, 8)  # goes on
    assert int(next(e["step"] for e in optimizer.state.values() if "step" in e)) == 8


class Old:
    """What the first 0.1 put into a pickle."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __reduce__(self):
        state = self.optimizer.__getstate__()
        options, asked, _ = state.pop("made")
        old = {**state, "options": options, "_free": asked.budgeted, "_chosen": asked.chosen, "owners": None}
        return type(self.optimizer).__new__, (type(self.optimizer),), old


def test_a_pickle_of_the_first_0_1_goes_on():
    optimizer, params = started("efcp_lowrank_mfac")
    other, others = pickle.loads(pickle.dumps((Old(optimizer), params)))
    train(optimizer, params, 6, 9)
    train(other, others, 6, 9)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert other.options == optimizer.options
