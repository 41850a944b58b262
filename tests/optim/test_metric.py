"""The metric of every window method beside the dense reference: each tensor's move at each step, three windows long."""

import pytest
import torch

from tests.optim.helpers import KERNELS, clones, pairwise
from tests.optim.metric_runs import SHAPES, M, beside_reference, gradients_at, name_of, step_together
from tests.reference import exact_options, info, names

EVERY = pytest.mark.parametrize("name", names(windowed=True))
MFAC = pytest.mark.parametrize("name", names(family="mfac"))
GGT = pytest.mark.parametrize("name", names(family="ggt"))
GGT_OPTIONS = [
    {"beta2": 0.9},
    {"beta2": 0.5, "beta1": 0.8, "update_rms": 0.3},
    {"eps_mode": "relative", "eps": 0.3, "beta1": 0.8, "update_rms": 0.3},
    {"eps_mode": "relative", "eps": 0.3, "centered": True, "window_nesterov": True, "window_momentum": 0.5},
]
FAMILIES, COMPRESSIONS, EVENTS = ["mfac", "ggt"], ["dense", "sparse", "low rank"], [False, True]
ALL_METRICS = ["tensor", "diagonal", "factored"]
# Damping and eps at which the dense solve itself is right to 1e-11.
WELL_POSED = {"damping": 1e-2, "eps": 1e-2, "lr": 0.01, "window_size": M, "metric_beta": 0.9}
START = {"damping_mode": "relative", "damping": 0.1, "window_momentum": 0.9, "window_nesterov": True, "update_rms": 1.0}


def compare(name, events=False, shapes=SHAPES, bound=1e-9, **options):
    fast, params, slow = beside_reference(name, shapes, **{**WELL_POSED, **options})
    moved = 0
    for t in range(3 * M):
        gradients_at(t, params, events)
        moved += sum(move.norm() for move in step_together(fast, params, slow, bound))
    assert moved > 0 and slow.t == 3 * M - events


@pairwise(name=names(windowed=True), metric=ALL_METRICS, scope=["model", "layer"], events=EVENTS, kernels=KERNELS)
@pytest.mark.usefixtures("kernels")
def test_the_raw_update(name, scope, metric, events):
    compare(name, events, metric=metric, scope=scope)


EACH_OPTION = [
    {"update_rms": 0.3},
    {"update_rms": 0.3, "scope": "layer", "window_momentum": 0.8},
    {"update_rms": 1.0, "rms_mode": "adam", "window_momentum": 0.8},
    {"update_rms": 1.0, "rms_mode": "adam", "window_momentum": 0.8, "scope": "layer"},
    {"window_momentum": 0.8, "window_nesterov": True},
    {"window_nesterov": True, "scope": "layer", "update_rms": 0.3, "window_momentum": 0.8},
    {"centered": True, "window_momentum": 0.8},
    {"centered": True, "window_momentum": 0.8, "update_rms": 0.3, "scope": "layer", "window_nesterov": True},
    {"weight_decay": 0.3, "update_rms": 0.3},
    {"weight_decay": 0.3, "weight_decay_mode": "l2", "update_rms": 0.3},
    {"momentum": 0.7, "weight_decay": 0.3, "update_rms": 0.3},
    {
        "momentum": 0.7,
        "weight_decay": 0.3,
        "weight_decay_mode": "l2",
        "scope": "layer",
        "rms_mode": "adam",
        "update_rms": 1.0,
    },
    {"metric_beta": 0.5, "metric_eps": 0.1, "update_rms": 0.3},
]


@pairwise(options=EACH_OPTION, compression=COMPRESSIONS, family=FAMILIES, events=EVENTS)
def test_each_option_with_a_factored_metric(family, compression, options, events):
    compare(name_of(family, compression), events, metric="factored", **options)


@pairwise(metric=["none", "tensor", "diagonal"], compression=COMPRESSIONS, family=FAMILIES, events=EVENTS)
def test_where_to_start_from_with_other_metrics(family, compression, metric, events):
    compare(name_of(family, compression), events, metric=metric, **START)


WITHOUT = [
    {"window_momentum": 0.8, "window_nesterov": True},
    {"centered": True, "window_momentum": 0.8},
    {"update_rms": 0.3, "rms_mode": "adam", "window_momentum": 0.8},
    {"update_rms": 0.3, "scope": "layer", "momentum": 0.5, "weight_decay": 0.3},
    {"update_rms": 0.3, "weight_decay": 0.3, "weight_decay_mode": "l2"},
]


@pairwise(options=WITHOUT, compression=COMPRESSIONS, family=FAMILIES, events=EVENTS)
def test_without_a_metric(family, compression, options, events):
    """Which tensors count and move is the same rule; centred entries and Nesterov weights need no metric."""
    compare(name_of(family, compression), events, metric="none", **options)


@pairwise(
    name=names(family="mfac"),
    damping=[{"damping": 1e-2}, {"damping_mode": "relative", "damping": 0.1}],
    divisor=["window", "filled"],
    centered=[False, True],
    events=EVENTS,
)
def test_damping_divisor_and_centring(name, damping, divisor, centered, events):
    compare(name, events, metric="factored", divisor=divisor, centered=centered, window_momentum=0.8, **damping)


@pytest.mark.parametrize("scope", ["model", "layer"])
@MFAC
def test_where_to_start_from(name, scope):
    """The settings of a prototype that trained well, and tensors that come and go."""
    compare(name, events=True, metric="factored", rms_mode="adam", scope=scope, **START)


@pairwise(name=names(family="ggt"), metric=ALL_METRICS, options=GGT_OPTIONS)
def test_ggt_with_decay(name, metric, options):
    compare(name, events=True, metric=metric, **options)


@pairwise(compression=COMPRESSIONS, metric=ALL_METRICS, family=FAMILIES)
def test_a_window_of_one_entry(family, compression, metric):
    compare(name_of(family, compression), metric=metric, window_size=1, update_rms=0.3)


@pairwise(name=names(windowed=True), metric=["none", "tensor", "factored"], centered=[False, True])
def test_more_entries_than_coordinates(name, metric, centered):
    """15 entries in 8 dimensions depend on each other."""
    # Centred, psi of a small eigenvalue multiplies the rounding errors of K.
    bound = 1e-7 if centered and info(name).family == "ggt" else 1e-9
    compare(name, shapes=[(2, 3), (2,)], bound=bound, metric=metric, centered=centered, window_size=20, window_momentum=0.8)


@pytest.mark.parametrize("options", [{}, {"centered": True}, {"window_nesterov": True, "update_rms": 0.3}], ids=str)
@EVERY
def test_equal_entries(name, options):
    """Two gradients in turn: the window holds each of them several times."""
    exact = {key: value for key, value in exact_options(name).items() if key in info(name).options()}
    options = {**WELL_POSED, "window_momentum": 0.8, **exact, **options}
    fast, params, slow = beside_reference(name, metric="none", **options)
    start = clones(params)
    for t in range(3 * M):
        gradients_at(t % 2, start)
        for p, q in zip(params, start, strict=True):
            p.grad = q.grad
        step_together(fast, params, slow)
    assert torch.linalg.matrix_rank(torch.stack(slow.entries)) == 2


@pytest.mark.parametrize("name", names(windowed=True))
def test_a_metric_changes_the_trajectory(name):
    """The comparisons above would not see a metric that neither side has."""
    runs = []
    for metric in ("none", "tensor", "diagonal", "factored"):
        fast, params, _ = beside_reference(name, **{**WELL_POSED, "metric": metric, "update_rms": 0.3})
        for t in range(M):
            gradients_at(t, params)
            fast.step()
        runs.append(torch.cat([p.detach().flatten() for p in params]))
    assert all((a - b).norm() > 1e-3 * a.norm() for i, a in enumerate(runs) for b in runs[:i])
