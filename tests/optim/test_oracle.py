"""The update against brute force on the stored window, three windows long: every method, every option that changes it."""

import pytest
import torch

from tests.reference import (
    ggt_oracle,
    info,
    make,
    mfac_oracle,
    names,
    parameters,
    relative,
    row,
    set_gradients,
    update_of,
    window,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
MFAC = pytest.mark.parametrize("name", names(family="mfac"))
GGT = pytest.mark.parametrize("name", names(family="ggt"))
EVERY = pytest.mark.parametrize("name", names(windowed=True))
M = 5


def oracle(name, g, x, dtype, m):
    """Default oracle of a method: damping 1e-6, or eps 1e-5, no decay."""
    return mfac_oracle(g, x, 1e-6, m, dtype) if info(name).family == "mfac" else ggt_oracle(g, x, 1e-5, dtype)


def steps(optimizer, params, count=3 * M, norm=1.0):
    """Run `count` steps on random gradients; yields (t, u, G) after each."""
    generator = torch.Generator().manual_seed(1)
    for t in range(count):
        set_gradients(params, generator, norm)
        u = update_of(optimizer, params)
        yield t, u, window(optimizer, params)


@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
@DTYPES
@EVERY
@pytest.mark.usefixtures("kernels")
def test_update_matches_the_dense_solve(name, dtype, norm):
    params = parameters(dtype=dtype)
    for t, u, g in steps(make(name, params, window_size=M), params, norm=norm):
        assert relative(u, oracle(name, g, g[t % M], dtype, M)) < TOLERANCE[dtype]


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-7, 1e-9])
@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
@DTYPES
@MFAC
def test_damping(name, dtype, norm, damping):
    params = parameters(dtype=dtype)
    for t, u, g in steps(make(name, params, window_size=M, damping=damping), params, norm=norm):
        assert relative(u, mfac_oracle(g, g[t % M], damping, M, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(50,), (10, 6), (4, 3, 2, 2)], ids=["1-D", "2-D", "4-D"])
@DTYPES
@EVERY
def test_one_tensor(name, dtype, shape):
    params = parameters([shape], dtype)
    for t, u, g in steps(make(name, params, window_size=M), params):
        assert relative(u, oracle(name, g, g[t % M], dtype, M)) < TOLERANCE[dtype]


@DTYPES
@EVERY
def test_scope_layer_solves_each_tensor_alone(name, dtype):
    params = parameters(dtype=dtype)
    optimizer = make(name, params, window_size=M, scope="layer")
    for t, u, _ in steps(optimizer, params):
        for p, u_p in zip(params, u.split([p.numel() for p in params]), strict=True):
            g = torch.stack([row(optimizer, p, i) for i in range(M)])
            assert relative(u_p, oracle(name, g, g[t % M], dtype, M)) < TOLERANCE[dtype]


@DTYPES
@EVERY
def test_window_momentum_preconditions_the_decayed_sum_of_rows(name, dtype):
    params, beta = parameters(dtype=dtype), 0.8
    for t, u, g in steps(make(name, params, window_size=M, window_momentum=beta), params):
        x = sum((1 - beta) * beta**age * g[(t - age) % M] for age in range(min(t + 1, M)))
        assert relative(u, oracle(name, g, x, dtype, M)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "options", [{"damping_mode": "relative"}, {"divisor": "filled"}, {"damping_mode": "relative", "divisor": "filled"}]
)
@DTYPES
@MFAC
def test_damping_mode_and_divisor(name, dtype, options):
    params, damping = parameters(dtype=dtype), 1e-3
    for t, u, g in steps(make(name, params, window_size=M, damping=damping, **options), params):
        filled = min(t + 1, M)
        scale = g.square().sum(1)[:filled].mean() if "damping_mode" in options else 1.0
        expected = mfac_oracle(g, g[t % M], damping * scale, filled if "divisor" in options else M, dtype)
        assert relative(u, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("beta2", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("eps", [1e-2, 1e-8])
@DTYPES
@GGT
def test_ggt_decays_the_rows_on_both_sides(name, dtype, eps, beta2, beta1):
    params = parameters(dtype=dtype)
    for t, u, g in steps(make(name, params, window_size=M, eps=eps, beta1=beta1, beta2=beta2), params):
        ages = torch.tensor([(t - i) % M for i in range(M)], dtype=torch.float64)
        x = ((1 - beta1) * beta1**ages if beta1 else (ages == 0).double()) @ g
        assert relative(u, ggt_oracle(beta2 ** ages[:, None] * g, x, eps, dtype)) < TOLERANCE[dtype]


def test_ggt_forgets_rows_that_decay_has_made_tiny():
    params = parameters()
    for t, u, g in steps(make("efcp_dense_ggt", params, window_size=40, beta2=0.3), params, 60):
        ages = torch.tensor([(t - i) % 40 for i in range(40)], dtype=torch.float64)
        assert relative(u, ggt_oracle(0.3 ** ages[:, None] * g, g[t % 40], 1e-5, torch.float64)) < 1e-6


@EVERY
def test_momentum_after_preconditioning(name):
    params, mu = parameters(), 0.7
    v = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for t, u, g in steps(make(name, params, window_size=M, momentum=mu), params):
        v = mu * v + (1 - mu) * oracle(name, g, g[t % M], torch.float64, M)
        assert relative(u, v) < 1e-9


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@EVERY
def test_weight_decay(name, mode):
    """Decoupled: p <- (1 - lr wd) p - lr u. l2: as a run whose gradients are g + wd p."""
    lr, wd = 0.1, 0.3
    params, plain = parameters(), parameters()
    decayed = make(name, params, lr=lr, weight_decay=wd, weight_decay_mode=mode, window_size=M, update_rms=0.1)
    reference = make(name, plain, lr=lr, window_size=M, update_rms=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3 * M):
        grads = set_gradients(params, generator)
        for p, g in zip(plain, grads, strict=True):
            p.grad = g + wd * p.detach() if mode == "l2" else g
            if mode == "decoupled":
                before = p.detach().clone()
                p.data.mul_(1 - lr * wd)
                assert not torch.equal(before, p)
        decayed.step()
        reference.step()
        for p, g, q in zip(params, grads, plain, strict=True):
            assert torch.equal(p.grad, g)
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scope", ["model", "layer"])
@EVERY
def test_update_rms_is_the_rms_of_the_whole_update(name, scope):
    params, generator = parameters(), torch.Generator().manual_seed(1)
    raw, scaled = (make(name, params, window_size=4, scope=scope, update_rms=rms) for rms in (None, 0.3))
    for _ in range(6):
        set_gradients(params, generator)
        u, v = update_of(raw, params), update_of(scaled, params)
        assert v.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-9)
        assert relative(v / v.norm(), u / u.norm()) < 1e-9


@pytest.mark.parametrize("options", [{"window_dtype": "bf16"}, {"window_dtype": "fp64"}, {"error_dtype": "bf16"}])
@EVERY
def test_state_dtypes_change_the_rows_not_the_mathematics(name, options):
    """K and the update follow from the rows as stored, so the oracle on them is as close as ever."""
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params, window_size=M, **options)
    for t, u, g in steps(optimizer, params):
        assert relative(u, oracle(name, g, g[t % M], torch.float32, M)) < 2e-5
    dtypes = {key: {entry[key].dtype for entry in optimizer.state.values() if key in entry} for key in ("window_rows", "error")}
    if "window_dtype" in options:
        assert dtypes["window_rows"] == {torch.bfloat16 if options["window_dtype"] == "bf16" else torch.float64}
    if "error_dtype" in options:
        assert dtypes["error"] == ({torch.bfloat16} if info(name).compression != "dense" else set())


@DTYPES
@EVERY
def test_dependent_rows(name, dtype):
    """m > d, and the same gradient again and again: only directions in the window's span may move."""
    params, generator = parameters([(4, 3), (2,)], dtype), torch.Generator().manual_seed(1)
    m, options = 32, {"damping": 1e-7} if info(name).family == "mfac" else {}
    optimizer = make(name, params, window_size=m, **options)
    for t in range(3 * m):
        if t % 3 != 2:
            set_gradients(params, generator)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        expected = mfac_oracle(g, g[t % m], 1e-7, m, dtype) if options else ggt_oracle(g, g[t % m], 1e-5, dtype)
        # Until the rows span R^d with room to spare, the problem itself is ill-conditioned.
        assert relative(u, expected) < (1e-6 if t > 26 else TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["efcp_dense_mfac", "efcp_dense_ggt"])
@DTYPES
def test_repeated_gradients(name, dtype):
    params, generator = parameters(dtype=dtype), torch.Generator().manual_seed(1)
    pool = [set_gradients(params, generator) for _ in range(3)]
    optimizer = make(name, params, window_size=8)
    for t in range(24):
        for p, g in zip(params, pool[t % 3], strict=True):
            p.grad = g
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        assert relative(u, oracle(name, g, g[t % 8], dtype, 8)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"window_dtype": "bf16"}], ids=["plain", "bf16"])
@EVERY
def test_gram_matrix_is_that_of_the_stored_rows(name, options):
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params, window_size=M, **options)
    for _, _, g in steps(optimizer, params):
        torch.testing.assert_close(optimizer.state[params[0]]["gram"], g @ g.T, rtol=1e-12, atol=1e-14)
