"""MicroAdam beside its specification: dense, in fp64, without anything of the engine (arXiv 2405.15593)."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from hf_efcp import MicroAdam
from hf_efcp.core.codecs import MinMaxQuantizer
from hf_efcp.kernels import calls
from tests.reference import parameters, relative

EXACT = {"error_format": "plain", "window_dtype": None}
RUN = 256  # numbers that share two bounds


class Reference:
    """MicroAdam of one tensor.

    a = e + g;  c = the largest of each block of a;  e = a without them;  W = the last m c, the newest first
    u = m / (sqrt(v) + eps) + alpha e;  e <- (1 - alpha) e;  p <- (1 - lr wd) p - lr u
    """

    def __init__(
        self, p, m, density, block, betas=(0.9, 0.999), alpha=0.0, corrected=False, bits=None, ring=torch.float64, lr=0.1, wd=0.1
    ):
        self.p = p.detach().double().clone()
        self.m, self.density, self.block, self.betas, self.alpha, self.corrected = m, density, block, betas, alpha, corrected
        self.store = (lambda e: e) if bits is None else four_bits
        self.ring, self.lr, self.wd = ring, lr, wd
        self.rows = self.p.reshape(len(self.p) if self.p.ndim > 1 else 1, -1)
        self.e, self.w, self.t = torch.zeros_like(self.rows), [], 0

    def step(self, g):
        (b1, b2), self.t = self.betas, self.t + 1
        a = self.e + g.double().reshape(self.rows.shape)
        kept = torch.zeros_like(a, dtype=torch.bool)
        for row in range(len(a)):
            for start in range(0, a.shape[1], self.block):
                part = a[row, start : start + self.block]
                kept[row, start + part.abs().topk(max(1, round(self.density * len(part)))).indices] = True
        self.w = [(a * kept).to(self.ring).double(), *self.w][: self.m]
        self.e = self.store(a * ~kept)
        count = min(self.t, self.m) if self.corrected else self.t
        m = sum(b1**i * c for i, c in enumerate(self.w)) * (1 - b1) / (1 - b1**count)
        v = sum(b2**i * c * c for i, c in enumerate(self.w)) * (1 - b2) / (1 - b2**count)
        u = m / (v.sqrt() + 1e-8)
        if self.alpha:
            u = u + self.alpha * self.e
            self.e = self.store((1 - self.alpha) * self.e)
        self.rows.mul_(1 - self.lr * self.wd).sub_(self.lr * u)


def bf16_down(x):
    """The largest bf16 number <= x."""
    y = torch.tensor(x, dtype=torch.float64).bfloat16()
    return y if y.double() <= x else torch.nextafter(y, torch.tensor(-math.inf, dtype=torch.bfloat16))


def four_bits(e):
    out = torch.empty_like(e)
    for row in range(len(e)):
        for start in range(0, e.shape[1], RUN):
            x = e[row, start : start + RUN]
            lo, hi = bf16_down(x.min().item()).double(), -bf16_down(-x.max().item()).double()
            u = (hi - lo) / 15
            code = torch.zeros_like(x) if u == 0 else ((x - lo) / u + 0.5).floor().clamp(0, 15)
            out[row, start : start + RUN] = code * u + lo
    return out


SHAPES = ((12, 30), (12, 30), (7,), (8, 3, 3, 3), (2, 300), (41, 11), (1,))


@pytest.mark.parametrize("on", ["0", "1"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_three_windows_are_those_of_the_dense_method(bits, corrected, alpha, on, monkeypatch):
    """Also with four bits and a ring in bf16: rounding is to nearest, so that nothing is left to chance."""
    monkeypatch.setenv("HF_EFCP_KERNELS", on)
    monkeypatch.setattr(calls, "FAILED", set())
    params = parameters(SHAPES)
    stored = EXACT if bits is None else {}
    options = {"window_size": 5, "density": 0.1, "block_size": 16, "window_bias_correction": corrected, "alpha": alpha, **stored}
    optimizer = MicroAdam(params, lr=0.1, weight_decay=0.1, **options)
    ring = torch.float64 if bits is None else torch.bfloat16
    references = [Reference(p, 5, 0.1, 16, alpha=alpha, corrected=corrected, bits=bits, ring=ring) for p in params]
    generator = torch.Generator().manual_seed(1)
    for step in range(16):
        for i, (p, reference) in enumerate(zip(params, references, strict=True)):
            if step == 7 and i == 1:  # a tensor that is not there does not advance
                p.grad = None
                continue
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + p.detach()
            reference.step(p.grad)
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert relative(p.detach().flatten(), reference.p.flatten()) < 1e-10
        assert optimizer.state[p]["step"] == reference.t
    assert not calls.FAILED or not importlib.util.find_spec("numba")


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_at_density_1_the_first_window_is_adamw_and_the_next_step_is_not():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer = MicroAdam(ours, lr=0.1, weight_decay=0.1, density=1.0, window_size=6, **EXACT)
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    for step in range(7):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        adamw.step()
        apart = max(relative(p, q) for p, q in zip(ours, theirs, strict=True))
        assert apart < 1e-12 if step < 6 else apart > 1e-3, step


@pytest.mark.parametrize(
    ("window", "steps", "growth"),
    [(10, 10, 1.0), (10, 50, 1.45), (10, 100, 2.01), (10, 500, 4.10), (10, 1000, 5.19), (10, 20_000, 6.53), (20, 20_000, 6.24)],
)
def test_how_far_the_references_updates_outgrow_adams(window, steps, growth):
    """A constant gradient, whose update Adam gives length 1; window_bias_correction gives it length 1 too."""
    for corrected, expected in ((False, growth), (True, 1.0)):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = MicroAdam([p], lr=1.0, window_size=window, window_bias_correction=corrected, **EXACT)
        p.grad = torch.ones_like(p)
        for _ in range(window):
            optimizer.step()
        optimizer.state[p]["step"].fill_(steps - 1)
        p.data.zero_()
        optimizer.step()
        assert abs(-p.item() - expected) < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [1, 2, 7, 255, 256, 257, 513])
def test_the_quantizer_is_off_by_half_a_step_at_most(cols, dtype):
    generator = torch.Generator().manual_seed(cols)
    x = (
        torch.randn(3, 4, cols, generator=generator, dtype=torch.float64).to(dtype)
        * torch.tensor([1e-20, 1.0, 1e20])[:, None, None]
    )
    quantizer = MinMaxQuantizer(dtype)
    codes, bounds = quantizer.encode(x)
    assert (codes.shape[1:], bounds.shape[1:]) == quantizer.shapes(4, cols)
    assert (codes.dtype, bounds.dtype) == (torch.uint8, torch.bfloat16)
    runs = torch.arange(cols) // RUN
    lo, hi = bounds.to(dtype)[..., runs, :].unbind(-1)
    assert (lo <= x).all() and (x <= hi).all()
    half = (hi - lo) / 30
    assert ((quantizer.decode(codes, bounds, cols) - x).abs() <= half * (1 + 1e-5) + hi.abs() * torch.finfo(dtype).eps).all()
    assert ((hi - lo) <= (x.amax() - x.amin()) * 10 + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_numbers_zeros_and_the_largest_and_what_is_not_finite(dtype):
    quantizer, top = MinMaxQuantizer(dtype), torch.finfo(dtype).max
    for number in (0.0, 1.5, -3.0):
        x = torch.full((1, 1, 9), number, dtype=dtype)
        assert torch.equal(quantizer.decode(*quantizer.encode(x), 9), x)
    large = torch.tensor([[[-top, 0.0, top]]], dtype=dtype)
    assert quantizer.decode(*quantizer.encode(large), 3).isfinite().all()
    small = torch.tensor([[[0.0, 1e-45, -1e-44]]], dtype=dtype)
    assert quantizer.decode(*quantizer.encode(small), 3).abs().max() < 1e-38
    for bad in (torch.nan, torch.inf):
        assert quantizer.decode(*quantizer.encode(torch.tensor([[[1.0, bad]]], dtype=dtype)), 2).isnan().all()


def test_every_code_comes_back():
    """Sixteen numbers, one for each code, at an odd length: even and odd positions."""
    x = torch.cat([torch.arange(16.0), torch.arange(15.0)])[None, None]
    quantizer = MinMaxQuantizer(torch.float32)
    assert torch.equal(quantizer.decode(*quantizer.encode(x), 31), x)


def test_a_gradient_of_zeros_moves_nothing():
    params = parameters(SHAPES, torch.float32)
    optimizer = MicroAdam(params, lr=0.1)
    gradients(params[:1], 0)
    for p in params[1:]:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert all(t.isfinite().all() for p in params for t in optimizer.state[p].values() if t.is_floating_point())


BERT = [(30522, 768), (512, 768), (2, 768), *[(768, 768)] * 48, *[(3072, 768)] * 12, *[(768, 3072)] * 12]
BERT += [*[(768,)] * 98, *[(3072,)] * 12, (768, 768), (768,), (2, 768), (2,)]


def test_bert_base_takes_at_most_0_95_bytes_per_parameter():
    params = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in BERT]
    size = sum(MicroAdam(params, lr=1e-4).estimate_footprint().values())
    assert 0.9 < size / sum(p.numel() for p in params) <= 0.95


@pytest.mark.slow
def test_bert_base_measured():
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in BERT]
    optimizer = MicroAdam(params, lr=1e-4)
    held = optimizer.memory_footprint()
    assert held == optimizer.estimate_footprint()
    assert sum(held.values()) <= 0.95 * sum(p.numel() for p in params)


def test_a_dtype_that_is_given_makes_the_error_plain():
    (p,) = parameters(((4, 6),), torch.float32)
    assert MicroAdam([p], lr=0.1, error_dtype="bf16").options.error_format == "plain"
    assert MicroAdam([p], lr=0.1).options.error_format == "minmax4"
    assert MicroAdam([p], lr=0.1, error_dtype="bf16", error_format="int8").options.error_format == "int8"
