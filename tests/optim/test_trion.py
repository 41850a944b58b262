"""Trion against dense fp64 numbers made from its specification, and against torch's Muon at full rank."""

import math

import pytest
import torch
from torch import nn

from hf_efcp import OptionError
from hf_efcp.optim import Trion
from tests.core.test_dct import summed
from tests.core.test_newton_schulz import recursion
from tests.optim.test_ldadamw import gradient, parameter
from tests.reference import error, relative

MU, LR, WD, RANK = 0.95, 0.02, 0.1, 4
SHAPES = [(12, 30), (30, 12), (9, 9)]
SIZES = {
    "kj": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "none": lambda rows, cols: 1.0,
    "kimi": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "dion": lambda rows, cols: math.sqrt(rows / cols),
}


class Oracle:
    """Steps 1 to 7 for a long x short matrix; the polar factor by the recursion of the singular values."""

    def __init__(self, w, rank, size, mu=MU, ell=1, schedule="muon"):
        self.w, self.r, self.size, self.mu, self.ell, self.schedule = w.clone(), rank, size, mu, ell, schedule
        self.d, self.m = summed(w.shape[1]), torch.zeros_like(w)

    def step(self, g):
        b = self.m + g
        s = b @ self.d
        q = self.d[:, torch.linalg.vector_norm(s, self.ell, dim=0).topk(self.r).indices]
        h = b @ q
        self.m = b - (1 - self.mu) * h @ q.T
        u, values, vt = torch.linalg.svd(h, full_matrices=False)
        self.o = u * recursion(values, self.schedule) @ vt @ q.T
        self.w = (1 - LR * WD) * self.w - LR * self.size * self.o


OPTIONS = {
    "default": ({}, {}),
    "2-norm": ({"ell_norm": 2, "momentum": 0.5}, {"ell": 2, "mu": 0.5}),
    "none": ({"scaling_type": "none", "ns_schedule": "dion"}, {"schedule": "dion"}),
    "kimi": ({"scaling_type": "kimi", "dct_method": "fft"}, {}),
    "dion": ({"scaling_type": "dion", "adjust_lr_fn": "match_rms_adamw"}, {}),
}


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_are_those_of_the_specification(shape, key):
    options, traits = OPTIONS[key]
    left, p = shape[0] < shape[1], parameter(shape)
    size = SIZES[options.get("scaling_type", "kj")](*shape)
    size *= math.sqrt(min(shape) / RANK) if "adjust_lr_fn" in options else 1.0
    oracle = Oracle(p.detach().T if left else p.detach(), RANK, size, **traits)
    optimizer = Trion([p], lr=LR, weight_decay=WD, rank=RANK, **options)
    for step in range(50):
        p.grad = gradient(shape, step) + 0.1 * p.detach()
        oracle.step(p.grad.T if left else p.grad)
        optimizer.step()
        m = optimizer.state[p]["error"]
        assert relative(m.T if left else m, oracle.m) < 1e-10
        assert relative(p.detach().T if left else p.detach(), oracle.w) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_muon_without_nesterov(shape):
    """As torch has it, whose Newton-Schulz is in bf16: the same to its rounding. M is mu times the momentum, exactly."""
    muon = pytest.importorskip("torch.optim._muon").Muon  # from torch 2.9 on
    p, q = parameter(shape, dtype=torch.float32), parameter(shape, dtype=torch.float32)
    optimizer = Trion([p], lr=LR, weight_decay=WD, rank=100)
    reference = muon([q], lr=LR, weight_decay=WD, momentum=MU, nesterov=False)
    start, momentum = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for step in range(10):
        g = gradient(shape, step)
        momentum = MU * momentum + g
        for one in (p, q):
            one.grad = g.float()
        optimizer.step()
        reference.step()
        assert relative(optimizer.state[p]["error"].double(), MU * momentum) < 1e-5
    assert relative(p.detach() - start, q.detach() - start) < 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_is_nearly_orthonormal_and_every_direction_is_served_in_the_end(shape):
    """For a constant gradient: what is not chosen grows until it is."""
    p, g = nn.Parameter(torch.zeros(shape, dtype=torch.float64)), gradient(shape, 0)
    optimizer = Trion([p], lr=1.0, rank=RANK, scaling_type="none")
    before, served = p.detach().clone(), 0
    for _ in range(250):
        p.grad = g
        optimizer.step()
        u, before = before - p.detach(), p.detach().clone()
        values = torch.linalg.svdvals(u)
        assert (values[:RANK] > 0.1).all() and (values < 1.3).all() and (values[RANK:] < 1e-6).all()
        side = u if shape[0] >= shape[1] else u.T
        served = served + (side @ summed(min(shape))).norm(dim=0)
    assert (served > 0.5).all()


FORMATS = [({}, 1e-6), ({"error_dtype": "bf16"}, 5e-3), ({"error_format": "int8"}, 2e-2), ({"error_format": "int4"}, 0.3)]


@pytest.mark.parametrize(("options", "bound"), FORMATS, ids=str)
def test_small_formats_of_the_momentum_lose_their_rounding_only(options, bound):
    """At full rank M = mu (M + g)."""
    p, momentum = parameter((24, 300), dtype=torch.float32), torch.zeros(24, 300, dtype=torch.float64)
    optimizer = Trion([p], lr=LR, rank=100, momentum=0.5, **options)
    for step in range(10):
        p.grad = gradient(p.shape, step).float()
        momentum = 0.5 * (momentum + p.grad)
        optimizer.step()
    assert relative(error(optimizer, p).view(p.shape), momentum) < bound


@pytest.mark.parametrize("rates", [(LR, LR), (LR, LR / 2)], ids=["one rate", "two rates"])
def test_embeddings_heads_and_vectors_have_adamw_at_their_own_rate(rates):
    groups = [
        {"params": [parameter((12, 30), i)], "kind": kind, "lr": rates[i % 2]} for i, kind in enumerate(["embedding", "head"])
    ]
    groups += [{"params": [parameter((7,), 2)], "lr": rates[0]}, {"params": [parameter((7,), 3)], "lr": rates[1]}]
    optimizer = Trion(groups, lr=LR, weight_decay=WD, adam_lr_ratio=0.1)
    others = [{"params": [nn.Parameter(p.detach().clone()) for p in g["params"]], "lr": 0.1 * g["lr"]} for g in groups]
    reference = torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), eps=1e-10, weight_decay=WD)
    for step in range(5):
        for group in optimizer.param_groups + reference.param_groups:
            (p,) = group["params"]
            p.grad = gradient(p.shape, step)
        optimizer.step()
        reference.step()
    for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
        torch.testing.assert_close(group["params"][0], other["params"][0], rtol=1e-12, atol=1e-14)


def test_a_scaling_that_is_none_of_the_four_is_refused():
    with pytest.raises(OptionError, match=r"scaling_type='kimmi'.*kj or none or kimi or dion"):
        Trion([parameter((12, 30))], lr=LR, scaling_type="kimmi")


def test_bytes_are_those_of_the_specification():
    """M like the parameter, and a count of steps: as many as Muon holds."""
    p = parameter((768, 3072), dtype=torch.bfloat16)
    held = Trion([p], lr=LR, error_dtype="bf16").memory_footprint()
    assert held["error"] == 2 * p.numel() and sum(held.values()) - held["error"] < 100
