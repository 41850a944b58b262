"""Groups stand as in transformers and are counted as in the model: runs and checkpoints of the former order go on.

tests/data/write_grouped_checkpoints.py wrote the checkpoints.
"""

from pathlib import Path

import pytest
import torch

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.engine.parameters import ORDER
from tests.data.write_checkpoints import CONTINUED, SAVED, flat, put, read
from tests.data.write_grouped_checkpoints import CASES, Grouped, given
from tests.optim.helpers import differences, snapshot
from tests.reference import NAMES, names, relative

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_in_model_order"
BOUND = 2e-2  # of an update, relative: state is bf16, and BLAS differs between CPUs


class InModelOrder(Grouped):
    """The groups as they were before."""

    def __init__(self, name, options):
        super().__init__(name, options)
        groups = sorted(hf_efcp.parameter_groups(self.model, weight_decay=0.1), key=lambda group: group.pop(ORDER))
        self.optimizer = hf_efcp.create_optimizer(name, groups, **given(name, options))


def test_the_first_group_decays_and_the_second_does_not():
    groups = Grouped(NAMES[0], {}).optimizer.param_groups
    assert [(g["kind"], g["weight_decay"]) for g in groups] == [
        ("matrix", 0.1),
        ("vector", 0.0),
        ("embedding", 0.1),
        ("head", 0.1),
    ]


@pytest.mark.parametrize("file", CASES)
def test_the_order_changes_no_bit(file):
    """A run, one that goes on from a checkpoint of the former order, and one from a checkpoint of its own."""
    new, old = Grouped(*CASES[file]), InModelOrder(*CASES[file])
    assert old.optimizer.param_groups[0]["kind"] == "embedding"
    for run in (new, old):
        run.train(0, SAVED)
    assert torch.equal(flat(new.params), flat(old.params))
    before, ends = flat(new.params), []
    for saved in (new.optimizer.state_dict(), old.optimizer.state_dict()):
        resumed = Grouped(*CASES[file])
        put(resumed.params, before)
        resumed.optimizer.load_state_dict(saved)
        assert resumed.optimizer.param_groups[0]["kind"] == "matrix"
        resumed.train(SAVED, SAVED + CONTINUED)
        ends.append(flat(resumed.params))
    new.train(SAVED, SAVED + CONTINUED)
    assert all(torch.equal(end, flat(new.params)) for end in ends)


# At the commit that wrote them there were no others.
@pytest.mark.parametrize("file", [file for file, (name, _) in CASES.items() if name in names(windowed=True)])
def test_a_checkpoint_of_the_former_order_goes_on(file):
    saved, run = read(FOLDER / f"{file}.pt.gz"), Grouped(*CASES[file])
    assert [g["kind"] for g in saved["optimizer"]["param_groups"]] == ["embedding", "matrix", "vector", "head"]
    run.optimizer.load_state_dict(saved["optimizer"])
    rates = [(g["kind"], g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups]
    assert rates == [("matrix", 0.1, 0.1), ("vector", 0.1, 0.0), ("embedding", 0.1, 0.1), ("head", 0.1, 0.1)]
    put(run.params, saved["before"])
    run.train(SAVED, SAVED + CONTINUED)
    expected = saved["after"] - saved["before"]
    assert relative(flat(run.params) - saved["before"], expected) <= BOUND
    fresh = Grouped(*CASES[file])
    put(fresh.params, saved["before"])
    fresh.train(SAVED, SAVED + CONTINUED)
    assert relative(flat(fresh.params) - saved["before"], expected) > 3 * BOUND  # a state that is lost would be seen


def without_order(run, file, backwards=False):
    """The run's optimizer with the same groups, which nobody has marked with their order."""
    name, options = CASES[file]
    groups = [{k: v for k, v in group.items() if k != ORDER} for group in hf_efcp.parameter_groups(run.model, weight_decay=0.1)]
    return hf_efcp.create_optimizer(name, groups[::-1] if backwards else groups, **given(name, options))


@pytest.mark.parametrize("file", CASES)
@pytest.mark.parametrize("marked", [True, False], ids=["marked there", "without a mark"])
def test_groups_with_names_may_stand_in_any_order(file, marked):
    """No group says where it stands: what the first parameter holds for all is taken from the one that has it."""
    runs = [Grouped(*CASES[file]) for _ in range(3)]
    if not marked:
        for run in runs[:2]:
            run.optimizer = without_order(run, file)
    runs[2].optimizer = without_order(runs[2], file, backwards=True)
    runs[0].train(0, SAVED)
    saved, before = runs[0].optimizer.state_dict(), flat(runs[0].params)
    for run in runs[1:]:
        put(run.params, before)
        run.optimizer.load_state_dict(saved)
        run.train(SAVED, SAVED + CONTINUED)
    one, other = (flat(run.params) - before for run in runs[1:])
    assert relative(other, one) <= BOUND  # rounding of bf16 is counted by the parameters' numbers
    fresh = Grouped(*CASES[file])
    put(fresh.params, before)
    fresh.train(SAVED, SAVED + CONTINUED)
    assert relative(flat(fresh.params) - before, one) > 3 * BOUND


def test_rates_go_to_the_group_with_the_names():
    run = Grouped(NAMES[0], {})
    run.train(0, 2)
    for i, group in enumerate(run.optimizer.param_groups):
        group["lr"] = 0.1 * (i + 1)
    other = InModelOrder(NAMES[0], {})
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    rates = {g["kind"]: g["lr"] for g in other.optimizer.param_groups}
    assert rates == {g["kind"]: g["lr"] for g in run.optimizer.param_groups}


def test_the_same_parameters_in_other_groups_are_refused():
    run = Grouped(NAMES[0], {})
    run.train(0, 2)
    other = hf_efcp.create_optimizer(NAMES[0], run.model, **hf_efcp.optim_defaults(NAMES[0], lr=0.1, window_size=4))
    before = snapshot(other, run.params)
    with pytest.raises(OptionError, match=r"in other groups, of \[2, 4, 1, 1\] tensors, and this optimizer of \[8\].*embedding"):
        other.load_state_dict(run.optimizer.state_dict())
    assert differences(before, snapshot(other, run.params)) == []
