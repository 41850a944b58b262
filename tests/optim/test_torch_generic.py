"""What torch's own generic tests ask of an optimizer, by its `OptimizerInfo`s: AdamW's from torch, one for each of our names.

What we refuse by choice is in `REFUSED`, and with reasons in docs/using.md ("With plain torch").
"""

import copy
import functools
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from hf_efcp.options import OptionError
from tests.optim.helpers import same, through_a_file
from tests.reference import NAMES, info, known_to, lossy_options

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

CPU = torch.device("cpu")
# Keyword arguments of torch's optimizers that we refuse.
REFUSED = ("maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad")
# Where the error is the same and its sentence our own.
OWN_WORDS = {"Tensor lr must be 1-element": r"lr=tensor\(\[.*expected"}


def inputs(name, device, dtype=None):
    options = {"lr": 0.01, "window_size": 4, "update_rms": 1.0, **lossy_options(name)}
    changes = {"default": {}, "nonzero weight_decay": {"weight_decay": 0.1}, "momentum": {"momentum": 0.5}}
    changes |= {"metric": {"metric": "factored"}, "Tensor lr": {"lr": torch.tensor(0.01)}, "beta1": {"beta1": 0.5}}
    return [
        OptimizerInput(params=None, kwargs=known_to(name, {**options, **change}), desc=desc)
        for desc, change in changes.items()
        if known_to(name, change) == change
    ]


OURS = [
    OptimizerInfo(
        info(name).cls,
        optim_inputs_func=functools.partial(inputs, name),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
        supported_impls=(),
        supports_complex=False,
    )
    for name in NAMES
]
CONTROL = [one for one in optim_db if one.optim_cls is torch.optim.AdamW]
EVERY_INFO = pytest.mark.parametrize("one", [*OURS, *CONTROL], ids=lambda one: one.name)
OURS_ONLY = pytest.mark.parametrize("one", OURS, ids=lambda one: one.name)


def problem(seed=0):
    """A weight and a bias, and their loss."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = Parameter(torch.randn(10, 5, generator=generator)), Parameter(torch.randn(10, generator=generator))
    x = torch.randn(5, generator=generator)
    return [weight, bias], lambda: (weight.mv(x) + bias).pow(2).sum()


def run(optimizer, loss, steps):
    losses = []
    for _ in range(steps):
        losses.append(optimizer.step(functools.partial(closed, optimizer, loss)).item())
    return losses


def closed(optimizer, loss):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    return value


def each_input(one):
    for given in one.optim_inputs_func(device=CPU):
        yield given.desc, dict(given.kwargs)


@EVERY_INFO
def test_error_inputs(one):
    for error in one.optim_error_inputs_func(CPU, torch.float32):
        given = error.optimizer_error_input
        params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        kwargs = {} if one in CONTROL else {"lr": 0.01}
        words = error.error_regex if one in CONTROL else OWN_WORDS.get(error.error_regex, error.error_regex)
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=words):
                one.optim_cls(params, **{**kwargs, **given.kwargs})
        else:
            with pytest.raises(error.error_type, match=words):
                one.optim_cls(params, **{**kwargs, **given.kwargs})


@EVERY_INFO
def test_the_loss_goes_down_with_and_without_schedulers(one):
    for desc, kwargs in each_input(one):
        for schedulers in ([], *one.scheduler_inputs):
            params, loss = problem()
            optimizer = one.optim_cls(params, **kwargs)
            made = [scheduler(optimizer) for scheduler in schedulers]
            start = loss().item()
            for _ in range(20):
                value = closed(optimizer, loss)
                optimizer.step()
                for scheduler in made:
                    takes = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(value) if takes else scheduler.step()
            assert (loss().item() > start) == bool(kwargs.get("maximize")), desc


@EVERY_INFO
def test_parameter_groups_have_their_own_values(one):
    for desc, kwargs in each_input(one):
        params, loss = problem()
        optimizer = one.optim_cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.0, "weight_decay": 0.0}], **kwargs)
        before = [p.detach().clone() for p in params]
        run(optimizer, loss, 3)
        assert not same(params[0], before[0]) and same(params[1], before[1]), desc


@EVERY_INFO
def test_names_are_kept_and_do_not_matter_to_loading(one):
    _, kwargs = next(each_input(one))
    runs = {}
    for named in (False, True):
        params, loss = problem()
        optimizer = one.optim_cls(list(zip("ab", params, strict=True)) if named else params, **kwargs)
        run(optimizer, loss, 3)
        runs[named] = optimizer, params
        assert optimizer.param_groups[0].get("param_names") == (["a", "b"] if named else None)
    for there, here in ((False, True), (True, False)):
        runs[here][0].load_state_dict(runs[there][0].state_dict())
    assert all(same(p, q) for p, q in zip(runs[False][1], runs[True][1], strict=True))


@EVERY_INFO
def test_steps_without_gradients_or_with_zeros_move_nothing(one):
    for desc, kwargs in each_input(one):
        for zeros in (False, True):
            params, _ = problem()
            optimizer = one.optim_cls(params, **{**kwargs, "weight_decay": 0.0})
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.zeros_like(p) if zeros else None
            optimizer.step()
            assert all(same(p, b) for p, b in zip(params, before, strict=True)), (desc, zeros)


@EVERY_INFO
def test_gradients_are_only_read(one):
    for desc, kwargs in each_input(one):
        params, loss = problem()
        optimizer = one.optim_cls(params, **kwargs)
        closed(optimizer, loss)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        assert all(p.grad is g and same(g, c) and g._version == v for p, (g, c, v) in zip(params, before, strict=True)), desc


@pytest.mark.parametrize("weights_only", [True, False])
@EVERY_INFO
def test_saved_and_loaded_it_goes_on_identically(one, weights_only, tmp_path):
    for desc, kwargs in each_input(one):
        params, loss = problem()
        optimizer = one.optim_cls(params, **kwargs)
        run(optimizer, loss, 3)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        others, other_loss = problem()
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q)
        other = one.optim_cls(others, **kwargs)
        other.load_state_dict(torch.load(Path(tmp_path, "optimizer.pt"), weights_only=weights_only))
        run(optimizer, loss, 3)
        run(other, other_loss, 3)
        assert all(same(p, q) for p, q in zip(params, others, strict=True)), desc


@EVERY_INFO
def test_state_dicts_are_deterministic_and_copies_are_whole(one):
    _, kwargs = next(each_input(one))
    params, loss = problem()
    optimizer = one.optim_cls(params, **kwargs)
    run(optimizer, loss, 3)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert first.keys() == second.keys() and first["param_groups"] == second["param_groups"]
    assert all(same(t, second["state"][i][k]) for i, entry in first["state"].items() for k, t in entry.items())
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert public == {name for name in vars(clone) if not name.startswith("_")}
        assert optimizer.defaults.items() <= clone.defaults.items() and len(clone.state) == len(optimizer.state)
        assert clone.param_groups[0]["params"][0] is not params[0]


@EVERY_INFO
def test_hooks_run_in_their_order(one):
    _, kwargs = next(each_input(one))
    params, loss = problem()
    optimizer, calls = one.optim_cls(params, **kwargs), []
    optimizer.register_step_pre_hook(lambda o, args, kw: calls.append("before step"))
    optimizer.register_step_post_hook(lambda o, args, kw: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: calls.append("second after saving"))
    handle = optimizer.register_state_dict_post_hook(lambda o, saved: calls.append("first after saving"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after loading"))
    run(optimizer, loss, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    saving = ["before saving", "first after saving", "second after saving"]
    assert calls == ["before step", "after step", *saving, "before loading", "after loading"]
    handle.remove()
    calls.clear()
    optimizer.state_dict()
    assert calls == [saving[0], saving[2]]


@EVERY_INFO
def test_a_checkpoint_is_loaded_from_a_file_with_plain_types(one):
    _, kwargs = next(each_input(one))
    params, loss = problem()
    optimizer = one.optim_cls(params, **kwargs)
    run(optimizer, loss, 2)
    saved = through_a_file(optimizer.state_dict())
    assert {type(k) for k in saved["state"]} == {int}


# Refused by choice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REFUSED)
@OURS_ONLY
def test_keyword_arguments_of_torch_that_are_refused(one, key):
    with pytest.raises(OptionError, match=key):
        one.optim_cls(problem()[0], lr=0.1, **{key: True})
    page = (Path(__file__).parents[2] / "docs/using.md").read_text()
    assert f"`{key}`" in page, "with its reason"


@OURS_ONLY
def test_complex_parameters_are_refused(one):
    assert not one.supports_complex
    with pytest.raises(OptionError, match="complex"):
        one.optim_cls([Parameter(torch.randn(3, 3, dtype=torch.complex64))], lr=0.1)


@EVERY_INFO
def test_sparse_gradients(one):
    """torch's AdamW refuses them; we make them dense."""
    p = Parameter(torch.randn(10, 4))
    _, kwargs = next(each_input(one))
    optimizer = one.optim_cls([p], **kwargs)
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 4), (10, 4))
    before = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one in CONTROL:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
        else:
            optimizer.step()
            assert not same(p, before)
