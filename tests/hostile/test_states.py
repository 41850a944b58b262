"""Tampered states of every method and format: each is refused with one line that names the entry, and nothing changes."""

import copy

import pytest
import torch

from hf_efcp import OptionError
from tests.hostile.conftest import Record
from tests.hostile.tampering import KINDS, bit, damages, outcome, tampered
from tests.optim.helpers import M, differences, fresh, snapshot, started, train
from tests.reference import NAMES, info, known_to, names

SHAPES = ((7,), (12, 30), (9, 11))
# Window's and error's format; each method takes the options that it has.
FORMATS = {
    "fp32": {},
    "bf16": {"window_dtype": "bf16", "error_dtype": "bf16", "metric": "factored"},
    "low_bit, int8": {"window_format": "low_bit", "error_format": "int8", "metric": "diagonal"},
    "low_bit, int4": {"window_format": "low_bit", "error_format": "int4", "scope": "layer", "momentum": 0.5},
    "residual": {
        "window_dtype": "bf16",
        "error_dtype": "bf16",
        "residual": "momentum",
        "window_momentum": 0.5,
        "metric": "tensor",
    },
}


def start(name, options):
    given = dict(options)
    if "error_format" in given and not info(name).windowed:
        given |= {"window_dtype": None}
    return started(name, shapes=SHAPES, **known_to(name, given))


@pytest.mark.parametrize("name", NAMES)
def test_tampered_entries_are_refused(name):
    """Every entry of every format in every way that its kind has; each kind of entry once."""
    record = Record("tampered entries")
    for format, options in FORMATS.items():
        optimizer, params = start(name, options)
        saved, specs = optimizer.state_dict(), optimizer.setup().specs
        seen = set()
        for number, p in enumerate(params):
            for entry in saved["state"][number]:
                spec = specs[p][entry]
                ways = {**damages(spec), "bit": bit}
                if entry not in seen and format == "fp32":
                    ways |= KINDS
                for way, change in ways.items() if entry not in seen or number == 1 else ():
                    keep = way == "bit"
                    bad = tampered(saved, number, entry, change, keep)
                    record.add(f"{name}, {format}: {number}.{entry} {way}", outcome(optimizer, params, bad, entry))
                seen.add(entry)
        assert outcome(optimizer, params, saved) == "accepted"
    record.check(140)


@pytest.mark.parametrize("name", names(windowed=True))
def test_a_gram_matrix_of_other_entries_is_refused(name):
    record = Record("K, the step and the window")

    def scaled(k):
        return k * 1.5

    def one(i, j, both=True):
        def change(k):
            k = k.clone()
            k[i, j] += 0.25 * k[i, i]
            if both:
                k[j, i] = k[i, j]
            return k

        return change

    ways = {
        "not symmetric": one(0, 2, both=False),
        "another product": one(1, 3),
        "another size": scaled,
        "negative": lambda k: -k,
        "exchanged": lambda k: k.flip(0).flip(1),
    }
    for scope in ("model", "layer"):
        optimizer, params = start(name, {"scope": scope})
        saved = optimizer.state_dict()
        for way, change in ways.items():
            bad = tampered(saved, 0, "gram", change)
            record.add(f"{name}, {scope}: gram {way}", outcome(optimizer, params, bad, "gram"))
        optimizer, params = started(name, steps=2, shapes=SHAPES, scope=scope)
        saved = optimizer.state_dict()
        for step in (0, 1):  # of entries that are there
            bad = tampered(saved, 0, "step", lambda t, step=step: torch.tensor(step))
            record.add(f"{name}, {scope}: step {step}", outcome(optimizer, params, bad, "gram"))
    record.check(14)


SIZES = "window_size", "density", "block_size"  # a block may be larger than all matrices


def edits(saved):
    """Name -> a state dict that is built otherwise."""

    def without(*path):
        other = copy.deepcopy(saved)
        part = other
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        return other

    def put(value, *path):
        other = copy.deepcopy(saved)
        part = other
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return other

    group = saved["param_groups"][0]
    found = {
        f"{'.'.join(map(str, path))} {type(value).__name__}": put(value, *path)
        for path in (
            ("state",),
            ("param_groups",),
            ("param_groups", 0),
            ("param_groups", 0, "params"),
            ("state", 0),
            ("efcp", "options"),
            ("efcp", "class"),
            ("efcp", "format"),
        )
        for value in (None, torch.ones(3), "text")
        if not (path[-1] == "class" and value == "text")
    }
    found |= {f"efcp {type(v).__name__}": put(v, "efcp") for v in ([], torch.ones(2), "text", 3)}
    found |= {
        "text keys": put({str(k): v for k, v in saved["state"].items()}, "state"),
        "one text key": put(saved["state"][0], "state", "0"),
        "a parameter that is not there": put(saved["state"][0], "state", 99),
        "names as keys": put({f"layer.{k}": v for k, v in saved["state"].items()}, "state"),
        "checksums a list": put([1], "efcp", "checksums"),
        "checksums of text": put({0: "text"}, "efcp", "checksums"),
        "another checksum": put(12345, "efcp", "checksums", 0, next(iter(saved["efcp"]["checksums"][0]))),
        "a checksum of text": put("x", "efcp", "checksums", 0, next(iter(saved["efcp"]["checksums"][0]))),
        "a parameter twice": put([0, 0, *group["params"][2:]], "param_groups", 0, "params"),
        "parameters that are lists": put([[i] for i in group["params"]], "param_groups", 0, "params"),
        "names that are numbers": put([1, 2, 3], "param_groups", 0, "param_names"),
        "lr NaN": put(float("nan"), "param_groups", 0, "lr"),
        "lr a list": put([0.1], "param_groups", 0, "lr"),
        "weight_decay -1": put(-1.0, "param_groups", 0, "weight_decay"),
        **{f"{size} 0": put(0, "efcp", "options", size) for size in saved["efcp"]["options"] if size in SIZES},
        **{f"{size} a billion": put(10**9, "efcp", "options", size) for size in saved["efcp"]["options"] if size in SIZES[:2]},
        "options with numbers as names": put({1: 2}, "efcp", "options"),
        "sharded a list": put([], "efcp", "sharded"),
        "sharded errors": put({"errors": -1}, "efcp", "sharded"),
        "sharded trained": put({"trained": "all"}, "efcp", "sharded"),
        "a stub": put({"trained": [0], "origin": "1/2/3", "processes": 2}, "efcp", "sharded"),
        "no state": without("state"),
        "no state of one": without("state", 1),
        "no groups": without("param_groups"),
        "no lr": without("param_groups", 0, "lr"),
        "no options": without("efcp", "options"),
        "format 0": put(0, "efcp", "format"),
        "a list": [saved],
        "nothing": None,
    }
    return found


@pytest.mark.parametrize("name", [NAMES[0], names(windowed=False)[-1]])
def test_a_dict_that_is_built_otherwise_is_refused(name):
    optimizer, params = start(name, {})
    record = Record("state dicts built otherwise")
    for case, bad in edits(optimizer.state_dict()).items():
        record.add(f"{name}: {case}", outcome(optimizer, params, bad))
    record.check(40)


def test_a_load_that_is_interrupted_changes_nothing(monkeypatch):
    """Ctrl-C or a lack of memory at any tensor that is copied."""
    for name in NAMES:
        optimizer, params = start(name, {})
        saved = optimizer.state_dict()
        train(optimizer, params, 20, 22)
        before = snapshot(optimizer, params)
        for limit in (0, 1, 5):
            left = [limit]

            def fails(self, *args, left=left, copy_=torch.Tensor.copy_, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return copy_(self, *args, **kwargs)

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(torch.Tensor, "copy_", fails)
                optimizer.load_state_dict(saved)
            assert differences(before, snapshot(optimizer, params)) == [], (name, limit)
        train(optimizer, params, 22, 24)  # goes on


def test_verify_forms_k_anew_where_that_takes_long(monkeypatch):
    """Without it a K of other entries is noticed where its newest row differs, by the next step."""
    monkeypatch.setattr("hf_efcp.engine.validate._BYTES_IN_A_SECOND", 0)
    (name,) = names(windowed=True, family="mfac", compression="low rank")
    for verify in (False, True):
        optimizer, params = started(name, shapes=SHAPES, verify=verify)
        saved = optimizer.state_dict()
        k = saved["state"][0]["gram"].clone()
        k[0, 2] = k[2, 0] = 0.5 * k[0, 0].sqrt() * k[2, 2].sqrt()
        bad = tampered(saved, 0, "gram", lambda _, k=k: k)
        assert outcome(optimizer, params, bad) == ("refused" if verify else "accepted")


def test_the_settings_of_how_state_is_made_stay_this_optimizers():
    optimizer, params = start(NAMES[0], {})
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"compress": False, "kind": "head", "rate on the device": 3.0, "note": "kept"}
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["note"] == "kept" and not {"kind", "rate on the device"} & group.keys() and group.get("compress", True)
    train(optimizer, params, M + 2, M + 4)


def test_a_refused_state_says_where_and_what():
    optimizer, params = start(NAMES[0], {})
    bad = tampered(optimizer.state_dict(), 1, "error", lambda t: t * float("nan"))
    with pytest.raises(OptionError, match=r"^parameter 1: error is damaged in the checkpoint: expected finite numbers$"):
        fresh(NAMES[0], params).load_state_dict(bad)
