"""A probed step tells how its update lies to its gradient, and is the same step."""

import math

import numpy as np
import pytest
import torch

import hf_efcp
from hf_efcp.engine import probe, together
from hf_efcp.kernels.devices import pretending
from tests.optim.helpers import differences, snapshot, step_quietly
from tests.reference import NAMES, compressed_names, each, info, make, names, parameters, set_gradients

LR, M, WIDTH = 1e-3, 6, 2 ** (1 / 64)
METRIC = {"metric": "factored", "residual": "momentum", "window_momentum": 0.5, "update_rms": 0.5}
AVERAGED = {"momentum": 0.5, "scope": "layer", "metric": "diagonal"}
by_name = pytest.mark.parametrize("name", each())


def run(name, probed, steps=5, shapes=None, **options):
    """An optimizer after some steps; its parameters, and those of before the last step."""
    params = parameters() if shapes is None else parameters(shapes)
    groups = [{"params": params[:1], "kind": "head"}, {"params": params[1:], "lr": 2 * LR}]
    optimizer, before = make(name, groups, lr=LR, window_size=M, **options), []
    for t in range(steps):
        set_gradients(params, torch.Generator().manual_seed(t))
        if probed:
            optimizer.probe_next_step()
        before = [p.detach().clone() for p in params]
        optimizer.step()
    return optimizer, params, before


@by_name
@pytest.mark.parametrize(
    "options", [{}, METRIC, {"momentum": 0.5, "scope": "layer", "metric": "diagonal"}], ids=["paper", "metric", "v"]
)
def test_the_figures_are_those_of_what_moved(name, options):
    optimizer, params, before = run(name, probed=True, **options)
    moved = [(old - p.detach()).flatten() for old, p in zip(before, params, strict=True)]
    parts = [move / (LR if i == 0 else 2 * LR) for i, move in enumerate(moved)]
    u, g = torch.cat(parts), torch.cat([p.grad.flatten() for p in params])
    d = optimizer.diagnostics()
    assert d["gradient_norm"] == pytest.approx(float(g.norm()))
    assert d["update_norm_all"] == pytest.approx(float(u.norm()), rel=1e-6)
    assert d["update_norm_head"] == pytest.approx(float(parts[0].norm()), rel=1e-6)
    vectors = [part for part, p in zip(parts[1:], params[1:], strict=True) if p.ndim < 2]
    assert d["update_rms_vector"] == pytest.approx(float(torch.cat(vectors).square().mean().sqrt()), rel=1e-6)
    size = torch.cat([p.detach().flatten() for p in params]).norm()
    assert d["relative_step"] == pytest.approx(float(torch.cat(moved).norm() / size), rel=1e-3)  # before it, or after
    cosine = float(u @ g / u.norm() / g.norm())
    assert d["cosine_update_gradient"] == pytest.approx(cosine, abs=1e-9)
    assert d["angle_update_gradient"] == pytest.approx(math.degrees(math.acos(cosine)))
    assert d["ratio_update_gradient"] == pytest.approx(float(u.norm() / g.norm()), rel=1e-6)
    zero = u.abs() < 1e-9 * u.abs().max()
    assert d["zero_updates"] == pytest.approx(float(zero.double().mean()), abs=2e-3)
    quantiles = np.quantile((u / g).abs()[~zero], [0.25, 0.5, 0.75], method="inverted_cdf")
    for q, expected in zip((25, 50, 75), quantiles, strict=True):
        assert expected / WIDTH <= d[f"scale_q{q}"] <= expected * WIDTH


@by_name
def test_it_is_the_same_step(name):
    (plain, *_), (probed, *_) = (run(name, probed, **METRIC) for probed in (False, True))
    mine, others = (snapshot(o, [p for g in o.param_groups for p in g["params"]]) for o in (plain, probed))
    assert differences(mine, others) == []


@by_name
def test_what_is_lost_is_what_was_not_kept(name):
    """Of the first step: a = g, and c, dense and in fp64, is what the error lacks."""
    optimizer, params, _ = run(name, probed=True, steps=1)
    kept = [optimizer.state[p].get("error") for p in params]
    squares = optimizer.diagnostics()["error_norm"] ** 2
    whole = sum(float(p.grad.square().sum()) for p in params)
    if info(name).compression == "dense":
        assert squares == 0 and not any(e is not None and e.any() for e in kept)
    elif kept[1].is_floating_point():
        assert squares == pytest.approx(sum(float(e.square().sum()) for e in kept if e is not None), rel=1e-9)
    d = optimizer.diagnostics()
    # A tensor that is not compressed has no error; all others have what is left of a = g.
    assert d["compression_error"] == pytest.approx(math.sqrt(squares / whole), rel=1e-6)
    assert d["error_mass"] == pytest.approx(d["compression_error"], rel=1e-6)


def test_the_window_as_a_whole():
    name = names(windowed=True, compression="dense")[0]
    (p,) = parameters([(4, 5)])
    optimizer = make(name, [p], window_size=4, window_momentum=0.5)
    for i, size in enumerate((1.0, 2.0, 4.0)):
        p.grad = torch.zeros_like(p)
        p.grad[0, i] = size
        optimizer.probe_next_step()
        optimizer.step()
    d = optimizer.diagnostics()
    assert d["condition"] == pytest.approx(16) and d["directions"] == pytest.approx((1 + 4 + 16) ** 2 / (1 + 16 + 256))
    ages = [d["weight_age_0"], d["weight_age_1"], d["weight_age_2_3"]]
    assert sum(ages) == pytest.approx(1) and d["weight_newest"] == ages[0]
    assert d["weight_age"] == pytest.approx(ages[1] + 2 * ages[2])


def test_only_the_next_step_is_probed():
    optimizer, params, _ = run(NAMES[0], probed=True)
    assert "gradient_norm" in optimizer.diagnostics()
    set_gradients(params, torch.Generator().manual_seed(9))
    optimizer.step()
    assert "gradient_norm" not in optimizer.diagnostics()
    optimizer.probe_next_step()
    params[1].grad[0, 0] = torch.nan
    step_quietly(optimizer)  # refused
    assert "gradient_norm" not in optimizer.diagnostics()


@pytest.mark.parametrize("name", each(compressed_names()))
def test_stacks_that_are_taken_together(name, monkeypatch):
    pytest.importorskip("numba")
    shapes, found = [(8 + i % 4, 9 + i // 2) for i in range(10)] + [(7,)], []
    for least in (1000, 2):
        monkeypatch.setattr(together, "_MANY", least)
        optimizer, *_ = run(name, probed=True, shapes=shapes, **METRIC)
        assert bool(optimizer.setup().together) == (least == 2)
        found.append(optimizer.diagnostics())
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


def test_a_sample_of_a_large_model_is_enough(monkeypatch):
    wide = [(300, 40), (7,)]
    optimizer, *_ = run(NAMES[0], probed=True, shapes=wide)
    whole = optimizer.diagnostics()
    monkeypatch.setattr(probe, "_SAMPLE", 4000)
    optimizer, *_ = run(NAMES[0], probed=True, shapes=wide)
    sampled = optimizer.diagnostics()
    for q in ("scale_q25", "scale_q50", "scale_q75"):
        assert sampled[q] != whole[q] and sampled[q] == pytest.approx(whole[q], rel=0.1)
    assert sampled["zero_updates"] == whole["zero_updates"]


def test_a_gradient_that_is_zero_has_no_angle():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = hf_efcp.create_optimizer(NAMES[0], [p], lr=1.0, window_size=2)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    p.grad = torch.zeros(3, 4)
    optimizer.probe_next_step()
    optimizer.step()
    d = optimizer.diagnostics()
    assert d["gradient_norm"] == 0 and d["zero_gradients"] == 1
    assert not any(name.startswith(("cosine_update_gradient", "angle", "scale")) for name in d)


@pytest.mark.parametrize("cols", [set(), {0}, {1}, {0, 7}, {6, 35}])
def test_the_stride_over_coordinates_shares_no_divisor_with_columns(cols):
    """An empty tensor has 0 columns, and every number divides 0."""
    stride = probe._stride(7, cols)
    assert 7 <= stride <= 11 and all(math.gcd(stride, number) == 1 for number in cols if number)


@pytest.mark.parametrize("name", each())
def test_a_refused_step_has_no_figures(name, monkeypatch):
    """On a GPU too, where the host does not know that the step was refused."""
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params, lr=LR, window_size=M)
    with pretending("cuda"):
        for t in range(3):
            set_gradients(params, torch.Generator().manual_seed(t))
            optimizer.step()
        params[0].grad[0] = math.nan
        optimizer.probe_next_step()
        step_quietly(optimizer)
        found = optimizer.diagnostics()
    assert found["step"] == 3 and all(map(math.isfinite, found.values()))
    assert not found.keys() & {"gradient_norm", "update_norm_all", "relative_step", "compression_error", "zero_updates"}
