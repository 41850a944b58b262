"""In place of torch.cuda.CUDAGraph, without a GPU: a replay calls the recorded operations and kernels, with the same objects.

As in a graph, everything keeps its memory, and whatever the host did between the launches is not done again. An address that is
stale is read where it was.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_efcp.core.deferred import NUMBERS, SIZES, WAITS
from hf_efcp.kernels.devices import pretending

META = torch.device("meta")
# Operations whose results are views, though their schema does not say so.
VIEWS = {"_unsafe_view"}


class RecordedGraph:
    """What was recorded."""

    def __init__(self):
        self.calls = []
        self.replays = 0

    def replay(self):
        """Call all of it again."""
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call()


class _Recorder(TorchDispatchMode):
    """Does nothing but views: results are memory, with NaN in it where that is possible."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name, schema = kwargs or {}, function.overloadpacket.__name__, function._schema
        if name == "lift_fresh" and not args[0].ndim:  # a constant
            return args[0]
        if name in NUMBERS | SIZES | WAITS:
            raise RuntimeError(f"{name} is not permitted while a graph is made")
        if name in VIEWS or any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns):
            return function(*args, **kwargs)
        if schema.is_mutable:
            self.graph.calls.append(lambda: function(*args, **kwargs))
            return kwargs.get("out", args[0]) if schema.returns else None
        there = {"device": META} if any(x.name == "device" for x in schema.arguments) else {}
        result = tree_map(_room, function(*tree_map(_on_meta, args), **{**tree_map(_on_meta, kwargs), **there}))
        self.graph.calls.append(lambda: _copy(result, function(*args, **kwargs)))
        return result


def _on_meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META) if isinstance(x, Tensor) else x


def _room(x):
    if not isinstance(x, Tensor):
        return x
    room = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return room.fill_(torch.nan) if x.is_floating_point() else room.zero_()


def _copy(old, new):
    for to, x in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(x, Tensor):
            to.copy_(x)


@contextlib.contextmanager
def recorded(graph, **options):
    """Record operations and kernels inside: in place of torch.cuda.graph."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(executor, *args, **kwargs):
        graph.calls.append(lambda: launch(executor, *args, **kwargs))

    GridExecutor.__call__ = launched
    try:
        with _Recorder(graph):
            yield
    finally:
        GridExecutor.__call__ = launch


@contextlib.contextmanager
def graphs(monkeypatch, wanted=True):
    """Take steps by recorded graphs inside, or on the way to one which is never made; gives the list of those that are made."""
    made = []

    def make():
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setenv("HF_EFCP_CUDA_GRAPH", "1")
    monkeypatch.setattr("hf_efcp.engine.graph._MOST", 8 if wanted else 0)
    monkeypatch.setattr("hf_efcp.kernels.calls.FAILED", set())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    with pretending("cuda"):
        yield made
    from hf_efcp.kernels import calls

    assert not calls.FAILED
