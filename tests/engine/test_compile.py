"""torch.compile of what a step computes, in one graph: nothing in it reads numbers of the device, or asks anew what is built.

On the way that a GPU takes, in plain torch. `optimizer.step()` itself is no part of a compiled training step, as torch's are not.
"""

import pytest
import torch

from hf_efcp.engine.setup import RATE
from hf_efcp.kernels.devices import pretending
from tests.reference import make, names, parameters, set_gradients

METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "residual": "momentum", "error_dtype": "bf16"}
# A vector, a batch of two, one that is too thin to compress.
SHAPES = ((7,), (6, 10), (6, 10), (3, 4))
STEPS = 5


def run(name, options, compiled):
    """Take steps with the rate on the device; the first two, after which nothing is new, are not compiled."""
    torch._dynamo.reset()
    with pretending("cuda"), torch.no_grad():
        params = parameters(SHAPES, dtype=torch.float32)
        optimizer = make(name, params, window_size=3, update_rms=0.5, **{"lr": 0.01, **options})
        rates = [torch.tensor(0.01) for _ in optimizer.param_groups]
        generator = torch.Generator().manual_seed(0)
        setup = optimizer.setup()

        def step():
            groups = [{**group, RATE: rate} for group, rate in zip(optimizer.param_groups, rates, strict=True)]
            optimizer.method.step(setup, groups, optimizer.options)

        taken = torch.compile(step, backend=counting(graphs := []), fullgraph=True)
        for t in range(STEPS):
            set_gradients(params, generator)
            rates[0].fill_(0.01 / (1 + t))
            (taken if compiled and t >= 2 else step)()
        return torch.cat([p.detach().flatten() for p in params]), len(graphs)


def counting(graphs):
    """The backend "eager", which tells how many graphs it was given."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "momentum": 0.5}, METRIC], ids=str)
@pytest.mark.parametrize("name", names(family="mfac"))
def test_a_step_is_one_graph(name, options, monkeypatch):
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")
    expected, none = run(name, options, False)
    result, graphs = run(name, options, True)
    assert none == 0
    assert graphs == 1  # one for all steps: the rate is no constant
    assert torch.equal(result, expected)
