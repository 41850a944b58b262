"""Properties over random models, dtypes and options: telescoping, exactness, resuming, counting bytes."""

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from hf_efcp.core.cells import compute_dtype
from tests.optim.helpers import bits, count, differences, gradients_at, shared, snapshot
from tests.reference import each, error, ggt_oracle, info, known_to, mfac_oracle, names, parameters, row, update_of, window

EVERY = pytest.mark.parametrize("name", each())
WINDOWED = pytest.mark.parametrize("name", names(windowed=True))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def examples(n):
    return settings(deadline=None, derandomize=True, database=None, max_examples=n, suppress_health_check=list(HealthCheck))


lengths = st.one_of(st.integers(1, 12), st.integers(2, 12), st.integers(0, 12))
matrices = st.tuples(st.integers(3, 12), st.integers(3, 12))  # large enough that compression pays
shapes = st.lists(st.one_of(matrices, st.lists(lengths, max_size=4).map(tuple)), min_size=1, max_size=5)
# Several tensors alike make a stack.
models = st.tuples(shapes, st.booleans()).map(lambda x: x[0] * (2 if x[1] else 1))
# One dtype, or each tensor its own.
dtypes = st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)
window_sizes = st.integers(1, 7)


@st.composite
def options(draw, name):
    """Any combination of options that is allowed."""
    found = {
        "window_size": draw(window_sizes),
        "scope": draw(st.sampled_from(["model", "layer"])),
        "update_rms": draw(st.sampled_from([None, 0.3])),
        "momentum": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "window_dtype": draw(st.sampled_from([None, None, "bf16", "fp32", "fp64"])),
        "error_dtype": draw(st.sampled_from([None, None, "bf16", "fp32", "fp64"])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "weight_decay_mode": draw(st.sampled_from(["decoupled", "l2"])),
    }
    if info(name).compression == "low rank":
        found |= {"rank": draw(st.integers(1, 5)), "power_iterations": draw(st.integers(1, 2))}
    if info(name).compression == "sparse":
        found |= {"density": draw(st.sampled_from([0.01, 0.2, 0.5, 1.0])), "block_size": draw(st.sampled_from([1, 3, 16, 1024]))}
    if info(name).family == "mfac":
        found |= {
            "damping": draw(st.sampled_from([1e-6, 1e-2])),
            "damping_mode": draw(st.sampled_from(["absolute", "relative"])),
            "divisor": draw(st.sampled_from(["window", "filled"])),
            "window_momentum": draw(st.sampled_from([0.0, 0.8])),
        }
    elif info(name).family == "ggt":
        found |= {"eps": draw(st.sampled_from([1e-5, 1e-2])), "beta2": draw(st.sampled_from([1.0, 0.9]))}
        found[draw(st.sampled_from(["beta1", "window_momentum"]))] = draw(st.sampled_from([0.0, 0.8]))
    return found


def model(shapes, dtypes):
    return [Parameter(p.detach().to(dtypes[i % len(dtypes)])) for i, p in enumerate(parameters(shapes))]


def make(name, params, **options):
    return info(name).cls(params, **{"lr": 0.01, **known_to(name, options)})


def run(optimizer, params, start, stop, absent=()):
    """Steps with gradients; at (t, i) in `absent` parameter i has none."""
    for t in range(start, stop):
        gradients_at(t, params)
        for i, p in enumerate(params):
            if (t, i) in absent:
                p.grad = None
        optimizer.step()


absences = st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=6)


@WINDOWED
@examples(12)
@given(data=st.data())
def test_rows_and_error_are_the_sum_of_the_gradients(name, data):
    """Exactly up to the rounding of the dtype that they are kept in; rows that have left the window included."""
    params = model(data.draw(models), data.draw(dtypes))
    drawn = data.draw(options(name)) | {"weight_decay": 0.0}
    m, absent = drawn["window_size"], data.draw(absences)
    optimizer = make(name, params, **drawn)
    given_, left = ([torch.zeros(p.numel(), dtype=torch.float64) for p in params] for _ in range(2))
    largest = [0.0] * len(params)
    for t in range(m + 2):
        gradients_at(t, params)
        taken = count(optimizer)
        for i, p in enumerate(params):
            if (t, i) in absent:
                p.grad = None
            else:
                given_[i] += p.grad.double().flatten()
        evicted = [row(optimizer, p, taken % m).clone() for p in params] if taken >= m else []
        optimizer.step()
        if count(optimizer) > taken:  # a step without any gradient is none
            for total, gone in zip(left, evicted, strict=False):
                total += gone
        for i, p in enumerate(params):
            parts = [row(optimizer, p, taken % m).double(), error(optimizer, p)]
            largest[i] = max([largest[i], *(x.abs().max().item() for x in parts if x.numel())])
    for i, p in enumerate(params):
        kept = left[i] + sum(row(optimizer, p, j).double() for j in range(m)) + error(optimizer, p)
        kinds = {v.dtype for k, v in optimizer.state[p].items() if k == "error"} | {compute_dtype(p)}
        eps = max(torch.finfo(d).eps for d in kinds)
        torch.testing.assert_close(kept, given_[i], rtol=0, atol=8 * (m + 2) * eps * largest[i])


@WINDOWED
@examples(12)
@given(data=st.data())
def test_gram_matrix_is_that_of_the_stored_rows(name, data):
    params = model(data.draw(models), data.draw(dtypes))
    drawn = data.draw(options(name))
    optimizer = make(name, params, **drawn)
    run(optimizer, params, 0, drawn["window_size"] + 3, data.draw(absences))
    if drawn["scope"] == "model":
        g = window(optimizer, params)
        torch.testing.assert_close(shared(optimizer, "gram"), g @ g.T, rtol=1e-12, atol=1e-13)
    else:
        for p in params:
            g = torch.stack([row(optimizer, p, i).double() for i in range(drawn["window_size"])])
            torch.testing.assert_close(optimizer.state[p]["gram"], g @ g.T, rtol=1e-12, atol=1e-13)


@WINDOWED
@examples(12)
@given(data=st.data())
def test_the_update_is_the_exact_one_on_the_stored_rows(name, data):
    """By a thin SVD of the window, which also says that the update lies in the span of the rows."""
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    params = model(data.draw(models), [dtype])
    drawn = data.draw(options(name)) | {"momentum": 0.0, "lr": 1.0, "weight_decay": 0.0}
    # Milder than the defaults: with few dimensions and many rows the problem itself must be well posed.
    drawn |= {"damping": 1e-2} if info(name).family == "mfac" else {"eps": 1e-2}
    m, beta = drawn["window_size"], drawn.get("beta1", 0.0) or drawn.get("window_momentum", 0.0)
    optimizer = make(name, params, **drawn)
    absent = data.draw(absences)
    norms = data.draw(st.lists(st.sampled_from([1.0, 1e-2, 1e2]), min_size=1, max_size=3))
    for t in range(m + 3):
        gradients_at(t, params, norms[t % len(norms)])
        for i, p in enumerate(params):
            if (t, i) in absent:
                p.grad = None
        taken = count(optimizer)
        u = update_of(optimizer, params)
        if count(optimizer) == taken:
            assert not u.any()
            continue
        live = torch.cat([torch.full((p.numel(),), p.grad is not None) for p in params])
        g = window(optimizer, params).double()
        parts = [g] if drawn["scope"] == "model" else list(g.split([p.numel() for p in params], 1))
        expected = torch.cat([exact(name, part, taken, m, beta, drawn, dtype) for part in parts])
        if drawn["update_rms"]:
            norm = expected.norm()
            expected = expected * (drawn["update_rms"] * int(live.sum()) ** 0.5 / norm) if norm > 0 else expected
        expected = expected * live  # what has no gradient stays, though its old rows count in the norm
        tolerance = 1e-7 if dtype == torch.float64 else 1e-4
        assert (u - expected).norm() <= tolerance * expected.norm() + 1e-12


def exact(name, g, t, m, beta, drawn, dtype):
    """The update of one Gram matrix's tensors from its window g, (m, d)."""
    if not g.any():
        return torch.zeros(g.shape[1], dtype=torch.float64)
    ages = torch.tensor([(t - i) % m for i in range(m)], dtype=torch.float64)
    x = ((1 - beta) * beta**ages if beta else (ages == 0).double()) @ g
    if info(name).family == "ggt":
        return ggt_oracle(drawn["beta2"] ** ages[:, None] * g, x, drawn["eps"], dtype)
    filled = min(t + 1, m)
    damping = drawn["damping"]
    if drawn["damping_mode"] == "relative":
        damping *= g.square().sum(1)[:filled].mean()
    return mfac_oracle(g, x, damping, filled if drawn["divisor"] == "filled" else m, dtype)


@EVERY
@examples(12)
@given(data=st.data())
def test_save_and_resume_is_the_uninterrupted_run(name, data):
    drawn = data.draw(options(name))
    params = model(data.draw(models), data.draw(dtypes))
    absent = data.draw(absences)
    point = data.draw(st.integers(0, drawn["window_size"] + 1))
    stop = point + data.draw(st.integers(1, 3))
    optimizer = make(name, params, **drawn)
    run(optimizer, params, 0, point, absent)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [Parameter(p.detach().clone()) for p in params]
    other = make(name, others, **drawn)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, point, stop, absent)
    run(other, others, point, stop, absent)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
@examples(12)
@given(data=st.data())
def test_footprint_is_the_sum_of_the_bytes_of_the_state(name, data):
    params = model(data.draw(models), data.draw(dtypes))
    frozen = data.draw(st.sets(st.integers(0, 4)))
    for i in frozen & set(range(len(params))):
        params[i].requires_grad_(False)
    optimizer = make(name, params, **data.draw(options(name)))
    footprint = optimizer.memory_footprint()
    live = [p for p in params if p.requires_grad]
    run(optimizer, live, 0, 1)
    assert optimizer.memory_footprint() == footprint
    held = sum(bits(t).numel() for entry in optimizer.state.values() for t in entry.values())
    saved = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
    assert sum(footprint.values()) == held == sum(t.untyped_storage().nbytes() for t in saved)
    assert set(optimizer.state) == set(live)


@WINDOWED
@examples(12)
@given(data=st.data())
def test_update_rms_holds_for_any_model(name, data):
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    params = model(data.draw(models), [dtype])
    drawn = data.draw(options(name)) | {"update_rms": 0.25, "momentum": 0.0, "lr": 1.0, "weight_decay": 0.0}
    optimizer = make(name, params, **drawn)
    for t in range(drawn["window_size"] + 1):
        gradients_at(t, params)
        u = update_of(optimizer, params)
        assert u.isfinite().all()
        if u.any():
            assert abs(u.square().mean().sqrt().item() / 0.25 - 1) < 1e-4
        else:
            assert not window(optimizer, params)[max(0, count(optimizer) - 1) % drawn["window_size"]].any()
