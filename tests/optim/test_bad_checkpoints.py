"""Bad checkpoints are refused with one clear error, and nothing changes."""

import copy

import pytest
import torch

from hf_efcp import OptionError
from tests.optim.bad_inputs import ANY, Bad, table
from tests.optim.helpers import differences, gradients_at, snapshot, started, train
from tests.reference import parameters


def other(name=ANY, **options):
    """A checkpoint of a differently made optimizer."""
    return lambda _: started(name, **options)[0].state_dict()


def edited(edit):
    """The right checkpoint with something done to it."""

    def give(saved):
        edit(saved)
        return saved

    return give


def of_adamw(_):
    params = parameters(dtype=torch.float32)
    optimizer = torch.optim.AdamW(params)
    gradients_at(0, params)
    optimizer.step()
    return optimizer.state_dict()


def drop(number, key):
    return edited(lambda saved: saved["state"][number].pop(key))


def put(number, key, change):
    return edited(lambda saved: saved["state"][number].update({key: change(saved["state"][number].get(key))}))


def without_group_key(key):
    return edited(lambda saved: saved["param_groups"][0].pop(key))


def with_format(saved):
    saved["efcp"]["format"] = 99
    return saved


CLEAR = (OptionError, ValueError)
CHECKPOINTS = [
    Bad("none", lambda _: None, "checkpoint", CLEAR),
    Bad("empty", lambda _: {}, "state and param_groups missing"),
    Bad("a list", lambda _: [1, 2], "expected a dict, got list"),
    Bad("a model's", lambda _: {"weight": torch.ones(3)}, r"state and param_groups missing; it has \['weight'\]"),
    Bad("no state", edited(lambda s: s.pop("state")), "not the checkpoint.*state missing"),
    Bad("no param_groups", edited(lambda s: s.pop("param_groups")), "not the checkpoint.*param_groups missing"),
    Bad("AdamW's", of_adamw, "checkpoint is of another optimizer, with the state exp_avg, exp_avg_sq, step; this is "),
    Bad("other method", other("efcp_lowrank_ggt"), "checkpoint is of LowRankGGT, this optimizer is LowRankMFAC"),
    Bad("other compressor", other("efcp_sparse_mfac"), "checkpoint is of SparseMFAC, this optimizer is LowRankMFAC"),
    Bad("other window size", other(window_size=5), "made with window_size=5, this optimizer has window_size=4"),
    Bad("other rank", other(rank=3), "made with rank=3, this optimizer has rank=2"),
    Bad("other scope", other(scope="layer"), "made with scope='layer', this optimizer has scope='model'"),
    Bad("other window dtype", other(window_dtype="bf16"), "made with window_dtype=torch.bfloat16"),
    Bad("other error dtype", other(error_dtype="bf16"), "made with error_dtype=torch.bfloat16"),
    Bad("momentum", other(momentum=0.9), "parameter 0.*unexpected: momentum"),
    Bad(
        "other parameter dtype",
        other(dtype=torch.float64),
        r"parameter 0: \w+ is .* torch.float64 in the checkpoint, .* torch.float32 here",
    ),
    Bad(
        "other shapes",
        other(shapes=[(7,), (12, 31), (12, 30), (40, 11), (8, 3, 3, 3), (3, 4), ()]),
        r"parameter 1: \w+ is \(.*31.*\)",
    ),
    Bad("fewer parameters", other(shapes=[(7,), (12, 30)]), r"\[2\] tensors, this optimizer of \[7\]"),
    Bad("more parameters", other(shapes=[(7,)] * 8), r"\[8\] tensors, this optimizer of \[7\]"),
    Bad("more groups", edited(lambda s: s["param_groups"].append({"params": [], "lr": 0.1, "weight_decay": 0.0})), r"\[7, 0\]"),
    Bad("no groups", edited(lambda s: s["param_groups"].clear()), r"\[\] tensors, this optimizer of \[7\]"),
    Bad("K missing", drop(0, "gram"), "parameter 0.*missing: gram"),
    Bad("step missing", drop(0, "step"), "parameter 0.*missing: step"),
    Bad("factor missing", drop(1, "window_q"), "parameter 1.*missing: window_q"),
    Bad("error missing", drop(3, "error"), "parameter 3.*missing: error"),
    Bad("parameter missing", edited(lambda s: s["state"].pop(6)), "parameter 6.*missing: window_rows"),
    Bad("unexpected entry", put(2, "exp_avg", lambda _: torch.zeros(3)), "parameter 2.*unexpected: exp_avg"),
    Bad("K in fp32", put(0, "gram", torch.Tensor.float), r"parameter 0: gram is \(4, 4\) torch.float32 in the checkpoint"),
    Bad("step as a float", put(0, "step", torch.Tensor.float), r"parameter 0: step is \(\) torch.float32"),
    Bad("row cut off", put(1, "window_p", lambda t: t[:3]), r"parameter 1: window_p is \(3, 2, 12\)"),
    Bad("transposed factor", put(1, "window_p", lambda t: t.mT), r"parameter 1: window_p is \(4, 12, 2\)"),
    Bad(
        "a number for a tensor",
        put(0, "step", int),
        "parameter 0: step",
        CLEAR,
    ),
    Bad(
        "a list for a tensor",
        put(0, "gram", torch.Tensor.tolist),
        "parameter 0: gram",
        CLEAR,
    ),
    Bad(
        "entry that is none",
        edited(lambda s: s["state"].update({1: None})),
        "parameter 1",
        CLEAR,
    ),
    Bad("group without params", without_group_key("params"), "params", CLEAR),
    Bad("group without lr", without_group_key("lr"), "lr", CLEAR),
    Bad(
        "group with a bad lr",
        edited(lambda s: s["param_groups"][0].update(lr="x")),
        "lr='x'",
        CLEAR,
    ),
    Bad("a later format", with_format, "format", CLEAR),
    Bad("efcp without options", edited(lambda s: s["efcp"].pop("options")), "options", CLEAR),
    Bad(
        "a window that is no number", edited(lambda s: s["efcp"]["options"].update(window_size="x")), "damaged: .*window_size='x'"
    ),
    Bad("efcp without class", edited(lambda s: s["efcp"].pop("class")), "class", CLEAR),
]


# Given, so that no checkpoint decides on them.
GIVEN = {"scope": "model", "window_dtype": None, "error_dtype": None, "momentum": 0.0}


@table(CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(bad):
    optimizer, params = started(ANY, **GIVEN)
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, 10, 12)
    before = snapshot(optimizer, params)
    with pytest.raises(bad.error, match=bad.message) as caught:
        optimizer.load_state_dict(bad.give(saved))
    assert not isinstance(caught.value, KeyError) and len(str(caught.value).splitlines()) == 1
    assert differences(before, snapshot(optimizer, params)) == []


SPARSE = [
    Bad("other density", other("efcp_sparse_mfac", density=0.3), r"made with density=0\.3, this optimizer has density=0\.2"),
    Bad("other block size", other("efcp_sparse_mfac", block_size=8), "made with block_size=8, this optimizer has block_size=16"),
    Bad(
        "indices in int64",
        put(1, "window_indices", torch.Tensor.long),
        r"parameter 1: window_indices is .* torch.int64 in the checkpoint",
    ),
]


@table(SPARSE)
def test_a_bad_checkpoint_of_a_sparse_window(bad):
    optimizer, params = started("efcp_sparse_mfac")
    before = snapshot(optimizer, params)
    with pytest.raises(bad.error, match=bad.message):
        optimizer.load_state_dict(bad.give(copy.deepcopy(optimizer.state_dict())))
    assert differences(before, snapshot(optimizer, params)) == []


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(kept, tmp_path):
    """torch.load refuses it, so that nothing of it reaches the optimizer."""
    optimizer, params = started(ANY)
    file = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    before = snapshot(optimizer, params)
    with pytest.raises((RuntimeError, EOFError, OSError)):
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert differences(before, snapshot(optimizer, params)) == []
