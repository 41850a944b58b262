"""Bad groups and gradients in the middle of a run: one clear error, or a step that is skipped with a warning; nothing changes."""

import pytest
import torch

from tests.optim.bad_inputs import ANY, Bad, one, table
from tests.optim.helpers import count, differences, gradients_at, snapshot, started, train
from tests.reference import NAMES

# Groups added mid-run ----------------------------------------------------------------------------------------------------

ADDED = [
    Bad("complex", lambda: {"params": [one(dtype=torch.complex64)]}, "complex64"),
    Bad("an option", lambda: {"params": [one()], "rank": 2}, "rank is an option of the whole optimizer"),
    Bad("a bad lr", lambda: {"params": [one()], "lr": "x"}, "lr='x': expected a number"),
    Bad("a typo", lambda: {"params": [one()], "weigt_decay": 0}, "did you mean 'weight_decay'"),
    Bad("no leaf", lambda: {"params": [one() * 2]}, "non-leaf", ValueError),
    Bad("a set", lambda: {"params": {one()}}, "set", TypeError),
    Bad("no dict", lambda: 3, "dict", TypeError),
]


@table(ADDED)
def test_a_refused_group_changes_nothing(bad):
    optimizer, params = started(ANY)
    before = snapshot(optimizer, params)
    with pytest.raises(bad.error, match=bad.message):
        optimizer.add_param_group(bad.give())
    assert differences(before, snapshot(optimizer, params)) == [] and len(optimizer.param_groups) == 1
    twin, others = started(ANY)
    train(optimizer, params, 10, 12)
    train(twin, others, 10, 12)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


# Gradients: the step is skipped, with a warning --------------------------------------------------------------------------


def fill(value):
    return lambda p: p.grad.fill_(value)


GRADIENTS = [
    Bad("nan", fill(float("nan")), "gradient is not finite.*step skipped.*1 skipped", RuntimeWarning),
    Bad("inf", fill(float("inf")), "gradient is not finite.*step skipped", RuntimeWarning),
    Bad("one nan", lambda p: p.grad.view(-1)[5:6].fill_(float("nan")), "gradient is not finite", RuntimeWarning),
    Bad("one -inf", lambda p: p.grad.view(-1)[-1:].fill_(float("-inf")), "gradient is not finite", RuntimeWarning),
    Bad("square beyond fp64", fill(1e200), "out of range", RuntimeWarning),
    Bad(
        "sparse nan",
        lambda p: setattr(p, "grad", torch.full_like(p, float("nan")).to_sparse()),
        "gradient is not finite",
        RuntimeWarning,
    ),
]


@pytest.mark.parametrize("name", NAMES)
@table(GRADIENTS)
def test_a_bad_gradient_is_skipped_with_a_warning(bad, name):
    optimizer, params = started(name, dtype=torch.float64)
    before = snapshot(optimizer, params, without=["skipped"])
    gradients_at(10, params)
    bad.give(params[1])
    with pytest.warns(bad.error, match=bad.message) as caught:
        optimizer.step()
    assert [w for w in caught if w.category is RuntimeWarning and len(str(w.message).splitlines()) == 1]
    assert differences(before, snapshot(optimizer, params, without=["skipped"])) == [] and count(optimizer, "skipped") == 1
