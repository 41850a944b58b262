"""What a checkpoint is: plain tensors of exact dtypes, all of them, and nothing more; what does not fit is refused."""

import io

import pytest
import torch
from torch.nn import Parameter

import hf_efcp
from tests.optim.helpers import (
    CHECKPOINT_OPTIONS,
    EVERY,
    WINDOWED,
    M,
    assert_dtypes,
    bits,
    clones,
    count,
    differences,
    fresh,
    resumed,
    same,
    snapshot,
    started,
    through_a_file,
    train,
)
from tests.reference import info, known_to, parameters


def leaves(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (*leaves(key), *leaves(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@CHECKPOINT_OPTIONS
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
    options = {"low rank": {"rank": 8}, "sparse": {"density": 0.05}, "dense": {}}[info(name).compression]
    optimizer = hf_efcp.create_optimizer(
        name, params, lr=0.01, **known_to(name, {"window_size": 16, "error_dtype": "fp32", **options})
    )
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    tensors = [t for entry in saved["state"].values() for t in entry.values()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    file = io.BytesIO()
    torch.save(saved, file)
    footprint = sum(optimizer.memory_footprint().values())
    assert footprint > 2**19
    assert footprint <= len(file.getbuffer()) <= 1.02 * footprint


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
    kind = {"low rank": {"window_p", "warm_start"}, "sparse": {"window_indices"}, "dense": {"window_rows"}}
    assert not info(name).windowed or kind[info(name).compression] <= keys


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


# Without the window ------------------------------------------------------------------------------------------------------


@WINDOWED
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


# Refused loads -----------------------------------------------------------------------------------------------------------


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
