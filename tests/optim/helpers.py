"""Bit-for-bit comparison of everything that an optimizer and its parameters hold, and short deterministic runs."""

import io
import itertools
import warnings

import pytest
import torch
from torch.nn import Parameter

from tests.reference import SHAPES, compressed_names, each, make, names, parameters

M = 4  # window size: a few steps wrap around


def bits(t):
    """The bytes of a tensor: unlike torch.equal, NaN equals NaN and -0.0 is not 0.0."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    """Equal bits, shape and dtype."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def snapshot(optimizer, params, without=()):
    """Copies of parameters, state and groups, by name."""
    found = {f"parameter {i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for name, value in optimizer.state.get(p, {}).items():
            if name not in without:
                found[f"state {i} {name}"] = value.clone()
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group {i} {key}": value for key, value in group.items() if key != "params"}
        found[f"group {i} params"] = [id(p) for p in group["params"]]
    return found


def differences(a, b):
    """Names under which two snapshots differ; parameters' identities are not compared."""
    names = sorted(k for k in a.keys() | b.keys() if not k.endswith(" params"))
    return [k for k in names if k not in a or k not in b or not _alike(a[k], b[k])]


def _alike(a, b):
    return same(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def shared(optimizer, name):
    """`gram`, `step` or `skipped`: kept by the first parameter that has state."""
    return next(entry[name] for entry in optimizer.state.values() if name in entry)


def count(optimizer, name="step"):
    """Of all tensors; without a window `step` is each tensor's own, and `counter` that of all."""
    if name == "step" and any("counter" in entry for entry in optimizer.state.values()):
        name = "counter"
    return int(shared(optimizer, name)) if optimizer.state else 0


def gradients_at(t, params, norm=1.0, pull=0.1):
    """Step t's gradients: random, plus a little of the parameter, so that runs whose parameters differ drift apart."""
    generator = torch.Generator().manual_seed(1000 + t)
    scale = norm / max(1, sum(p.numel() for p in params)) ** 0.5
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = (noise + pull * scale * p.detach().double()).to(p.dtype)


def train(optimizer, params, start, stop, norm=1.0):
    """Steps start ... stop - 1."""
    for t in range(start, stop):
        gradients_at(t, params, norm)
        optimizer.step()


def started(name, steps=M + 2, dtype=torch.float32, shapes=None, **options):
    """An optimizer and its parameters, `steps` steps into a run (by default past the wrap-around)."""
    params = parameters(dtype=dtype) if shapes is None else parameters(shapes, dtype)
    optimizer = make(name, params, **{"lr": 0.01, "window_size": M, "update_rms": 0.1, **options})
    train(optimizer, params, 0, steps)
    return optimizer, params


def pairwise(**lists):
    """Mark a test with combinations in which each value meets each value of every other list, but not in all combinations.

    A list `kernels` goes to the fixture of that name.
    """

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*(range(len(values)) for values in lists.values())))
    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    combinations = [tuple(values[k] for values, k in zip(lists.values(), row, strict=True)) for row in chosen]
    ids = ["-".join(map(str, values)) for values in combinations]
    return pytest.mark.parametrize(",".join(lists), combinations, ids=ids, indirect=[n for n in lists if n == "kernels"])


EVERY = pytest.mark.parametrize("name", each())
WINDOWED = pytest.mark.parametrize("name", each(names(windowed=True)))
KERNELS = ["kernels", "plain torch"]
COMPRESSED = pytest.mark.parametrize("name", each(compressed_names()))
SCOPES = pytest.mark.parametrize("scope", ["model", "layer"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def step_quietly(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()


def assert_unchanged(before, optimizer, params, **kwargs):
    assert differences(before, snapshot(optimizer, params, **kwargs)) == []


def all_finite(optimizer, params):
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return all(t.isfinite().all() for t in [*params, *state])


# Checkpoints -------------------------------------------------------------------------------------------------------------

CHECKPOINT_OPTIONS = pytest.mark.parametrize(
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


def expected_dtypes(key, compute=torch.float32, window=None, error=None):
    return {
        "window_indices": torch.int16,
        "indices": torch.int32,
        "gram": torch.float64,
        "step": torch.int64,
        "skipped": torch.int64,
        "error": error or compute,
        "momentum": compute,
        "warm_start": compute,
    }.get(key, (window or compute) if key.startswith("window_") else compute)


def assert_dtypes(optimizer, **kwargs):
    seen = {key: value.dtype for entry in optimizer.state.values() for key, value in entry.items()}
    # Without a window each tensor counts its steps, as in torch, and `counter` those of all.
    counts = {"step": torch.float32, "counter": torch.int64} if "counter" in seen else {}
    assert seen and seen == {key: counts.get(key) or expected_dtypes(key, **kwargs) for key in seen}
    return set(seen)


class Model(torch.nn.Module):
    """The parameters of tests.reference, as a module."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.tensors = torch.nn.ParameterList(parameters(SHAPES, dtype))
