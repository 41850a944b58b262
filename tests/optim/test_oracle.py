"""The update against brute force on the stored window, past the ring's wrap-around."""

import pytest
import torch

from tests.reference import NAMES, make, mfac_oracle, parameters, relative, row, set_gradients, update_of, window

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_mfac_matches_the_dense_solve(name, dtype, norm):
    params, generator = parameters(dtype=dtype), torch.Generator().manual_seed(1)
    m, damping = 5, 1e-6
    optimizer = make(name, params, window_size=m, damping=damping)
    for t in range(3 * m):
        set_gradients(params, generator, norm)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        assert relative(u, mfac_oracle(g, g[t % m], damping, m, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(50,), (10, 6), (4, 3, 2, 2)], ids=["1-D", "2-D", "4-D"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_one_tensor(name, dtype, shape):
    params, generator = parameters([shape], dtype), torch.Generator().manual_seed(1)
    optimizer = make(name, params, window_size=4, damping=1e-3)
    for t in range(9):
        set_gradients(params, generator)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        assert relative(u, mfac_oracle(g, g[t % 4], 1e-3, 4, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_scope_layer_solves_each_tensor_alone(name, dtype):
    params, generator = parameters(dtype=dtype), torch.Generator().manual_seed(1)
    m, damping = 4, 1e-4
    optimizer = make(name, params, window_size=m, damping=damping, scope="layer")
    for t in range(3 * m):
        set_gradients(params, generator)
        u = update_of(optimizer, params).split([p.numel() for p in params])
        for p, u_p in zip(params, u, strict=True):
            g = torch.stack([row(optimizer, p, i) for i in range(m)])
            assert relative(u_p, mfac_oracle(g, g[t % m], damping, m, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_window_momentum_preconditions_the_decayed_sum_of_rows(name):
    params, generator = parameters(), torch.Generator().manual_seed(1)
    m, beta = 5, 0.8
    optimizer = make(name, params, window_size=m, damping=1e-4, window_momentum=beta)
    for t in range(3 * m):
        set_gradients(params, generator)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        x = sum((1 - beta) * beta**age * g[(t - age) % m] for age in range(min(t + 1, m)))
        assert relative(u, mfac_oracle(g, x, 1e-4, m, torch.float64)) < 1e-9


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_update_rms_is_the_rms_of_the_whole_update(name, scope):
    params, generator = parameters(), torch.Generator().manual_seed(1)
    raw, scaled = (make(name, params, window_size=4, damping=1e-4, scope=scope, update_rms=rms) for rms in (None, 0.3))
    for _ in range(6):
        set_gradients(params, generator)
        u, v = update_of(raw, params), update_of(scaled, params)
        assert v.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-9)
        assert relative(v / v.norm(), u / u.norm()) < 1e-9


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("mfac")])
def test_dependent_rows(name, dtype):
    """m > d, and the same gradient again and again: only directions in the window's span may move."""
    params, generator = parameters([(4, 3), (2,)], dtype), torch.Generator().manual_seed(1)
    m, damping = 32, 1e-7
    optimizer = make(name, params, window_size=m, damping=damping)
    for t in range(3 * m):
        if t % 3 != 2:
            set_gradients(params, generator)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        # Until the rows span R^d with room to spare, the problem itself is ill-conditioned.
        tolerance = 1e-6 if t > 26 else TOLERANCE[dtype]
        assert relative(u, mfac_oracle(g, g[t % m], damping, m, dtype)) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
def test_repeated_gradients(dtype):
    params, generator = parameters(dtype=dtype), torch.Generator().manual_seed(1)
    pool = [set_gradients(params, generator) for _ in range(3)]
    optimizer = make("efcp_dense_mfac", params, window_size=8, damping=1e-9)
    for t in range(24):
        for p, g in zip(params, pool[t % 3], strict=True):
            p.grad = g
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        assert relative(u, mfac_oracle(g, g[t % 8], 1e-9, 8, dtype)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gram_matrix_is_that_of_the_stored_rows(name):
    params, generator = parameters(dtype=torch.float32), torch.Generator().manual_seed(1)
    optimizer = make(name, params, window_size=5)
    for _ in range(13):
        set_gradients(params, generator)
        optimizer.step()
    g = window(optimizer, params)
    torch.testing.assert_close(optimizer.state[params[0]]["gram"], g @ g.T, rtol=1e-12, atol=1e-14)
