"""DASH against Shampoo of single blocks from the paper, in fp64."""

import pytest
import torch

from hf_efcp import DASH, OptionError
from hf_efcp.core.cells import Layout
from hf_efcp.core.inverse_roots import InverseRoot
from hf_efcp.optim.dash import Blocks
from tests.reference import parameters, relative

SHAPES = ((9, 21), (21, 9), (5, 5), (4, 3, 2, 2), (7,), ())
STEPS = 50


def root_of(x, p, eps):
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag((values + 2 * eps - min(values[0] + eps, 0)) ** (-1 / p)) @ vectors.T


class Block:
    """One block as the paper has it; options by name."""

    def __init__(self, o):
        self.o, self.left, self.right, self.m, self.v, self.buffer, self.t = o, 0, 0, 0, 0, 0, 0

    def direction(self, g):
        o, self.t = self.o, self.t + 1
        b1, b2, b = o["beta1"], o["beta2"], o["shampoo_beta"]
        old, new = (1, 1) if b == 1 else (b, 1 - b)
        self.left, self.right = old * self.left + new * g @ g.T, old * self.right + new * g.T @ g
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        grafted = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + o["eps"])
        if self.t < o["start"]:
            p = grafted
        else:
            if self.t == o["start"] or self.t % o["interval"] == 0:
                self.roots = [root_of(x, 4, o["root_eps"]) for x in (self.left, self.right)]
            p = self.roots[0] @ self.m @ self.roots[1]
            p = p * grafted.norm() / (p.norm() + 1e-16)
        if not o["mu"]:
            return p
        self.buffer = o["mu"] * self.buffer + p
        return p + o["mu"] * self.buffer if o["nesterov"] else self.buffer


def slices(length, most):
    """Equal parts of at most `most`, the last one what is left."""
    size = -(-length // -(-length // most))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


class Oracle:
    """Steps of matrices, block by block in a loop."""

    def __init__(self, params, o):
        self.params, self.o, self.blocks = params, o, {}

    def step(self, gradients, lr, decay):
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            if p.ndim < 2:
                continue
            g2, p2 = g.reshape(len(g), -1), p.view(len(p), -1)
            p2.mul_(1 - lr * decay)
            for rows in slices(g2.shape[0], self.o["block"]):
                for cols in slices(g2.shape[1], self.o["block"]):
                    block = self.blocks.setdefault((i, rows.start, cols.start), Block(self.o))
                    p2[rows, cols] -= lr * block.direction(g2[rows, cols])


CASES = [
    {},
    {"shampoo_beta": 1.0, "inverse_root_interval": 1},
    {"momentum": 0.5, "start_preconditioning_step": 4},
    {"momentum": 0.5, "nesterov": False, "beta1": 0.0},
    {"block_size": 30, "inverse_root_interval": 7, "start_preconditioning_step": 5},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_fifty_steps_are_those_of_the_blocks_one_by_one(options):
    options = {"block_size": 8, "inverse_root_interval": 3, "root_eps": 1e-6, **options}
    params = parameters(SHAPES)
    optimizer = DASH(params, lr=0.01, weight_decay=0.1, **options)
    o = optimizer.options
    oracle = Oracle(
        [p.detach().clone() for p in params],
        {
            "beta1": o.beta1,
            "beta2": o.beta2,
            "eps": o.eps,
            "shampoo_beta": o.shampoo_beta,
            "start": o.start_preconditioning_step,
            "interval": o.inverse_root_interval,
            "root_eps": o.root_eps,
            "mu": o.momentum,
            "nesterov": o.nesterov,
            "block": o.block_size,
        },
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        oracle.step(gradients, 0.01, 0.1)
    for p, expected in zip(params, oracle.params, strict=True):
        if p.ndim > 1:
            assert relative(p.detach(), expected) < 1e-10


@pytest.mark.parametrize("method", ["newton", "newton_db", "chebyshev"])
def test_other_roots_take_nearly_the_same_steps(method):
    """On gradients of an easy spectrum, after which the roots of L and R are near to those by eigenvectors."""

    def end(**options):
        params = parameters(((8, 8), (8, 16)))
        before = [p.detach().clone() for p in params]
        optimizer = DASH(params, lr=0.01, block_size=8, inverse_root_interval=1, start_preconditioning_step=10, **options)
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        return torch.cat([(p.detach() - q).flatten() for p, q in zip(params, before, strict=True)])

    bound = {"newton": 1e-5, "newton_db": 1e-5, "chebyshev": 0.05}[method]
    eps = {"root_eps": 1e-6} if method == "chebyshev" else {}
    assert relative(end(root_method=method, newton_steps=15, **eps), end()) < bound


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_turned_gradients_make_turned_directions(shape):
    """U(O1 G O2^T) = O1 U(G) O2^T: the update without its grafting."""
    generator = torch.Generator().manual_seed(3)
    o1, o2 = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in shape)
    gradients = torch.randn(5, *shape, generator=generator, dtype=torch.float64)

    def direction(turn):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = DASH([p], lr=1.0, inverse_root_interval=1, root_eps=1e-8)
        for g in gradients:
            before, p.grad = p.detach().clone(), turn(g)
            optimizer.step()
        u = before - p.detach()
        return u / u.norm()

    assert relative(direction(lambda g: o1 @ g @ o2.T), o1 @ direction(lambda g: g) @ o2.T) < 1e-8


@pytest.mark.parametrize("method", ["eigh", "newton", "newton_db", "chebyshev"])
def test_zeros_move_nothing(method):
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = DASH([p], lr=0.1, root_method=method, block_size=3)
    for step in range(3):
        p.grad = torch.zeros(6, 4) if step < 2 else torch.cat([torch.zeros(3, 4), torch.ones(3, 4)])
        optimizer.step()
    assert torch.equal(p[:3].detach(), torch.ones(3, 4))
    assert (p[3:] < 1).all() and p.isfinite().all()


def test_a_tensor_that_joins_late_has_its_first_root_at_once():
    both = parameters(((4, 6), (4, 6)), dtype=torch.float32)
    optimizer = DASH(both, lr=0.01, inverse_root_interval=10)
    for step in range(4):
        both[0].grad = torch.ones(4, 6)
        both[1].grad = torch.ones(4, 6) if step >= 2 else None
        before = both[1].detach().clone()
        optimizer.step()
        assert torch.equal(both[1].detach(), before) == (step < 2)
    assert all(optimizer.state[p]["left_root"].abs().sum() > 0 for p in both)


@pytest.mark.parametrize(
    ("shape", "most", "expected"),
    [
        ((1536, 768), 1024, (768, 768, 2, 1)),
        ((3072, 768), 1024, (1024, 768, 3, 1)),
        ((10, 7), 4, (4, 4, 3, 2)),
        ((9, 1), 4, (3, 1, 3, 1)),
    ],
)
def test_blocks_are_as_large_as_each_other(shape, most, expected):
    b = Blocks(Layout(*shape, torch.float32), most)
    assert (b.height, b.width, b.down, b.across) == expected
    x = torch.arange(2.0 * shape[0] * shape[1]).view(2, *shape)
    assert torch.equal(b.joined(b.cut(x), *shape), x)


def test_a_root_that_is_not_finite_is_not_taken(monkeypatch):
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = DASH([p], lr=0.1, inverse_root_interval=1)
    p.grad = torch.eye(4)
    optimizer.step()
    roots = optimizer.state[p]["left_root"].clone()
    monkeypatch.setattr(InverseRoot, "__call__", lambda self, x, p: torch.full_like(x, torch.nan))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["left_root"], roots) and p.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"root_eps": 0.0},
        {"root_eps": 0.0, "root_method": "chebyshev"},
        {"root_method": "evd"},
        {"shampoo_beta": 0.0},
        {"block_size": 0},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        DASH(parameters(((4, 4),)), lr=0.1, **options)
