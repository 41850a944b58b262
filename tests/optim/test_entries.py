"""Entries of `optimizer.state` that are replaced, moved, zeroed, popped, exchanged. torch's AdamW passes the same tests."""

import gc
import weakref

import pytest
import torch

from hf_efcp.options import OptionError
from tests.optim.entry_runs import ADAMW, KINDS, OPTIONS, WHICH, WITH_CONTROL, exchange, exchange_values, start
from tests.optim.helpers import EVERY, M, count, differences, fresh, gradients_at, same, snapshot, train
from tests.reference import NAMES, compressed_names, info, parameters, window


@pytest.mark.parametrize("which", [w if w in ("the first", "all") else pytest.param(w, marks=pytest.mark.slow) for w in WHICH])
@pytest.mark.parametrize("kind", KINDS)
@WITH_CONTROL
def test_what_is_put_into_the_state_is_the_state(name, kind, which):
    (optimizer, params), (twin, others) = start(name), start(name)
    done, expected = KINDS[kind]
    done(optimizer.state, [params[i] for i in WHICH[which]])
    expected(twin.state, [others[i] for i in WHICH[which]])
    if name != ADAMW or kind not in ("popped", "emptied"):  # it writes no empty entries
        saved, there = optimizer.state_dict()["state"], twin.state_dict()["state"]
        assert saved.keys() == there.keys()
        for i, entry in saved.items():
            assert entry.keys() == there[i].keys()
            # K is formed anew when the entries are back in their stacks.
            assert all(same(t, there[i][k]) for k, t in entry.items() if k != "gram" or kind != "halved"), i
    if kind == "emptied" and name == ADAMW:
        return  # "if len(state) == 0" is what it goes by
    train(optimizer, params, 10, 10 + M)
    train(twin, others, 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@WITH_CONTROL
def test_entries_that_are_exchanged(name):
    (optimizer, params), (twin, others) = start(name), start(name)
    exchange(optimizer.state, params[1:3])
    exchange_values(twin.state, others[1:3])
    for one, those in ((optimizer, params), (twin, others)):
        train(one, those, 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@WITH_CONTROL
def test_a_cleared_state_is_that_of_a_new_optimizer(name):
    optimizer, params = start(name)
    optimizer.state.clear()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    new = torch.optim.AdamW(others, lr=0.01) if name == ADAMW else fresh(name, others, **OPTIONS)
    train(optimizer, params, 10, 10 + M)
    train(new, others, 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(new, others)) == []


@EVERY
def test_zero_gradients_on_a_cleared_state_only_allocate(name):
    optimizer, params = start(name)
    optimizer.state.clear()
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(same(p, b) for p, b in zip(params, before, strict=True))
    assert not any(t.any() for entry in optimizer.state.values() for t in entry.values())


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("kind", ["zeros", "zeroed", "halved", "popped"])
@pytest.mark.parametrize("name", [n for n in NAMES if info(n).windowed])
def test_the_gram_matrix_is_that_of_the_entries(name, kind, scope):
    optimizer, params = start(name, metric="none", scope=scope)
    KINDS[kind][0](optimizer.state, params[1:2])
    optimizer.setup()
    if scope == "model":
        g = window(optimizer, params)
        torch.testing.assert_close(optimizer.state[params[0]]["gram"], g @ g.T, rtol=1e-5, atol=1e-7)
    else:
        g = window(optimizer, params[1:2])
        torch.testing.assert_close(optimizer.state[params[1]]["gram"], g @ g.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["zeros", "zeroed", "popped", "emptied"])
@WITH_CONTROL
def test_entries_of_other_parameters_stay(name, kind):
    """Also where it is the first parameter, which holds the number of steps and K for all."""
    optimizer, params = start(name)
    others = [p for p in params if p is not params[0]]
    before = [{k: t.clone() for k, t in optimizer.state[p].items()} for p in others]
    steps = None if name == ADAMW else count(optimizer)
    KINDS[kind][0](optimizer.state, params[:1])
    optimizer.state_dict()
    assert name == ADAMW or count(optimizer) == steps > 0
    for p, entry in zip(others, before, strict=True):
        assert entry.keys() == optimizer.state[p].keys() and all(same(t, optimizer.state[p][k]) for k, t in entry.items())


@EVERY
def test_entries_stay_where_the_group_of_the_first_parameter_goes(name):
    params = parameters(dtype=torch.float32)
    optimizer = fresh(name, [{"params": params[:1]}, {"params": params[1:]}], **OPTIONS)
    train(optimizer, params, 0, M + 2)
    before = [{k: t.clone() for k, t in optimizer.state[p].items()} for p in params[1:]]
    del optimizer.param_groups[0]
    optimizer.setup()
    assert count(optimizer) == M + 2 and set(optimizer.state) == set(params[1:])
    for p, entry in zip(params[1:], before, strict=True):
        assert all(same(t, optimizer.state[p][k]) for k, t in entry.items())


@EVERY
def test_the_number_of_steps_outlives_a_state_that_is_elsewhere(name):
    """Its memory is gone when the first parameter's entries are popped, and it is saved before the next step."""
    optimizer, params = start(name)
    KINDS["replaced by copies"][0](optimizer.state, params)
    gc.collect()
    optimizer.state.pop(params[0])
    saved = optimizer.state_dict()
    other, others = start(name, 0)
    other.load_state_dict(saved)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    assert count(other) == M + 2
    for one, those in ((optimizer, params), (other, others)):
        train(one, those, 10, 12)
    assert count(optimizer) == M + 4
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


# What cannot be an entry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[None], r"has to be \("),
        (lambda t: t.bool(), "has to be .* torch"),
        (lambda t: None, "is of type NoneType, not a tensor"),
        (lambda t: 3, "is of type int, not a tensor"),
    ],
    ids=["shape", "dtype", "none", "number"],
)
@pytest.mark.parametrize("by", ["step", "state_dict"])
@EVERY
def test_what_cannot_be_an_entry_is_refused_in_one_line(name, by, change, problem):
    optimizer, params = start(name)
    entry = optimizer.state[params[1]]
    key = next(iter(entry))
    held, before = entry[key], [p.detach().clone() for p in params]
    entry[key] = change(held)
    with pytest.raises(OptionError, match=rf"optimizer\.state of parameter 1: {key} .*{problem}") as error:
        getattr(optimizer, by)()
    assert "\n" not in str(error.value)
    assert all(same(p, b) for p, b in zip(params, before, strict=True))
    entry[key] = held
    gradients_at(20, params)
    optimizer.step()


# Memory -----------------------------------------------------------------------------------------------------------------------


def storages(state):
    return [weakref.ref(t.untyped_storage()) for entry in state.values() for t in entry.values() if t.numel() > 1]


@WITH_CONTROL
def test_memory_is_free_while_the_state_is_elsewhere(name):
    """As frameworks do between phases: {name: tensor on the GPU} becomes {name: tensor on the CPU}."""
    (optimizer, params), (twin, others) = start(name), start(name)
    there = storages(optimizer.state)
    KINDS["replaced by copies"][0](optimizer.state, params)
    gc.collect()
    assert there and not any(s() is not None for s in there)
    kept = storages(optimizer.state)
    if name != ADAMW:
        assert optimizer.memory_footprint() == twin.memory_footprint()
    optimizer.state_dict()
    assert all(s() is not None for s in kept), "the state stays where it is when it is read"
    train(optimizer, params, 10, 12)
    train(twin, others, 10, 12)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []
    if name != ADAMW:
        gc.collect()
        assert not any(s() is not None for s in kept)


@EVERY
def test_to_leaves_the_state_where_it_is(name):
    optimizer, params = start(name)
    before = snapshot(optimizer, params)
    assert optimizer.to("cpu") is optimizer
    assert differences(before, snapshot(optimizer, params)) == []


@EVERY
def test_to_another_device_frees_the_memory(name):
    """The meta device stands for another one: what is moved there is lost, and the next step says so or takes zeros' place."""
    optimizer, _params = start(name)
    there = storages(optimizer.state)
    optimizer.to("meta")
    gc.collect()
    assert not any(s() is not None for s in there)
    assert {t.device.type for entry in optimizer.state.values() for t in entry.values()} == {"meta"}


@pytest.mark.parametrize("name", compressed_names())
def test_a_deleted_optimizer_is_freed_at_once(name):
    gc.disable()
    try:
        optimizer, _params = start(name)
        there = storages(optimizer.state)
        del optimizer
        assert not any(s() is not None for s in there)
    finally:
        gc.enable()
