"""State that survives: saved and resumed, copied, pickled, moved through accelerate, or refused without a trace."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.nn import Parameter

import hf_efcp
from tests.optim.helpers import M, bits, count, differences, gradients_at, same, shared, snapshot, started, train
from tests.reference import NAMES, SHAPES, make, parameters, row

EVERY = pytest.mark.parametrize("name", NAMES)
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"error_dtype": "bf16"},
        {"window_dtype": "bf16"},
        {"scope": "layer"},
        {"window_momentum": 0.5, "weight_decay": 0.1, "weight_decay_mode": "l2", "update_rms": None, "lr": 1e-4},
        {"scope": "layer", "momentum": 0.9, "error_dtype": "bf16", "window_dtype": "bf16", "weight_decay": 0.1},
        {"window_format": "low_bit", "error_format": "int4", "stochastic_rounding": True, "weight_decay": 0.1},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "plain",
)


def through_a_file(saved):
    """What a state dict is after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(params, dtype=None):
    return [Parameter(p.detach().clone().to(dtype or p.dtype), requires_grad=p.requires_grad) for p in params]


def fresh(name, params, **options):
    """A new optimizer as `started` makes it, before its first step."""
    return make(name, params, **{"lr": 0.01, "window_size": M, "update_rms": 0.1, **options})


def resumed(name, optimizer, params, **options):
    """Another process's optimizer and parameters, from the checkpoint of this one."""
    others = clones(params)
    other = fresh(name, others, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other, others


# Saved and resumed --------------------------------------------------------------------------------------------------------


@OPTIONS
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


# What a checkpoint is -----------------------------------------------------------------------------------------------------


def leaves(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (*leaves(key), *leaves(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@OPTIONS
@EVERY
def test_a_checkpoint_is_plain_tensors_and_numbers(name, options):
    optimizer, _ = started(name, **options)
    saved = optimizer.state_dict()
    assert {type(v) for v in leaves(saved)} <= {torch.Tensor, int, float, bool, str, type(None), torch.dtype}
    read = through_a_file(saved)
    assert read["param_groups"] == saved["param_groups"] and read["state"].keys() == saved["state"].keys()
    for i, entry in saved["state"].items():
        assert read["state"][i].keys() == entry.keys()
        assert all(same(read["state"][i][key], value) for key, value in entry.items())


@pytest.mark.parametrize(
    "shapes", [[(150, 200)] * 12, [(300, 400), (2000,), (40, 500), (64, 3, 7, 7)]], ids=["stacked", "single"]
)
@EVERY
def test_a_checkpoint_takes_what_the_state_takes(name, shapes):
    """No tensor drags a larger storage along; a few per cent of file format at most."""
    params = parameters(shapes, torch.float32)
    options = {"lowrank": {"rank": 8}, "sparse": {"density": 0.05}, "dense": {}}[name.split("_")[1]]
    optimizer = hf_efcp.create_optimizer(name, params, lr=0.01, window_size=16, **options)
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    tensors = [t for entry in saved["state"].values() for t in entry.values()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    file = io.BytesIO()
    torch.save(saved, file)
    footprint = sum(optimizer.memory_footprint().values())
    assert footprint > 2**20
    assert footprint <= len(file.getbuffer()) <= 1.02 * footprint


def expected_dtypes(key, compute=torch.float32, window=None, error=None):
    return {
        "window_indices": torch.int16,
        "gram": torch.float64,
        "step": torch.int64,
        "skipped": torch.int64,
        "error": error or compute,
        "momentum": compute,
        "warm_start": compute,
    }.get(key, window or compute)


def assert_dtypes(optimizer, **kwargs):
    seen = {key: value.dtype for entry in optimizer.state.values() for key, value in entry.items()}
    assert seen and seen == {key: expected_dtypes(key, **kwargs) for key in seen}
    return set(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@EVERY
def test_loading_never_changes_a_dtype(name, dtype):
    options = {"momentum": 0.5, "error_dtype": "bf16", "window_dtype": "bf16"}
    kwargs = {"compute": torch.float64 if dtype == torch.float64 else torch.float32}
    for extra, more in (({}, {}), (options, {"window": torch.bfloat16, "error": torch.bfloat16})):
        optimizer, params = started(name, dtype=dtype, **extra)
        assert_dtypes(optimizer, **kwargs, **more)
        other, others = resumed(name, optimizer, params, **extra)
        keys = assert_dtypes(other, **kwargs, **more)
        assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    kind = {"lowrank": {"window_p", "warm_start"}, "sparse": {"window_indices"}, "dense": {"window_rows"}}
    assert kind[name.split("_")[1]] <= keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_loading_into_parameters_that_are_views_of_another_dtype(name, dtype):
    """An fp32 run goes on in a model whose parameters are pieces of one flat low-precision buffer."""
    optimizer, params = started(name)
    flat = torch.cat([p.detach().flatten() for p in params]).to(dtype)
    views = [Parameter(v.view(p.shape)) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
    other = fresh(name, views)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    a, b = snapshot(optimizer, params), snapshot(other, views)
    assert [d for d in differences(a, b) if not d.startswith("parameter")] == []
    assert_dtypes(other)
    train(other, views, 10, 10 + M)
    assert count(other) == 2 * M + 2
    # The buffer moved with them, and only as the optimizer said.
    assert all(v.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for v in views)
    assert torch.equal(flat, torch.cat([v.detach().flatten() for v in views]))


@EVERY
def test_memory_footprint_is_that_of_the_checkpoint(name):
    optimizer, _ = started(name, momentum=0.5, scope="layer")
    saved = through_a_file(optimizer.state_dict())
    held = sum(bits(t).numel() for entry in saved["state"].values() for t in entry.values())
    assert sum(optimizer.memory_footprint().values()) == held


# Copied, pickled ----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.tensors = torch.nn.ParameterList(parameters(SHAPES, dtype))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: _saved_whole(x),
}


def _saved_whole(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("steps", [0, M + 1])
@pytest.mark.parametrize("how", COPIES)
@EVERY
def test_model_and_optimizer_copied_together_go_on_identically(name, how, steps):
    model = Model()
    params = list(model.tensors)
    optimizer = fresh(name, params, momentum=0.5, error_dtype="bf16")
    train(optimizer, params, 0, steps)
    clone, other = COPIES[how]((model, optimizer))
    others = list(clone.tensors)
    assert type(other) is type(optimizer) and other.options == optimizer.options
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    before = snapshot(optimizer, params)
    train(other, others, steps, steps + M + 1)
    assert differences(before, snapshot(optimizer, params)) == [], "the original must not move with its copy"
    train(optimizer, params, steps, steps + M + 1)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    assert optimizer.memory_footprint() == other.memory_footprint()
    assert optimizer.diagnostics() == other.diagnostics()


@EVERY
def test_a_copy_can_take_a_new_group_and_be_saved(name):
    optimizer, params = started(name)
    others, other = copy.deepcopy((params, optimizer))
    new = parameters([(9, 9)], torch.float32, seed=3)
    other.add_param_group({"params": new})
    train(other, [*others, *new], 10, 12)
    assert len(other.state_dict()["param_groups"]) == 2 and len(optimizer.param_groups) == 1


@EVERY
def test_a_pickled_optimizer_is_no_larger_than_its_state(name):
    params = parameters([(150, 200)] * 4, torch.float32)
    optimizer = make(name, params, window_size=16)
    train(optimizer, params, 0, 1)
    held = sum(optimizer.memory_footprint().values()) + sum(bits(p).numel() for p in params)
    assert len(pickle.dumps((params, optimizer))) < 1.05 * held + 10_000


# accelerate, torch.distributed.checkpoint ---------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("steps", [0, M + 1], ids=["new", "with state"])
@EVERY
def test_accelerate_prepare_on_a_bf16_model(name, steps, accelerator):
    """`prepare` saves and loads the state: torch's own loading would cast it to bf16."""
    model, twin = Model(torch.bfloat16), Model(torch.bfloat16)
    optimizer, reference = (fresh(name, list(m.tensors), momentum=0.5) for m in (model, twin))
    train(optimizer, list(model.tensors), 0, steps)
    train(reference, list(twin.tensors), 0, steps)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    train(wrapped, list(prepared.tensors), steps, steps + M + 1)
    train(reference, list(twin.tensors), steps, steps + M + 1)
    assert_dtypes(optimizer)
    assert differences(snapshot(optimizer, list(model.tensors)), snapshot(reference, list(twin.tensors))) == []


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_accelerate_saves_and_loads(name, accelerator, tmp_path):
    model = Model(torch.bfloat16)
    params = list(model.tensors)
    model, optimizer = accelerator.prepare(model, fresh(name, params))
    train(optimizer, params, 0, M + 1)
    accelerator.save_state(tmp_path)
    saved = snapshot(optimizer.optimizer, params)
    train(optimizer, params, 10, 12)
    expected = snapshot(optimizer.optimizer, params)
    accelerator.load_state(tmp_path)
    assert differences(saved, snapshot(optimizer.optimizer, params)) == []
    train(optimizer, params, 10, 12)
    assert differences(expected, snapshot(optimizer.optimizer, params)) == []


@pytest.mark.parametrize("steps", [0, M + 1], ids=["new", "trained"])
@EVERY
def test_torch_distributed_checkpoint_state_dicts(name, steps):
    """They make state by a step with zero gradients, and rename parameters; on one process no group is needed."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = Model()
    params = list(model.tensors)
    optimizer = fresh(name, params)
    train(optimizer, params, 0, M + 2)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    other_model = copy.deepcopy(model)
    others = list(other_model.tensors)
    other = fresh(name, others)
    if steps:
        train(other, others, 30, 30 + steps)
        other_model.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in others]
    dcp.set_optimizer_state_dict(other_model, other, optim_state_dict=through_a_file(saved))
    assert all(same(p, b) for p, b in zip(others, before, strict=True))
    train(optimizer, params, 10, 10 + M)
    train(other, others, 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


# Refused loads ------------------------------------------------------------------------------------------------------------


def damage_shape(saved):
    last = max(saved["state"])
    key = next(k for k in saved["state"][last] if k.startswith("window_"))
    saved["state"][last][key] = saved["state"][last][key][:-1]


def damage_dtype(saved):
    saved["state"][0]["gram"] = saved["state"][0]["gram"].float()


def damage_missing(saved):
    last = max(saved["state"])
    saved["state"][last].popitem()


def damage_parameter(saved):
    del saved["state"][max(saved["state"])]


def damage_groups(saved):
    saved["param_groups"][0]["params"].pop()


def damage_options(saved):
    saved["efcp"]["options"]["window_size"] += 1


def damage_class(saved):
    saved["efcp"]["class"] = "LowRankAdam"


DAMAGES = [damage_shape, damage_dtype, damage_missing, damage_parameter, damage_groups, damage_options, damage_class]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt", "efcp_dense_mfac"])
def test_a_refused_load_changes_nothing(name, damage):
    source, _ = started(name, steps=3, lr=5.0, weight_decay=0.7, momentum=0.5)
    saved = through_a_file(source.state_dict())
    damage(saved)
    for steps in (0, M + 1):
        optimizer, params = started(name, steps=steps, momentum=0.5)
        twin, others = started(name, steps=steps, momentum=0.5)
        before = snapshot(optimizer, params)
        with pytest.raises(hf_efcp.OptionError):
            optimizer.load_state_dict(saved)
        if steps:
            assert differences(before, snapshot(optimizer, params)) == []
        assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["weight_decay"] == 0.0
        train(optimizer, params, 20, 22)
        train(twin, others, 20, 22)
        assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


def test_load_post_hooks_see_what_was_loaded():
    optimizer, params = started("efcp_dense_mfac")
    saved, seen = optimizer.state_dict(), []
    other = fresh("efcp_dense_mfac", clones(params))
    other.register_load_state_dict_post_hook(lambda o: seen.append(count(o)))
    other.load_state_dict(saved)
    assert seen == [M + 2]


def test_load_pre_hooks_see_and_may_change_the_state():
    optimizer, params = started("efcp_dense_mfac")
    seen = []
    other = fresh("efcp_dense_mfac", clones(params))
    other.register_load_state_dict_pre_hook(lambda o, state_dict: seen.append(sorted(state_dict["state"])))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [list(range(len(params)))]


# Learning-rate schedulers --------------------------------------------------------------------------------------------------

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


@EVERY
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


# Without the window ---------------------------------------------------------------------------------------------------------


@EVERY
def test_save_window_false_leaves_the_window_out_and_says_so(name):
    optimizer, params = started(name, save_window=False)
    saved = through_a_file(optimizer.state_dict())
    assert not any(k.startswith("window_") or k in ("gram", "step") for entry in saved["state"].values() for k in entry)
    others = clones(params)
    other = fresh(name, others, save_window=False)
    with pytest.warns(UserWarning, match="without its window"):
        other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        for key, value in other.state[q].items():
            if key.startswith("window_") or key in ("gram", "step"):
                assert not value.any()
            else:
                assert same(value, optimizer.state[p][key])
    train(other, others, 20, 23)
    assert count(other) == 3


def test_a_checkpoint_with_its_window_lacks_nothing_silently():
    optimizer, params = started("efcp_lowrank_mfac", save_window=False)
    saved = optimizer.state_dict()
    saved["efcp"]["options"]["save_window"] = True
    with pytest.raises(hf_efcp.OptionError, match=r"missing: .*window_rows"):
        fresh("efcp_lowrank_mfac", clones(params)).load_state_dict(saved)
