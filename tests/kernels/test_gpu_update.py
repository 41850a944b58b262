"""Triton's additions to parameters and squares of the error, in its interpreter, against plain torch."""

import importlib
import os

import pytest
import torch

from hf_efcp import kernels
from hf_efcp.core.random import stochastic_round
from hf_efcp.engine import apply
from hf_efcp.kernels import calls
from hf_efcp.kernels.devices import pretending
from tests.kernels.helpers import coded_error, plain_error
from tests.reference import few_names, make, parameters, rate_of_adam, relative, set_gradients

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "int8": 8, "int4": 4}
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SHAPES = pytest.mark.parametrize(("n", "rows", "cols"), [(2, 1, 600), (3, 9, 301), (2, 40, 3), (1, 1, 1)])


@pytest.fixture(scope="module")
def gpu_update():
    return importlib.import_module("hf_efcp.kernels.gpu_update")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error_of(format, n, rows, cols, dtype):
    kind, e = FORMATS[format], random(n, rows, cols, dtype=dtype, seed=1)
    if not isinstance(kind, int):
        return plain_error(e.to(kind), dtype)
    error = coded_error(kind, n, rows, cols, dtype)
    error.write(e)
    return error


@EVERY_FORMAT
@DTYPES
@SHAPES
def test_the_squares_are_those_of_torch(gpu_update, n, rows, cols, dtype, format):
    error = error_of(format, n, rows, cols, dtype)
    found = gpu_update.square(error.stored, cols, dtype)
    assert found.shape == (n,) and found.dtype == torch.float64
    torch.testing.assert_close(found, error.read().double().square().sum((1, 2)), rtol=1e-14, atol=0)
    torch.testing.assert_close(found, error.squares(), rtol=1e-13, atol=0)


@EVERY_FORMAT
@DTYPES
@SHAPES
def test_the_error_is_added_as_by_torch(gpu_update, n, rows, cols, dtype, format):
    error, weights = error_of(format, n, rows, cols, dtype), random(n, dtype=dtype, seed=2)
    for scale in (None, (random(n, rows, dtype=dtype, seed=3), random(n, cols, dtype=dtype, seed=4))):
        mine, theirs = (list(random(n, rows, cols, dtype=dtype, seed=5)) for _ in range(2))
        assert gpu_update.add_kept(mine, error.stored, weights, scale)
        error.add_to(theirs, weights, scale)
        assert relative(torch.stack(mine), torch.stack(theirs)) < (1e-15 if dtype == torch.float64 else 1e-6)


@DTYPES
@SHAPES
@pytest.mark.parametrize("update_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_an_update_is_added(gpu_update, n, rows, cols, dtype, update_dtype):
    whole, u = random(n, rows + 2, cols, dtype=dtype), random(n, rows, cols, dtype=update_dtype, seed=1)
    expected = whole.double()
    expected[:, 1:-1] = 0.9 * expected[:, 1:-1] - 0.1 * u.double()
    assert gpu_update.add([x[1:-1] for x in whole], u, -0.1, 0.9)
    assert relative(whole.double(), expected) < (1e-15 if dtype == torch.float64 else 1e-7)
    x, y = random(n, rows, dtype=dtype, seed=2), random(n, cols, dtype=dtype, seed=3)
    expected[:, 1:-1] += 0.2 * x.double()[:, :, None] * u.double() * y.double()[:, None]
    assert gpu_update.add([p[1:-1] for p in whole], u, 0.2, 1.0, None, (x, y))
    assert relative(whole.double(), expected) < (1e-15 if dtype == torch.float64 else 2e-7)


@EVERY_FORMAT
@DTYPES
@SHAPES
def test_an_update_is_added_with_the_error(gpu_update, n, rows, cols, dtype, format):
    """Of some rows: u is of these, the error and the sizes are of whole matrices."""
    error, weights = error_of(format, n, rows + 3, cols, dtype), random(n, dtype=dtype, seed=2)
    some = slice(2, rows + 2)
    p, u = random(n, rows + 3, cols, dtype=dtype), random(n, rows, cols, dtype=dtype, seed=1)
    for sizes in (None, (random(n, rows + 3, dtype=dtype, seed=3), random(n, cols, dtype=dtype, seed=4))):
        expected, whole = p.clone(), u + weights[:, None, None] * error.read(some)
        if sizes is not None:
            whole = whole * sizes[0][:, some, None] * sizes[1][:, None]
        expected[:, some] = 0.9 * expected[:, some] - 0.1 * whole
        found = p.clone()
        assert gpu_update.add([x[some] for x in found], u, -0.1, 0.9, None, sizes, (error.stored, weights), some.start)
        assert relative(found, expected) < (1e-15 if dtype == torch.float64 else 1e-6)
        assert torch.equal(found[:, :2], p[:, :2]) and torch.equal(found[:, -1], p[:, -1])


STEPS = [
    {},
    {"metric": "factored", "rms_mode": "adam", "residual": "momentum", "window_momentum": 0.8, "weight_decay": 0.1},
    {"residual": "feedback", "error_format": "int8", "stochastic_rounding": True},
    {"momentum": 0.5, "metric": "factored"},
]


@pytest.mark.parametrize("options", STEPS, ids=str)
@pytest.mark.parametrize("name", few_names())
def test_steps_of_bf16_parameters_are_those_of_torch(name, options, monkeypatch):
    """In the way of a GPU, where only the addition is a kernel, some rows at a time."""
    updates, done, attempt = [], [], kernels._try

    def only_add(operation, *args):
        if operation != "add":
            return None
        done.append(attempt(operation, *args))
        return done[-1]

    monkeypatch.setattr(kernels, "_try", only_add)
    monkeypatch.setattr(calls, "FAILED", set())
    monkeypatch.setattr(apply, "chunk_bytes", lambda device: 2000)
    for wanted in ("0", "1"):
        monkeypatch.setenv("HF_EFCP_KERNELS", wanted)
        params = parameters(dtype=torch.bfloat16)
        with pretending("cuda"):
            optimizer = make(name, params, window_size=3, update_rms=0.5, lr=rate_of_adam(name, 1.0), **options)
            before = torch.cat([p.detach().double().flatten() for p in params])
            for t in range(4):
                set_gradients(params, torch.Generator().manual_seed(t))
                optimizer.step()
        updates.append(torch.cat([p.detach().double().flatten() for p in params]) - before)
    assert sum(map(bool, done)) > 4 * len(params) / 2 and not calls.FAILED
    # Triton's interpreter cuts off what a GPU rounds to bf16, in each step.
    assert relative(updates[1], updates[0]) < (1e-3 if options.get("stochastic_rounding") else 2e-2)


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_of_few_bits_are_rounded_once_to_nearest(gpu_update, param_dtype, update_dtype):
    p, u = random(2, 9, 301, dtype=param_dtype), random(2, 9, 301, dtype=update_dtype, seed=1)
    exact = p.float() * 0.75 + u.float() * -0.125
    assert gpu_update.add(list(p), u, -0.125, torch.tensor(0.75))
    if param_dtype == torch.float16:
        assert torch.equal(p, exact.half())
    else:  # Triton's interpreter cuts off what a GPU rounds
        assert ((p == exact.bfloat16()) | ((p.float() - exact).abs() < exact.abs() * 2**-7)).all()


def test_bf16_parameters_are_rounded_stochastically(gpu_update):
    p, u = random(2, 9, 301, dtype=torch.bfloat16), random(2, 9, 301, seed=1)
    step, salts, origin = torch.tensor(4), torch.arange(2) + 2**30, (7, 3)
    expected = stochastic_round(p.float() * 0.75 + u * -0.125, torch.bfloat16, step, salts, origin)
    assert gpu_update.add(list(p), u, torch.tensor(-0.125), 0.75, (step, salts, origin))
    assert torch.equal(p, expected)


@DTYPES
def test_numbers_may_be_tensors(gpu_update, dtype):
    p, u = random(2, 9, 301, dtype=dtype), random(2, 9, 301, dtype=dtype, seed=1)
    scale, decay = torch.tensor(-0.1, dtype=dtype), torch.tensor(0.9, dtype=dtype)
    expected = p * decay + u * scale
    assert gpu_update.add(list(p), u, scale, decay)
    assert torch.equal(p, expected)


def test_what_is_left_to_torch(gpu_update):
    p, u, e = torch.zeros(4, 6), torch.ones(1, 4, 6), torch.ones(1, 4, 6)
    assert not gpu_update.add([torch.zeros(6, 4).mT], u, 1.0, 1.0)
    assert not gpu_update.add([p.half()], u.double(), 1.0, 1.0)
    assert not gpu_update.add([p], u.int(), 1.0, 1.0)
    assert not gpu_update.add_kept([p.half()], (e, None), torch.ones(1).half(), None)
    assert not gpu_update.add_kept([p], None, torch.ones(1), None)
    assert not gpu_update.add_kept([torch.zeros(6, 4).mT], (e, None), torch.ones(1), None)
    assert not gpu_update.add_kept([p], (e, None), torch.ones(1, dtype=torch.float64), None)
    assert gpu_update.square(None, 6, torch.float32) is None
    assert gpu_update.square((torch.ones(3, 6), None), 6, torch.float32) is None
    assert not p.any()
