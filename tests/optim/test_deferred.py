"""As on a GPU, where the host never waits: writes masked by a flag on the device, news one step late. Run on the CPU."""

import contextlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_efcp.core.coefficients
import hf_efcp.core.compressors
import hf_efcp.core.deferred
import hf_efcp.engine.sizes
import hf_efcp.engine.tensorwise
from tests.optim.helpers import WINDOWED, M, assert_unchanged, count, gradients_at, snapshot, started, step_quietly, train
from tests.reference import info, relative

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:.*a gradient is not finite:RuntimeWarning")
OPTIONS = [
    {},
    {"scope": "layer"},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"error_dtype": "bf16", "window_dtype": "bf16"},
    {"error_format": "int4", "window_format": "low_bit", "stochastic_rounding": True},
    {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "window_nesterov": True},
    {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "residual": "momentum", "error_dtype": "bf16"},
    {"metric": "diagonal", "weight_decay": 0.1},
    {"metric": "tensor", "scope": "layer", "momentum": 0.9},
]


@pytest.fixture
def deferred(monkeypatch):
    """From here on, reading a flag of the CPU counts as waiting."""

    def switch(on=True):
        for module in (
            hf_efcp.engine.tensorwise,
            hf_efcp.engine.sizes,
            hf_efcp.core.deferred,
            hf_efcp.core.compressors,
            hf_efcp.core.coefficients,
        ):
            monkeypatch.setattr(module, "readable", lambda device: not on)

    return switch


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, but for the copies that were queued a step ago."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero")

    def __init__(self, *allowed):
        super().__init__()
        self.allowed = {t.data_ptr() for t in allowed if t is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN and args[0].data_ptr() not in self.allowed:
            raise AssertionError(f"{name} would wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [*OPTIONS, {"centered": True, "window_momentum": 0.8}], ids=str)
@WINDOWED
def test_skipped_steps_leave_no_trace_and_the_others_are_the_same(name, options, deferred):
    dtype = torch.float32 if "error_dtype" in options else torch.float64
    optimizer, params = started(name, dtype=dtype, **options)
    twin, others = started(name, dtype=dtype, **options)
    deferred()
    for t in range(20, 26):
        gradients_at(99, params)
        params[t % len(params)].grad.view(-1)[-1] = NAN
        before = snapshot(optimizer, params, without=["skipped"])
        step_quietly(optimizer)
        assert_unchanged(before, optimizer, params, without=["skipped"])
        assert optimizer.diagnostics().get("update_rms", 1.0) > 0
        train(optimizer, params, t, t + 1)
    deferred(False)
    train(twin, others, 20, 26)
    assert count(optimizer, "skipped") == 6
    for figure in ("kappa", "update_rms") if info(name).windowed else ("error_norm",):
        assert optimizer.diagnostics()[figure] == pytest.approx(twin.diagnostics()[figure], rel=1e-3)
    # A bf16 state may round a tie the other way; rows of a single number depend on each other.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6 if "scope" in options else 1e-12
    assert all(relative(p, q) < tolerance for p, q in zip(params, others, strict=True))


@WINDOWED
def test_a_first_gradient_that_is_not_finite(name, deferred):
    deferred()
    optimizer, params = started(name, steps=0, momentum=0.5, weight_decay=0.1)
    start = [p.detach().clone() for p in params]
    gradients_at(0, params)
    params[2].grad.fill_(NAN)
    step_quietly(optimizer)
    assert optimizer.diagnostics() == {"step": 0.0, "skipped_steps": 1.0}
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    train(optimizer, params, 0, M + 1)
    assert all(p.isfinite().all() and not torch.equal(p, s) for p, s in zip(params, start, strict=True))


def test_the_warning_comes_one_step_late(deferred):
    deferred()
    optimizer, params = started("efcp_lowrank_mfac")
    warned = []
    for i in range(4):
        gradients_at(i, params)
        if i == 1:
            params[0].grad.fill_(NAN)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned += [i for w in caught if "1 skipped so far" in str(w.message)]
    assert warned == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_mfac", "efcp_dense_mfac"])
def test_a_step_of_mfac_reads_nothing_from_the_device(name, options, dtype, deferred):
    optimizer, params = started(name, dtype=dtype, **options)
    deferred()
    train(optimizer, params, 20, 22)
    gradients_at(22, params)
    setup = optimizer.setup()
    with NoReading(setup.skips._copy):
        optimizer.step()
    deferred(False)
    with pytest.raises(AssertionError, match="would wait"), NoReading():
        optimizer.step()


# The third gradient comes three times; tensor by tensor, a single number's rows depend on each other from the second on.
@pytest.mark.parametrize("damping", [1e-12, 1e-6, 0.1])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_dependent_rows_are_cut_away_without_waiting(scope, damping, deferred):
    def run(later):
        optimizer, params = started("efcp_dense_mfac", steps=0, scope=scope, damping=damping)
        deferred(later)
        updates = []
        for t in (0, 1, 2, 2, 2, 3, 4, 5, 6):
            torch.manual_seed(t)
            for p in params:
                p.grad = torch.randn(p.shape) * 10 ** (t % 3)
            before = [p.detach().clone() for p in params]
            with NoReading(optimizer.setup().skips._copy) if later and t else contextlib.nullcontext():
                optimizer.step()
            updates.append(torch.cat([(p - b).flatten() for p, b in zip(params, before, strict=True)]))
        deferred(False)
        return updates

    for late, at_once in zip(run(True), run(False), strict=True):
        assert relative(late, at_once) < 1e-4
