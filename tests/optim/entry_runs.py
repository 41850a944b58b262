"""Runs whose optimizer.state somebody changes, of ours and of torch's AdamW."""

import pytest
import torch

from tests.optim.helpers import M, fresh, train
from tests.reference import NAMES, parameters

ADAMW = "torch's AdamW"
WITH_CONTROL = pytest.mark.parametrize("name", [*NAMES, ADAMW])
OPTIONS = {"momentum": 0.5, "metric": "factored", "error_dtype": "bf16"}


def start(name, steps=M + 2, **options):
    params = parameters(dtype=torch.float32)
    optimizer = torch.optim.AdamW(params, lr=0.01) if name == ADAMW else fresh(name, params, **{**OPTIONS, **options})
    train(optimizer, params, 0, steps)
    return optimizer, params


def each(change):
    """A change of every entry of some parameters: (dict, name, tensor) -> None."""

    def changed(state, params):
        for p in params:
            for name, t in list(state[p].items()):
                change(state[p], name, t)

    return changed


def move(t):
    t.data = t.data.clone()


def exchange(state, params):
    state[params[0]], state[params[1]] = state[params[1]], state[params[0]]


def exchange_values(state, params):
    values = [{name: t.clone() for name, t in state[p].items()} for p in params[:2]]
    for p, other in zip(params[:2], reversed(values), strict=True):
        for name, t in state[p].items():
            t.copy_(other[name])


nothing = each(lambda entry, name, t: None)
zero = each(lambda entry, name, t: t.zero_())
# What is done, and what it has to be equal to: the same written in place.
KINDS = {
    "replaced by copies": (each(lambda entry, name, t: entry.update({name: t.clone()})), nothing),
    "replaced by views": (each(lambda entry, name, t: entry.update({name: t.detach()})), nothing),
    "moved in place": (each(lambda entry, name, t: move(t)), nothing),
    "zeros": (each(lambda entry, name, t: entry.update({name: torch.zeros_like(t)})), zero),
    "zeroed": (zero, each(lambda entry, name, t: entry.update({name: torch.zeros_like(t)}))),
    "halved": (each(lambda entry, name, t: entry.update({name: t / 2}) if t.ndim and t.is_floating_point() else None),
               each(lambda entry, name, t: t.div_(2) if t.ndim and t.is_floating_point() else None)),
    "popped": (lambda state, params: [state.pop(p) for p in params], zero),
    "emptied": (lambda state, params: [state[p].clear() for p in params], zero),
}  # fmt: skip
WHICH = {"the first": [0], "one of a stack": [1], "alone in its shape": [3], "all": range(7)}
