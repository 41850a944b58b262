"""What others keep in `optimizer.state`, hooks, and groups as torch has them. torch's AdamW passes the same tests."""

import copy
import pickle

import pytest
import torch

from hf_efcp.options import OptionError
from tests.optim.entry_runs import ADAMW, OPTIONS, WITH_CONTROL, start
from tests.optim.helpers import EVERY, M, bits, fresh, gradients_at, same, through_a_file, train
from tests.reference import info, parameters

# What is not ours -------------------------------------------------------------------------------------------------------------


def put_foreign(optimizer, params):
    for i, p in enumerate(params):
        optimizer.state[p] |= {"slow": p.detach().clone().double(), "k": i, "of": {"x": torch.ones(2), "n": (1, 2.5)}}
    optimizer.state["wrapper"] = {"s": torch.arange(3), "step": 7, params[0]: torch.ones(2)}
    optimizer.state["number"] = 3


def assert_foreign(state, params, key=lambda p: p, dtype=torch.float64):
    for i, p in enumerate(params):
        entry = state[key(p)]
        assert entry["slow"].dtype == dtype and entry["slow"].shape == p.shape and entry["k"] == i
        assert torch.equal(entry["of"]["x"], torch.ones(2)) and entry["of"]["n"] == (1, 2.5)
    assert torch.equal(state["wrapper"]["s"], torch.arange(3)) and state["wrapper"]["step"] == 7 and state["number"] == 3


@pytest.mark.parametrize("steps", [0, M + 2])
@WITH_CONTROL
def test_what_wrappers_keep_in_the_state_stays(name, steps):
    (optimizer, params), (twin, others) = start(name, steps), start(name, steps)
    if name == ADAMW and not steps:
        return  # it makes no state where a wrapper has put something
    put_foreign(optimizer, params)
    held = {p: optimizer.state[p] for p in params}
    inside = {p: optimizer.state[p]["slow"] for p in params}
    train(optimizer, params, 10, 12)
    train(twin, others, 10, 12)
    assert_foreign(optimizer.state, params)
    assert all(optimizer.state[p] is held[p] and held[p]["slow"] is inside[p] for p in params)
    number = {p: i for i, p in enumerate(params)}
    saved = optimizer.state_dict()
    assert_foreign(saved["state"], params, number.get)
    restored = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = torch.optim.AdamW(restored, lr=0.01) if name == ADAMW else fresh(name, restored, **OPTIONS)
    other.load_state_dict(copy.deepcopy(saved))  # torch keeps the tensors that it is given
    assert_foreign(other.state, restored, dtype=torch.float32 if name == ADAMW else torch.float64)  # torch casts
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        copied, those = clone((optimizer, params))
        assert_foreign(copied.state, those)
        train(copied, those, 12, 13)
        assert_foreign(copied.state, those)
    for one, those in ((optimizer, params), (other, restored), (twin, others)):
        train(one, those, 12, 14)
    assert all(same(p, q) and same(p, r) for p, q, r in zip(params, others, restored, strict=True))


@EVERY
def test_names_of_our_kinds_are_refused_where_they_do_not_belong(name):
    optimizer, _params = start(name, momentum=0.0)
    saved = optimizer.state_dict()
    saved["state"][1]["momentum"] = torch.zeros(12, 30)
    with pytest.raises(OptionError, match=r"parameter 1.*unexpected: momentum"):
        start(name, 0, momentum=0.0)[0].load_state_dict(saved)


# Of all our kinds; momentum is off, and only the first parameter has the three in the middle.
OUR_NAMES = ["momentum", "step", "gram", "counter", "window_of_a_wrapper", "exp_avg"]


def put_our_names(optimizer, params):
    put, specs = {}, copy.deepcopy(optimizer).setup().specs.values()
    for p, own in zip(params[1:], list(specs)[1:], strict=True):
        put[p] = {name: torch.full((2,), 7.0) for name in OUR_NAMES if name not in own}
        put[p]["residual_scale"] = 3
        optimizer.state[p] |= put[p]
    return put


@pytest.mark.parametrize("steps", [0, M + 2])
@EVERY
def test_names_that_are_ours_elsewhere_are_a_wrappers_where_it_has_given_them(name, steps):
    (optimizer, params), (twin, others) = (start(name, steps, momentum=0.0) for _ in range(2))
    put = put_our_names(optimizer, params)

    def kept(one, those):
        return all(
            type(one.state[q][k]) is type(t) for p, q in zip(params[1:], those[1:], strict=True) for k, t in put[p].items()
        )

    train(optimizer, params, 10, 12)
    train(twin, others, 10, 12)
    saved = through_a_file(optimizer.state_dict())
    other, those = start(name, 0, momentum=0.0)
    other.load_state_dict(saved)
    for p, q in zip(those, params, strict=True):
        p.data.copy_(q)
    copied, theirs = copy.deepcopy((optimizer, params))
    again, last = pickle.loads(pickle.dumps((copied, theirs)))  # a copy of a copy that took no step
    moved = optimizer.state[params[1]]
    moved |= {k: t.clone() for k, t in moved.items() if isinstance(t, torch.Tensor)}
    for one, its in ((optimizer, params), (twin, others), (other, those), (copied, theirs), (again, last)):
        train(one, its, 12, 14)
        assert one is twin or kept(one, its)
        assert all(same(p, q) for p, q in zip(params, its, strict=True)) if one is not optimizer else True
    with pytest.raises(OptionError, match=r"parameter 1: .* has to be" if steps else "parameter 1"):
        key = next(iter(twin.state[others[1]]))
        optimizer.state[params[1]][key] = torch.ones(2, 2, 2)  # a name that is ours there
        optimizer.state_dict()


@EVERY
def test_a_frozen_parameter_that_only_a_wrapper_knows_takes_no_memory(name):
    params = parameters(dtype=torch.float32)
    params[1].requires_grad_(False)
    optimizer = fresh(name, params)
    optimizer.state[params[1]]["slow"] = torch.ones(2)
    _ = optimizer.state[params[2]], [p.grad for p in params]
    gradients_at(0, params)
    params[1].grad = None
    optimizer.step()
    assert list(optimizer.state[params[1]]) == ["slow"]


# Hooks ------------------------------------------------------------------------------------------------------------------------


@WITH_CONTROL
def test_hooks_of_state_dict_see_the_whole_of_it(name):
    optimizer, params = start(name)
    seen = []

    def before(one):
        for t in one.state[params[1]].values():
            t.zero_()

    def rename(one, saved):
        seen.append(dict(saved))
        return {"other": {f"p{i}": entry for i, entry in saved["state"].items()}, **saved}

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(lambda one, saved: saved["param_groups"][0].update(mark=1))
    optimizer.register_state_dict_post_hook(rename)
    saved = optimizer.state_dict()
    assert next(iter(saved)) == "other" and saved["param_groups"][0]["mark"] == 1
    assert not any(t.any() for t in saved["other"]["p1"].values())
    assert name == ADAMW or seen[0]["efcp"]["class"] == info(name).cls.__name__
    assert all(bits(t).data_ptr() != bits(optimizer.state[params[0]][k]).data_ptr() for k, t in seen[0]["state"][0].items()) or (
        name == ADAMW
    )
    optimizer._optimizer_state_dict_post_hooks.clear()
    assert next(iter(optimizer.state_dict())) == "state"


@WITH_CONTROL
def test_hooks_before_loading_see_the_whole_of_it(name):
    optimizer, params = start(name)
    saved = through_a_file(optimizer.state_dict())
    saved["renamed"] = saved.pop("state")
    other, _ = start(name, 0)
    seen = []

    def back(one, there):
        seen.append(set(there))
        return {"state": there["renamed"], **{k: v for k, v in there.items() if k != "renamed"}}

    other.register_load_state_dict_pre_hook(back)
    other.load_state_dict(saved)
    assert seen == [{"renamed", "param_groups"} | ({"efcp"} if name != ADAMW else set())]
    assert len(other.state) == len(params) and "renamed" in saved


# Groups and warnings ----------------------------------------------------------------------------------------------------------


@WITH_CONTROL
def test_lr_may_be_given_in_the_groups_only(name):
    cls = torch.optim.AdamW if name == ADAMW else info(name).cls
    a, b = parameters([(12, 30), (7,)], torch.float32)
    optimizer = cls([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    train(optimizer, [a, b], 0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    if name != ADAMW:
        with pytest.raises(OptionError, match=r"lr: .*its parameter group 1"):
            cls([{"params": [a], "lr": 0.1}, {"params": [b]}])
        with pytest.raises(OptionError, match=r"lr: .*its parameter group 2"):
            optimizer.add_param_group({"params": parameters([(3, 3)], torch.float32)})
        assert len(optimizer.param_groups) == 2


@EVERY
def test_a_parameter_that_is_given_twice_is_warned_of_at_the_callers_line(name):
    (p,) = parameters([(12, 30)], torch.float32)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters") as caught:
        optimizer = info(name).cls([p, p], lr=0.1)
    assert [w.filename for w in caught] == [__file__] and optimizer.param_groups[0]["params"] == [p]
