"""residual="momentum": the running mean of what compression leaves out is the update outside of the window."""

import copy

import pytest
import torch

import hf_efcp
from tests.optim.helpers import clones
from tests.optim.metric_runs import M, beside_reference, gradients_at, options_of, step_together
from tests.reference import compressed_names, info, make, names, parameters, row

FAR = {"residual": "momentum", "window_momentum": 0.8}
ADAM = {"update_rms": 0.3, "rms_mode": "adam", "window_nesterov": True}
STIFF = {"mfac": {"damping": 0.1}, "ggt": {"eps": 0.1}}
COMPRESSED = pytest.mark.parametrize("name", compressed_names())


@pytest.mark.parametrize("events", [False, True], ids=["all gradients", "events"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "none", "update_rms": 0.3},
        {"metric": "diagonal", **ADAM},
        {"scope": "layer", **ADAM},
        {"weight_decay": 0.1, "weight_decay_mode": "l2", "momentum": 0.5},
        {"damping_mode": "relative", "damping": 0.1, "weight_decay": 0.1, **ADAM},
        {"eps_mode": "relative", "eps": 0.3, "scope": "layer", **ADAM},
    ],
    ids=str,
)
@COMPRESSED
def test_every_move_is_the_dense_reference_s(name, options, events):
    fast, params, slow = beside_reference(name, **options_of(info(name).family, **{**FAR, **options}))
    for t in range(2 * M + 2):
        gradients_at(t, params, events)
        step_together(fast, params, slow)


@pytest.mark.parametrize(
    "form", [{}, {"error_dtype": torch.bfloat16}, {"error_format": "int8"}, {"error_format": "int4"}], ids=str
)
@COMPRESSED
def test_kernels_and_plain_torch_agree_in_every_format(name, form, monkeypatch):
    moves = []
    for kernels in "01":
        monkeypatch.setenv("HF_EFCP_KERNELS", kernels)
        params = parameters(((40, 300), (40, 300), (300, 40)), torch.float32)
        optimizer = make(
            name, params, window_size=M, metric="factored", update_rms=0.5, **FAR, **STIFF[info(name).family], **form
        )
        before = clones(params)
        for t in range(4):
            gradients_at(t, params)
            optimizer.step()
        moves.append(torch.cat([(p - b).detach().flatten() for p, b in zip(params, before, strict=True)]))
    assert (moves[0] - moves[1]).norm() <= 2e-3 * moves[0].norm()


@COMPRESSED
def test_entries_and_running_mean_add_up_to_the_gradients(name):
    """r = sum over gradients of beta^age (g - c), with the window's entries c as they are stored."""
    params = parameters(((12, 30),))
    optimizer = make(name, params, window_size=9, metric="none", update_rms=None, lr=0.0, **FAR)
    owed = torch.zeros(360, dtype=torch.float64)
    for t in range(9):
        gradients_at(t, params)
        optimizer.step()
        owed = 0.8 * owed + params[0].grad.flatten() - row(optimizer, params[0], t)
    torch.testing.assert_close(optimizer.state[params[0]]["residual"].flatten(), owed)


@COMPRESSED
def test_a_run_goes_on_bit_for_bit(name):
    options = {"window_size": M, "metric": "factored", "error_dtype": torch.bfloat16, **FAR, **ADAM}
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params, **options)
    for t in range(4):
        gradients_at(t, params)
        optimizer.step()
    others = clones(params)
    twin = make(name, others, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(4, 8):
        for run, tensors in ((optimizer, params), (twin, others)):
            gradients_at(t, tensors)
            run.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert optimizer.memory_footprint()["residual"] == optimizer.estimate_footprint()["residual"]


@COMPRESSED
def test_a_checkpoint_with_error_feedback_is_refused_where_momentum_is_given(name):
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params, window_size=M)
    gradients_at(0, params)
    optimizer.step()
    others = make(name, clones(params), window_size=M, residual="momentum", window_momentum=0.8)
    with pytest.raises(hf_efcp.OptionError, match="residual"):
        others.load_state_dict(optimizer.state_dict())


def test_what_has_no_meaning_is_refused():
    p = parameters(((4, 3),))
    with pytest.raises(hf_efcp.OptionError, match=r"residual='momentum'.*needs a metric"):
        hf_efcp.LowRankMFAC(p, lr=0.1, residual="momentum", rms_mode="adam", update_rms=1.0)
    for name in names(windowed=True, compression="low rank"):
        with pytest.raises(hf_efcp.OptionError, match=r"residual='momentum'.*comm=factors"):
            info(name).cls(p, lr=0.1, residual="momentum", comm="factors")


def sizes(optimizer, params, steps, first=0, spike=None, live=None):
    """The root mean square of the first tensor's move in each step, of noise around a part that stays."""
    found = []
    lasting = [torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) for p in params]
    for t in range(first, first + steps):
        fresh = torch.Generator().manual_seed(t)
        for i, (p, part) in enumerate(zip(params, lasting, strict=True)):
            g = 0.3 * part + torch.randn(p.shape, generator=fresh)
            p.grad = None if i and live is not None and t >= live else g * (100 if t == spike else 1)
        before = params[0].detach().clone()
        optimizer.step()
        found.append((params[0].detach() - before).square().mean().sqrt().item())
    return found


def measured(params, **options):
    return hf_efcp.LowRankMFAC(params, lr=1.0, preset="measured", **{"rank": 2, "rms_mode": "constant", **options})


def test_a_run_without_its_window_starts_with_empty_residuals():
    params = parameters(((64, 64),), torch.float32)
    optimizer = measured(params, save_window=False)
    sizes(optimizer, params, 30)
    twin = measured(params, save_window=False)
    with pytest.warns(UserWarning, match="without its window"):
        twin.load_state_dict(optimizer.state_dict())
    assert not twin.state[params[0]]["residual"].any()
    assert max(sizes(twin, params, 5, 30)) < 1.3


def test_a_tensor_that_has_no_gradient_any_more_has_no_part_in_the_size():
    params = parameters(((64, 64), (200, 200)), torch.float32)
    found = sizes(measured(params), params, 60, live=20)
    assert min(found[40:]) > 0.7  # the window has forgotten the tensor, its residual is still there


@pytest.mark.parametrize("metric", ["factored", "diagonal", "tensor"])
def test_a_spike_takes_no_larger_step_than_agreeing_gradients(metric):
    params = parameters(((64, 64),), torch.float32)
    found = sizes(measured(params, metric=metric, rms_mode="adam"), params, 40, spike=30)
    assert max(found[20:]) < 1.3


def test_gradients_near_the_smallest_number_leave_parameters_finite():
    params = parameters(((64, 64),), torch.float32)
    optimizer = hf_efcp.LowRankMFAC(params, lr=1.0, residual="momentum", damping_mode="relative", damping=0.1)
    for _ in range(3):
        params[0].grad = torch.randn(64, 64) * 1e-21
        optimizer.step()
    assert params[0].isfinite().all()


def test_the_values_of_the_preset_may_be_given():
    given = {"residual": "momentum", "rms_mode": "adam"}
    p = parameters(((12, 30),))
    options = hf_efcp.create_optimizer("efcp_lowrank_mfac", p, lr=0.1, preset="measured", **given).options
    assert options == hf_efcp.create_optimizer("efcp_lowrank_mfac", p, lr=0.1, preset="measured").options


def test_diagnostics_count_what_is_outside_of_the_window():
    params = parameters(((64, 64),), torch.float32)
    optimizer = measured(params)
    found = sizes(optimizer, params, 20)
    figures = optimizer.diagnostics()
    assert abs(figures["update_rms"] - 1) < 1e-6 and 0.7 < found[-1] < 1.3
    assert figures["error_share"] > 0.1
