"""Bit-for-bit comparison of everything that an optimizer and its parameters hold, and short deterministic runs."""

import warnings

import pytest
import torch

from tests.reference import NAMES, make, parameters

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


__all__ = ["NAMES", "M", "bits", "count", "differences", "gradients_at", "same", "shared", "snapshot", "started", "train"]


EVERY = pytest.mark.parametrize("name", NAMES)
COMPRESSED = pytest.mark.parametrize("name", [n for n in NAMES if "dense" not in n])
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
