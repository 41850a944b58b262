"""DCT-AdamW against dense fp64 numbers made from its specification, without anything of the engine, and its invariants."""

import math

import pytest
import torch
from torch import nn

from hf_efcp.optim import DCTAdamW
from tests.core.test_dct import summed
from tests.optim.test_ldadamw import GRADIENTS, gradient, parameter
from tests.reference import error, relative

B1, B2, EPS, LR, WD, RANK = 0.9, 0.999, 1e-3, 0.02, 0.1, 4
SHAPES = [(12, 30), (30, 12), (9, 9)]


class Oracle:
    """Steps 1 to 7 for a long x short matrix; moments are turned by the product of both bases."""

    def __init__(self, w, rank, feedback=True, ell=1, interval=1, rotate=True, size=1.0):
        self.w, self.r, self.feedback, self.ell, self.interval, self.rotate = w.clone(), rank, feedback, ell, interval, rotate
        self.d, self.size, self.t = summed(w.shape[1]), size, 0
        self.e, self.m = torch.zeros_like(w), w.new_zeros(len(w), rank)
        self.v, self.index = self.m, None

    def step(self, g):
        self.t, a = self.t + 1, g + self.e
        before = self.index
        if self.t == 1 or self.t % self.interval == 0:
            self.index = torch.linalg.vector_norm(a @ self.d, self.ell, dim=0).topk(self.r).indices.sort().values
        q = self.d[:, self.index]
        h = a @ q
        if self.feedback:
            self.e = a - h @ q.T
        if self.rotate and before is not None:
            turn = self.d[:, before].T @ q
            self.m, self.v = self.m @ turn, (self.v @ turn).abs()
        self.m, self.v = B1 * self.m + (1 - B1) * h, B2 * self.v + (1 - B2) * h**2
        root = math.sqrt(1 - B2**self.t)
        u = self.m / (self.v.sqrt() + EPS * root) * root / (1 - B1**self.t)
        self.w = (1 - LR * WD) * self.w - LR * self.size * u @ q.T


OPTIONS = {
    "default": ({}, {}),
    "no feedback, 2-norm": ({"error_feedback": False, "ell_norm": 2}, {"feedback": False, "ell": 2}),
    "interval": ({"update_interval": 5}, {"interval": 5}),
    "slots": ({"rotate": False, "dct_method": "fft"}, {"rotate": False}),
    "size": ({"adjust_lr_fn": "match_rms_adamw"}, {"size": None}),
}


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_are_those_of_the_specification(shape, key):
    options, traits = OPTIONS[key]
    left, p = shape[0] < shape[1], parameter(shape)
    if "size" in traits:
        traits = {"size": math.sqrt(min(shape) / RANK)}
    oracle = Oracle(p.detach().T if left else p.detach(), RANK, **traits)
    optimizer = DCTAdamW([p], lr=LR, weight_decay=WD, rank=RANK, eps=EPS, **options)
    for step in range(50):
        p.grad = gradient(shape, step) + 0.1 * p.detach()
        oracle.step(p.grad.T if left else p.grad)
        optimizer.step()
        state = optimizer.state[p]
        assert state["indices"].tolist() == oracle.index.tolist()
        assert relative(state["exp_avg"], oracle.m) < 1e-10
        assert relative(state["exp_avg_sq"], oracle.v) < 1e-10
        e = state.get("error", torch.zeros(shape, dtype=torch.float64))
        assert torch.linalg.norm((e.T if left else e) - oracle.e) <= 1e-10 * p.grad.norm()
        assert relative(p.detach().T if left else p.detach(), oracle.w) < 1e-10


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("rank", [RANK, 100], ids=["rank 4", "full rank"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_what_is_true_of_every_step(kind, rank, dtype, bound):
    """e + h D_i^T = a: nothing is lost; indices ascend; v >= 0; at full rank e = 0, and an Adam step is never of noise."""
    for shape in SHAPES:
        p = parameter(shape, dtype=dtype)
        optimizer = DCTAdamW([p], lr=LR, rank=rank)
        d, m0, e0, i0 = summed(min(shape)), None, None, None
        for step in range(10):
            g = GRADIENTS[kind](shape, step)
            p.grad, old = g.to(dtype), p.detach().double().clone()
            optimizer.step()
            state = {name: x.double().clone() for name, x in optimizer.state[p].items()}
            if not state["step"]:  # zero gradients on empty state are no step
                continue
            i = state["indices"].long()
            assert (i.diff() > 0).all() and (state["exp_avg_sq"] >= 0).all() and p.isfinite().all()
            left = shape[0] < shape[1]
            g, e = (x.T if left else x for x in (g, state["error"]))
            m1 = torch.zeros_like(state["exp_avg"]) if m0 is None else m0 @ d[:, i0].T @ d[:, i]
            h = (state["exp_avg"] - B1 * m1) / (1 - B1)
            a = g if e0 is None else g + e0
            scale = 1 + a.norm() + m1.norm()
            torch.testing.assert_close(e + h @ d[:, i].T, a, rtol=0, atol=float(100 * bound * scale))
            if rank == 100:
                assert e.norm() <= 100 * bound * scale
            assert (p.detach().double() - old).abs().max() < 10 * LR
            m0, e0, i0 = state["exp_avg"], e, i


def test_rounding_errors_of_a_gradient_along_one_column_make_no_step():
    p = nn.Parameter(torch.zeros(30, 12))
    optimizer = DCTAdamW([p], lr=1.0, rank=RANK)
    p.grad = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 12) * 0.1
    optimizer.step()
    assert torch.linalg.matrix_norm(p.detach() - p.detach().mean(1, keepdim=True)) < 1e-4 * p.detach().norm()


def test_full_rank_without_feedback_is_adamw_on_the_turned_matrix():
    p = parameter((30, 12))
    optimizer = DCTAdamW([p], lr=LR, weight_decay=WD, rank=100, eps=EPS, error_feedback=False)
    turned = nn.Parameter(p.detach() @ summed(12))
    reference = torch.optim.AdamW([turned], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD)
    for step in range(30):
        p.grad = gradient(p.shape, step)
        turned.grad = p.grad @ summed(12)
        optimizer.step()
        reference.step()
    assert relative(p.detach() @ summed(12), turned.detach()) < 1e-10


@pytest.mark.parametrize("interval", [1, 3])
def test_tensors_that_join_a_stack_later_begin_by_their_own_first_gradient(interval):
    shape, options = (12, 30), {"lr": LR, "rank": RANK, "update_interval": interval}
    together = [parameter(shape, i) for i in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer, others = DCTAdamW(together, **options), [DCTAdamW([p], **options) for p in alone]
    for step in range(12):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = gradient(shape, 10 * step + i) if (step + i) % 3 else None
            q.grad = p.grad
        for one in (optimizer, *others):
            one.step()
    for p, q in zip(together, alone, strict=True):
        assert relative(p.detach(), q.detach()) < 1e-12


FORMATS = [({}, 1e-6), ({"error_dtype": "bf16"}, 5e-3), ({"error_format": "int8"}, 2e-2), ({"error_format": "int4"}, 0.25)]


@pytest.mark.parametrize(("options", "bound"), FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(24, 300), (300, 24)], ids=str)
def test_nothing_is_lost_but_what_the_format_of_the_error_rounds(shape, options, bound):
    """Without momentum m is h, so that what was taken out of the gradients is known: its sum and e are the gradients' sum."""
    p = parameter(shape, dtype=torch.float32)
    optimizer = DCTAdamW([p], lr=LR, rank=6, beta1=0.0, **options)
    taken, given = torch.zeros(2, *shape, dtype=torch.float64)
    for step in range(30):
        p.grad = gradient(shape, step, 8).float()
        optimizer.step()
        state, given = optimizer.state[p], given + p.grad
        c = state["exp_avg"].double() @ summed(24)[:, state["indices"].long()].T
        taken += c.T if shape[0] < shape[1] else c
    lost = relative(taken + error(optimizer, p).view(shape), given)
    assert lost < bound and (not options or lost > 1e-6)


def test_moments_in_bf16_stay_near_exact_ones():
    def moved(**options):
        p = parameter((24, 300), dtype=torch.float32)
        start, optimizer = p.detach().clone(), DCTAdamW([p], lr=LR, rank=6, error_feedback=False, **options)
        for step in range(50):
            p.grad = gradient(p.shape, step, 8).float()
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == optimizer.options.moment_dtype
        return p.detach() - start

    assert 0 < relative(moved(moment_dtype="bf16"), moved(moment_dtype="fp32")) < 0.01


def llama_shapes():
    """Llama-3.2-1B without its embeddings."""
    layer = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [*layer * 16, (2048,)]


def test_bytes_are_those_of_the_specification():
    """Moments 2 * 2 * r * long, indices 4 r, errors of a byte and 4 bytes for each 256: 1.57 bytes a parameter in all."""
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in llama_shapes()]
    held = DCTAdamW(params, lr=LR, rank=256, error_format="int8", moment_dtype="bf16").estimate_footprint()
    matrices = [p for p in params if p.ndim == 2]
    number = sum(p.numel() for p in params)
    assert held["indices"] == 4 * 256 * len(matrices)
    vectors = 2 * 4 * sum(p.numel() for p in params if p.ndim == 1)
    assert held["exp_avg"] + held["exp_avg_sq"] == 2 * 2 * 256 * sum(max(p.shape) for p in matrices) + vectors
    assert held["error"] == sum(p.numel() + 4 * p.numel() // 256 for p in matrices)
    assert sum(held.values()) / number < 1.58
