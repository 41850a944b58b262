"""Every windowed method beside the slow reference optimizer: parameters and K at each of 50 steps."""

import pytest
import torch

from tests.optim.helpers import clones
from tests.reference import each, info, make, names, parameters, relative
from tests.reference_optimizer import ReferenceOptimizer

STEPS, M = 50, 7  # the window wraps seven times
LR = 0.01
AFTER = {"update_rms": 0.1, "weight_decay": 0.3, "momentum": 0.7}


def gradients_at(t, params):
    """A part of rank 2 that stays, twice as large as noise, and a little of the parameter.

    Of noise alone no subspace stands out, and power iteration carries rounding errors of 1e-16 to 1e-9 within 50 steps.
    """
    lasting, fresh = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + t)
    for p in params:
        rows = len(p) if p.ndim > 1 else 1
        left, right = (torch.randn(*s, generator=lasting, dtype=p.dtype) for s in ((rows, 2), (2, p.numel() // rows)))
        noise = torch.randn(p.shape, generator=fresh, dtype=p.dtype)
        p.grad = (2 * (left @ right).view(p.shape) + noise + 0.1 * p.detach()) / 30


@pytest.mark.parametrize(
    "options",
    [{}, {"window_momentum": 0.8}, AFTER, {"scope": "layer"}, {"scope": "layer", "window_momentum": 0.8, **AFTER}],
    ids=str,
)
@pytest.mark.parametrize("name", each(names(windowed=True)))
def test_fifty_steps_are_those_of_the_reference(name, options):
    params = parameters()
    fast = make(name, params, lr=LR, window_size=M, **options)
    decay = fast.param_groups[0]["weight_decay"]
    traits = {"family": info(name).family, "compression": info(name).compression}
    slow = ReferenceOptimizer(clones(params), **traits, lr=LR, weight_decay=decay, **vars(fast.options))
    for t in range(STEPS):
        for optimizer, theirs in ((fast, params), (slow, slow.params)):
            gradients_at(t, theirs)
            optimizer.step()
        for p, expected in zip(params, slow.params, strict=True):
            assert relative(p, expected) < 1e-10, t
        grams = [fast.state[p]["gram"] for p in params if "gram" in fast.state[p]]
        for K, G in zip(grams, slow.windows, strict=True):
            assert relative(K, G @ G.T) < 1e-10, t
