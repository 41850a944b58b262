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
    for name in names(compression="low rank"):
        with pytest.raises(hf_efcp.OptionError, match=r"residual='momentum'.*comm=factors"):
            info(name).cls(p, lr=0.1, residual="momentum", comm="factors")
