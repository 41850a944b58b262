"""LDAdamW against dense fp64 numbers made from its specification, without anything of the engine, and its invariants."""

import pytest
import torch
from torch import nn

from hf_efcp.optim import LDAdamW
from tests.reference import relative

B1, B2, EPS, RHO, LR, WD = 0.908, 0.99, 1e-8, 0.908, 0.02, 0.1
KAPPA = B1 / (1 - B1)
SHAPES = [(12, 30), (30, 12), (9, 9)]
SIDES = ["std", "reverse_std", "left", "right"]


def is_left(shape, proj_type):
    return {"std": shape[0] <= shape[1], "reverse_std": shape[0] > shape[1]}.get(proj_type, proj_type == "left")


class Oracle:
    """Steps 1 to 8 for a short x long matrix; the projection is from the left."""

    def __init__(self, w, rank, feedback=True, rho=RHO, method="power_iteration"):
        self.w, self.r, self.feedback, self.rho, self.method = w.clone(), rank, feedback, rho, method
        self.e, self.t = torch.zeros_like(w), 0
        self.p = w.new_zeros(w.shape[0], rank)
        self.m = self.v = w.new_zeros(rank, w.shape[1])

    def step(self, g):
        self.t += 1
        t, p0, m0, v0 = self.t, self.p, self.m, self.v
        a = g + self.e
        c1, c2 = 1 - B1 ** (t - 1), 1 - B2 ** (t - 1)
        if t == 1:
            p = torch.linalg.svd(a)[0][:, : self.r]
        else:
            b = self.rho * p0 @ m0 / c1 + (1 - self.rho) * a
            p = torch.linalg.svd(b)[0][:, : self.r] if self.method == "svd" else torch.linalg.qr(b @ (b.T @ p0))[0]
        h = p.T @ a
        turn = p.T @ p0
        m1, v1 = turn @ m0, v0
        if self.feedback:
            self.e = a - p @ h + KAPPA * (p0 @ m0 - p @ m1)
        if t > 1:
            v1 = c2 * (turn**2 @ (v0 / c2 - (m0 / c1) ** 2) + (m1 / c1) ** 2).abs()
        self.p, self.m, self.v = p, B1 * m1 + (1 - B1) * h, B2 * v1 + (1 - B2) * h**2
        self.before, self.after = a + KAPPA * p0 @ m0, (h, m1)
        u = p @ ((self.m / (1 - B1**t)) / ((self.v / (1 - B2**t)).sqrt() + EPS))
        self.w = (1 - LR * WD) * self.w - LR * u


def parameter(shape, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def gradient(shape, step, rank=None):
    generator = torch.Generator().manual_seed(100 + step)
    if rank is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    left = torch.randn(shape[0], rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)


def build(params, rank=4, **options):
    return LDAdamW(params, lr=LR, weight_decay=WD, rank=rank, **options)


def seen(optimizer, p, left):
    """P (short, r), m, v (r, long) and e (short, long) of the state."""
    state = optimizer.state[p]
    e = state["error"] if "error" in state else torch.zeros(p.shape, dtype=torch.float64)
    return state["projector"], state["exp_avg"], state["exp_avg_sq"], e if left else e.T


@pytest.mark.parametrize("options", [{}, {"error_feedback": False}, {"proj_method": "svd"}], ids=str)
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_are_those_of_the_specification(shape, proj_type, options):
    left, p = is_left(shape, proj_type), parameter(shape)
    w = p.detach() if left else p.detach().T
    oracle = Oracle(w, 4, options.get("error_feedback", True), method=options.get("proj_method", "power_iteration"))
    optimizer = build([p], proj_type=proj_type, **options)
    for step in range(50):
        p.grad = gradient(shape, step) + 0.1 * p.detach()
        oracle.step(p.grad if left else p.grad.T)
        optimizer.step()
        projector, m, v, e = seen(optimizer, p, left)
        signs = (projector * oracle.p).sum(0).sign()  # a basis is fixed up to signs
        assert relative(projector * signs, oracle.p) < 1e-10
        assert relative(m * signs[:, None], oracle.m) < 1e-10
        assert relative(v, oracle.v) < 1e-10
        assert torch.linalg.norm(e - oracle.e) <= 1e-10 * p.grad.norm()
        assert relative(p.detach() if left else p.detach().T, oracle.w) < 1e-10


# Invariants ---------------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "full rank": lambda shape, step: gradient(shape, step),
    "rank 2": lambda shape, step: gradient(shape, step, 2),
    "zero": lambda shape, step: torch.zeros(shape, dtype=torch.float64),
    "first zero": lambda shape, step: gradient(shape, step) * (step > 2),
    "then zero": lambda shape, step: gradient(shape, step) * (step < 2),
    "rank 2, then more": lambda shape, step: gradient(shape, step, 2 if step < 6 else None),
    "one number": lambda shape, step: torch.arange(shape[0] * shape[1]).view(shape).eq(20).double(),
}
DTYPES = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])


@DTYPES
@pytest.mark.parametrize("rank", [4, 100], ids=["rank 4", "full rank"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_what_is_true_of_every_step(kind, shape, rank, dtype, bound):
    """P^T P = 1; v >= 0; e + P h + k P m' = a + k P0 m0: nothing is lost. At full rank e = 0 and T is orthogonal."""
    left, p = is_left(shape, "std"), parameter(shape, dtype=dtype)
    optimizer = build([p], rank=rank, weight_decay_mode="decoupled")
    before = None
    for step in range(12):
        g = GRADIENTS[kind](shape, step)
        p.grad = g.to(dtype)
        optimizer.step()
        if not optimizer.state[p]["step"]:  # zero gradients on empty state are no step
            continue
        projector, m, v, e = (x.double() for x in seen(optimizer, p, left))
        one = torch.eye(projector.shape[1], dtype=torch.float64)
        p0, m0, e0 = before or (torch.zeros_like(projector), torch.zeros_like(m), torch.zeros_like(e))
        turn = projector.T @ p0
        m1 = turn @ m0
        h = (m - B1 * m1) / (1 - B1)
        a = e0 + (g if left else g.T)
        scale = 1 + a.norm() + KAPPA * m0.norm()
        torch.testing.assert_close(projector.T @ projector, one, rtol=0, atol=10 * bound)
        torch.testing.assert_close(
            e + projector @ h + KAPPA * projector @ m1, a + KAPPA * p0 @ m0, rtol=0, atol=float(100 * bound * scale)
        )
        assert (v >= 0).all() and p.isfinite().all()
        if rank == 100:
            assert e.norm() <= 100 * bound * scale
            if before:
                torch.testing.assert_close(turn.T @ turn, one, rtol=0, atol=10 * bound)
        before = projector.clone(), m.clone(), e.clone()


def test_zero_gradients_move_nothing_but_what_decays():
    p = parameter((12, 30))
    optimizer = build([p, q := parameter((5,))])
    start = p.detach().clone()
    for _ in range(3):
        p.grad, q.grad = torch.zeros_like(p), torch.ones_like(q)
        optimizer.step()
    torch.testing.assert_close(p.detach(), start * (1 - LR * WD) ** 3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_error_vanishes_where_all_gradients_share_a_column_space(shape):
    left, p = is_left(shape, "std"), parameter(shape)
    optimizer = build([p])
    for step in range(60):
        g = gradient(sorted(shape), step, 4)
        p.grad = g if left else g.T.contiguous()
        optimizer.step()
    assert seen(optimizer, p, left)[3].norm() < 1e-6 * p.grad.norm()


def test_a_fixed_subspace_without_feedback_has_adamw():
    """rho = 1 follows the momentum alone: of rank 1, P stays as the first gradient made it, up to its sign."""
    p = parameter((12, 30))
    optimizer = build([p], rank=1, rho=1.0, error_feedback=False)
    first = torch.linalg.svd(gradient(p.shape, 0))[0][:, :1]
    small = nn.Parameter(first.T @ p.detach())
    reference = torch.optim.AdamW([small], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD)
    for step in range(30):
        p.grad = gradient(p.shape, step)
        small.grad = first.T @ p.grad
        optimizer.step()
        reference.step()
    assert relative(first.T @ p.detach(), small.detach()) < 1e-10
    rest = parameter((12, 30)).detach() * (1 - LR * WD) ** 30
    torch.testing.assert_close(p.detach() - first @ first.T @ p.detach(), rest - first @ first.T @ rest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("proj_method", ["power_iteration", "svd"])
def test_tensors_that_join_a_stack_later_begin_by_their_own_first_gradient(proj_method):
    shape, together = (12, 30), [parameter((12, 30), i) for i in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer, others = build(together, proj_method=proj_method), [build([p], proj_method=proj_method) for p in alone]
    for step in range(12):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = gradient(shape, 10 * step + i) if (step + i) % 3 else None
            q.grad = p.grad
        optimizer.step()
        for other in others:
            other.step()
    for p, q in zip(together, alone, strict=True):
        assert relative(p.detach(), q.detach()) < 1e-12


FORMATS = [({"error_dtype": "bf16"}, 0.01), ({"error_format": "int8"}, 0.01), ({"error_format": "int4"}, 0.12)]


@pytest.mark.parametrize(("options", "bound"), FORMATS, ids=str)
def test_small_formats_of_the_error_stay_near_exact_ones(options, bound):
    def moved(**options):
        p = parameter((24, 300), dtype=torch.float32)
        start, optimizer = p.detach().clone(), build([p], **options)
        for step in range(50):
            p.grad = (gradient(p.shape, step, 8) + 0.3 * gradient(p.shape, step)).float()
            optimizer.step()
        return p.detach() - start

    exact = moved()
    assert relative(moved(**options), exact) < bound
    assert relative(moved(error_feedback=False), exact) > bound


# Which tensors --------------------------------------------------------------------------------------------------------------


def test_embeddings_heads_and_vectors_have_adamw_unless_their_group_says_otherwise():
    kinds = ["embedding", "head", "matrix", None]
    groups = [{"params": [parameter((12, 30), i)], **({"kind": kind} if kind else {})} for i, kind in enumerate(kinds)]
    groups += [{"params": [parameter((12, 30), 4)], "compress": False}, {"params": [parameter((7,), 5)]}]
    optimizer = build(groups)
    same = nn.Parameter(parameter((12, 30), 0).detach())
    reference = torch.optim.AdamW([same], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD)
    for step in range(5):
        for group in optimizer.param_groups + reference.param_groups:
            (p,) = group["params"]
            p.grad = gradient(p.shape, step)
        optimizer.step()
        reference.step()
    low_rank = ["projector" in optimizer.state[g["params"][0]] for g in optimizer.param_groups]
    assert low_rank == [False, False, True, True, False, False]
    torch.testing.assert_close(groups[0]["params"][0], same, rtol=1e-13, atol=1e-15)


def test_bytes_are_those_of_the_specification():
    """4 (2 r long + r short) for P and both moments, and 2 for each entry of the error, of fp32 parameters."""
    p = parameter((768, 3072), dtype=torch.float32)
    held = LDAdamW([p], lr=LR, error_dtype="bf16").memory_footprint()
    assert held["projector"] + held["exp_avg"] + held["exp_avg_sq"] == 4 * (2 * 16 * 3072 + 16 * 768)
    assert held["error"] == 2 * p.numel()
    assert sum(held.values()) - held["error"] < 0.19 * p.numel()
    assert "error" not in LDAdamW([p], lr=LR, error_feedback=False).memory_footprint()
