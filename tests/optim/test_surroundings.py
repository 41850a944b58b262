"""Torch's settings, random numbers, repeatability, and the figures of diagnostics()."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_efcp.kernels.calls import FAILED
from tests.optim.helpers import (
    EVERY,
    SCOPES,
    WINDOWED,
    M,
    assert_unchanged,
    bits,
    count,
    differences,
    gradients_at,
    snapshot,
    started,
    train,
)
from tests.reference import (
    NAMES,
    each,
    error,
    make,
    parameters,
    set_gradients,
    update_of,
    window,
)


@pytest.mark.parametrize("preset", ["paper", "measured"])
@EVERY
def test_torchs_default_device_changes_nothing(name, preset):
    """The device meta stands for a GPU beside which a small model trains on the CPU."""
    failed, runs = set(FAILED), []
    for device in ("cpu", "meta"):
        params = parameters(dtype=torch.float32)
        with torch.device(device):
            optimizer = make(name, params, lr=0.01, window_size=M, preset=preset)
            for t in range(4):
                with torch.device("cpu"):
                    gradients_at(t, params)
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.probe_next_step()
                optimizer.step()
            assert optimizer.diagnostics() and optimizer.memory_footprint() and optimizer.estimate_footprint()
        runs.append(snapshot(optimizer, params))
    assert differences(*runs) == [] and failed == FAILED


@EVERY
def test_autocast_around_the_step_changes_nothing(name):
    runs = []
    for enabled in (False, True):
        optimizer, params = started(name, steps=0)
        for t in range(M + 2):
            gradients_at(t, params)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
                assert torch.is_autocast_enabled("cpu") == enabled
        runs.append(snapshot(optimizer, params))
    assert differences(*runs) == []


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@EVERY
def test_autograd_notices_that_parameters_have_changed(name, momentum):
    """A graph from before the step would give the gradients of other parameters."""
    params = parameters([(12, 30), (40,)])
    optimizer = make(name, params, lr=0.1, window_size=M, momentum=momentum)
    loss = sum((p * p).sum() for p in params)
    loss.backward(retain_graph=True)
    optimizer.step()
    for p in params:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, p, retain_graph=True)


def test_matmul_precision_is_ignored_and_restored():
    for name in NAMES:
        runs = []
        for precision in ("highest", "medium"):
            before = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision(precision)
                cuda = torch.backends.cuda.matmul.allow_tf32
                optimizer, params = started(name)
                assert torch.get_float32_matmul_precision() == precision
                assert torch.backends.cuda.matmul.allow_tf32 == cuda
            finally:
                torch.set_float32_matmul_precision(before)
            runs.append(snapshot(optimizer, params))
        assert differences(*runs) == []


def test_settings_are_restored_when_a_step_fails(monkeypatch):
    optimizer, params = started("efcp_lowrank_mfac")
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: 1 / 0)
    gradients_at(50, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == precision and torch.is_grad_enabled()


@EVERY
def test_default_dtype_does_not_matter(name):
    runs = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            optimizer, params = started(name, error_dtype="bf16", momentum=0.5, window_momentum=0.5)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(snapshot(optimizer, params))
    assert differences(runs[0], runs[1]) == [] and differences(runs[0], runs[2]) == []


@EVERY
def test_step_works_under_deterministic_algorithms(name):
    try:
        torch.use_deterministic_algorithms(True)
        optimizer, params = started(name)
    finally:
        torch.use_deterministic_algorithms(False)
    twin, others = started(name)
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@EVERY
def test_step_draws_from_no_global_generator(name):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer, params = started(name, error_dtype="bf16")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(4)
    twin, others = started(name, error_dtype="bf16")
    assert differences(snapshot(optimizer, params), snapshot(twin, others)) == []


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer", "error_dtype": "bf16", "window_dtype": "bf16", "momentum": 0.9}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@EVERY
def test_two_runs_are_bit_equal(name, dtype, options):
    a, b = (snapshot(*started(name, dtype=dtype, **options)) for _ in range(2))
    assert differences(a, b) == []


IMPORT = """
import random, sys, warnings
import numpy, torch

def settings():
    return dict(
        dtype=torch.get_default_dtype(), device=torch.get_default_device(), matmul=torch.get_float32_matmul_precision(),
        grad=torch.is_grad_enabled(), threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        deterministic=torch.are_deterministic_algorithms_enabled(), tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn=(torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        mkldnn=torch.backends.mkldnn.enabled, sharing=torch.multiprocessing.get_sharing_strategy(),
        anomaly=torch.is_anomaly_enabled(), convert=torch.__future__.get_overwrite_module_params_on_conversion(),
        torch_random=torch.get_rng_state().tolist(), random=random.getstate(), numpy_random=numpy.random.get_state()[1].tolist(),
    )

before, filters, loaded = settings(), list(warnings.filters), set(sys.modules)
import hf_efcp
assert settings() == before and warnings.filters == filters
assert not torch.cuda.is_initialized()
assert not {"triton", "numba", "wandb"} & (set(sys.modules) - loaded)
p = torch.nn.Parameter(torch.ones(20, 30))
p.grad = torch.ones(20, 30)
for name in hf_efcp.list_optimizers():
    small = {"window_size": 2} if "window_size" in hf_efcp.registry.get_optimizer_info(name).options() else {}
    hf_efcp.create_optimizer(name, [p], lr=0.1, **small).step()
assert settings() == before
"""


def test_importing_and_stepping_change_no_global_setting_and_print_nothing():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300)
    said = [line for line in run.stderr.splitlines() if not line.startswith("compiling CPU kernels")]  # in a first run
    assert (run.returncode, run.stdout, said) == (0, "", [])


# Figures ------------------------------------------------------------------------------------------------------------------


@SCOPES
@WINDOWED
def test_diagnostics_are_plain_finite_numbers_and_change_nothing(name, scope):
    optimizer, params = started(name, steps=0, scope=scope)
    assert optimizer.diagnostics() == {}
    for t in range(M + 2):
        train(optimizer, params, t, t + 1)
        before = snapshot(optimizer, params)
        figures = optimizer.diagnostics()
        assert all(type(k) is str and type(v) is float and np.isfinite(v) for k, v in figures.items())
        assert figures["step"] == t + 1 and figures["rows"] == min(t + 1, M) and figures["skipped_steps"] == 0
        assert figures["update_rms"] == pytest.approx(0.1)
        assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("scope", ["model", "layer"])
@WINDOWED
def test_diagnostics_against_the_stored_rows(name, scope):
    params = parameters()
    optimizer = make(name, params, window_size=M, scope=scope)
    for t in range(M + 2):
        gradients_at(t, params)
        u = update_of(optimizer, params)
    figures, g = optimizer.diagnostics(), window(optimizer, params)
    c = g[(M + 1) % M]
    errors = torch.cat([error(optimizer, p) for p in params])
    assert figures["row_norm"] == pytest.approx(c.norm().item())
    assert figures["update_norm"] == pytest.approx(u.norm().item())
    assert figures["update_rms"] == pytest.approx(u.square().mean().sqrt().item())
    assert figures["cosine_update_row"] == pytest.approx((u @ c / u.norm() / c.norm()).item())
    assert figures["error_norm"] == pytest.approx(errors.norm().item())
    share = errors.square().sum() / (errors.square().sum() + c.square().sum())
    assert figures["error_share"] == pytest.approx(share.item())
    assert 0 < figures["weight_newest"] <= 1 + 1e-9 and 0 <= figures["weight_age"] <= M - 1


@EVERY
def test_memory_is_constant_and_known_before_the_first_step(name):
    optimizer, params = started(name, steps=0, momentum=0.5)
    before = optimizer.memory_footprint()
    assert count(optimizer) == 0
    train(optimizer, params, 0, 2 * M)
    assert optimizer.memory_footprint() == before
    assert all(type(k) is str and type(v) is int for k, v in before.items())
    assert sum(before.values()) == sum(bits(t).numel() for entry in optimizer.state.values() for t in entry.values())


@pytest.mark.parametrize("name", each())
def test_a_compiled_step_is_the_same(name):
    """torch.compile calls step() as it is."""
    ends = []
    for compiled in (False, True):
        params = parameters(dtype=torch.float32)
        optimizer = make(name, params, update_rms=0.5)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(8):
            set_gradients(params, torch.Generator().manual_seed(seed))
            step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*ends)
