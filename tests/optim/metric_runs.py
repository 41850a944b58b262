"""Short runs of the fast optimizers beside the slow reference of the metric."""

import warnings

import pytest
import torch

from tests.optim.helpers import clones
from tests.reference import info, make, names, parameters
from tests.reference_metric import matrix, reference_of

M = 5
# 0-D to 4-D; twice the same (a batch of two); tall, wide, too thin to compress.
SHAPES = ((), (7,), (6, 10), (6, 10), (12, 5), (4, 3, 2), (3, 2, 2, 3), (3, 4))
METRICS = pytest.mark.parametrize("metric", ["tensor", "diagonal", "factored"])
LOSSY = {"sparse": {"density": 0.3, "block_size": 4}, "low rank": {"rank": 2}, "dense": {}}

# What every run has unless it says otherwise.
COMMON = {
    **{"lr": 0.01, "weight_decay": 0.0, "weight_decay_mode": "decoupled", "window_size": M, "window_momentum": 0.0},
    **{"momentum": 0.0, "scope": "model", "update_rms": None, "metric": "factored", "metric_beta": 0.9, "metric_eps": 1e-3},
    **{"window_nesterov": False, "centered": False, "rms_mode": "constant", "residual": "feedback"},
}
FAMILY = {
    "mfac": {"damping": 1e-2, "damping_mode": "absolute", "divisor": "window"},
    "ggt": {"eps": 1e-2, "eps_mode": "absolute", "beta1": 0.0, "beta2": 1.0},
}
MFAC_OPTIONS = [
    {},
    {"damping_mode": "relative", "damping": 0.1},
    {"divisor": "filled"},
    {"damping_mode": "relative", "damping": 0.1, "divisor": "filled", "update_rms": 0.3, "window_nesterov": True},
]


def name_of(family, compression):
    """The optimizer of a family with a compression."""
    return names(family=family, compression=compression)[0]


def options_of(family, **given):
    """All options of the reference for a run without kernels, formats and processes."""
    compressors = {"density": 0.3, "block_size": 4, "rank": 2}
    return {**COMMON, **FAMILY[family], **compressors, **given}


def gradients_at(t, params, events=False):
    """A part of rank 2 that stays, twice as large as noise, and a little of the parameter; the tensors differ in size.

    Of noise alone no subspace stands out, and power iteration carries rounding errors of 1e-16 to 1e-9 within a run.
    With events: tensors without a gradient, tensors whose first gradients are zero, and a step that is refused.
    """
    lasting, fresh = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + t)
    for i, p in enumerate(params):
        rows = len(p) if p.ndim > 1 else 1
        left, right = (torch.randn(*s, generator=lasting, dtype=torch.float64) for s in ((rows, 2), (2, p.numel() // rows)))
        noise = torch.randn(p.shape, generator=fresh, dtype=torch.float64)
        g = (2 * (left @ right).view(p.shape) + noise + 0.1 * p.detach()) * 3.0 ** -(i % 4)
        p.grad = g.to(p.dtype)
    if events:
        for i in (3, 4, 5):  # a matrix of a batch of two; a compressed one; and from the first step on
            params[i].grad = None if (t + i) % 4 == 1 else params[i].grad
        params[0].grad = None if t == 0 or t in (M, M + 1) else params[0].grad
        for i in (1, 6):
            params[i].grad *= t > 3
        if t == M + 2:
            params[2].grad.view(-1)[3] = torch.nan


def beside_reference(name, shapes=SHAPES, **options):
    """A fast optimizer and the slow one, each with parameters of its own."""
    params = parameters(shapes)
    theirs = {key: value for key, value in options.items() if key in info(name).options()}
    fast = make(name, params, **{**LOSSY[info(name).compression], **theirs})
    return fast, params, reference_of(fast, clones(params), info(name).family, info(name).compression)


def step_together(fast, params, slow, bound=1e-9):
    """Copy the gradients to the slow one, let both step, and compare each tensor's move with the reference's.

    Gives the fast one's p before less p after, (rows, cols) each: u where lr is 1 and nothing decays.
    """
    for p, q in zip(params, slow.params, strict=True):
        q.grad = None if p.grad is None else p.grad.double().clone()
    before, theirs = clones(params), clones(slow.params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*not finite", RuntimeWarning)
        fast.step()
    slow.step()
    moves = []
    for i, (p, b, q, c) in enumerate(zip(params, before, slow.params, theirs, strict=True)):
        move, expected = (p - b).detach().double(), (q - c).detach()
        assert (move - expected).norm() <= bound * expected.norm() + 1e-13, f"tensor {i}: {move.norm()} and {expected.norm()}"
        moves.append(-matrix(move))
    return moves
