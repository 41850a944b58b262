"""What the tests of `bench` share: a small model with random gradients, and an optimizer that has taken steps on it."""

import torch

from hf_efcp.bench.contenders import Workload
from hf_efcp.engine.phases import PHASES
from tests.cli.helpers import module, optimizer_of
from tests.reference import info

CPU = torch.device("cpu")
LIST = {"a.weight": (64, 48), "a.bias": (48,)}


def phases_of(name):
    """The phases of a step that take time: without a window there are no products of entries and no coefficients."""
    return PHASES if info(name).windowed else ("compress", "update")


def workload(shapes=LIST, dtype=torch.float32):
    return Workload(module(shapes, dtype), CPU)


def started(name, optim_args="", steps=1, shapes=LIST, dtype=torch.float32):
    """An optimizer after some steps, and the workload that it took them on."""
    work = workload(shapes, dtype)
    optimizer = optimizer_of(name, work.model, optim_args)
    for _ in range(steps):
        work.new_gradients()
        optimizer.step()
    return optimizer, work
