"""10,000 steps: nothing grows, nothing drifts."""

import psutil
import pytest
import torch

from tests.reference import NAMES, make, parameters, set_gradients, window

STEPS = 10_000


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_steps(name):
    params, generator = parameters([(6, 9), (5,)]), torch.Generator().manual_seed(1)
    optimizer = make(name, params, window_size=8, rank=1) if "lowrank" in name else make(name, params, window_size=8)
    optimizer.param_groups[0]["lr"] = 1e-6
    process, early = psutil.Process(), None
    for t in range(STEPS):
        set_gradients(params, generator)
        optimizer.step()
        if t == 1000:
            early = process.memory_info().rss, optimizer.memory_footprint()
    assert optimizer.memory_footprint() == early[1]
    assert process.memory_info().rss - early[0] < 8 * 2**20
    assert optimizer.diagnostics()["step"] == STEPS
    g = window(optimizer, params)
    gram = optimizer.state[params[0]]["gram"]
    assert ((gram - g @ g.T).norm() / gram.norm()).item() < 1e-12
