"""A step as a CUDA graph: the host launches one graph instead of hundreds of kernels.

HF_EFCP_CUDA_GRAPH=0 turns graphs off. HF_EFCP_CUDA_GRAPH=1 asks for graphs, and the log says why a step has none. Otherwise a
model has graphs if its trained parameters are small compared with the GPU's memory, because a graph keeps a step's temporaries.

A graph repeats its launches on the same memory. Parameters and state stay where they are. Gradients may be at another place in
each step (`zero_grad(set_to_none=True)`), so nothing in a graph may depend on their place:

- Kernels find gradients by tables of addresses, which belong to the graph and are rewritten before each replay.
- Operations of torch read copies of gradients at a fixed place, which are made before each replay.

A trial tells which gradients need copies: a usual step in which each operation of torch is watched. An operation that waits for
the device rules out a graph. The trial is the second step in a row with the same key. The third step makes the graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.deferred import NUMBERS, SIZES, WAITS
from ..distributed.placement import Alone
from ..kernels.devices import kind
from ..kernels.tables import Spans, Tables
from ..options import OptionError
from .method import Group, Method
from .phases import listener
from .setup import RATE, Setup

_log = logging.getLogger("hf_efcp")
# The most graphs of an optimizer: after so many, something other than gradients changes all the time.
_MOST = 8
# The share of a GPU's memory that trained parameters may take for a graph that nobody asks for.
_SMALL = 1 / 40
# Operations that only make a view. All other operations, other views included, count as reading.
_VIEWS = {"view", "detach", "alias"}
# In a trial, tables of addresses still come from the host.
_STOPS = (NUMBERS | SIZES | WAITS) - {"lift_fresh"}
# The keys of a group that a step reads, besides the rate, which is on the device.
_READ = "weight_decay", "compress", "kind"


class StepGraph:
    """The graph of an optimizer's steps."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._trial: _Trial | None = None
        self._graph: _Graph | None = None
        self._made = 0
        self._rates: list[Tensor] = []
        self._rates_for: tuple | None = None
        self._said: set[str] = set()
        self._level = logging.DEBUG

    def step(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> None:
        """Take a step, by a graph where a graph is wanted and possible.

        Where it is possible, every step reads its rate on the device: a run gives the same bits whenever its graph is made.
        """
        asked = os.environ.get("HF_EFCP_CUDA_GRAPH") or None
        if asked == "0":
            return method.step(setup, groups, options)
        if asked not in (None, "1"):
            raise OptionError(f"HF_EFCP_CUDA_GRAPH={asked!r}: must be 0 or 1")
        self._level = logging.WARNING if asked == "1" else logging.DEBUG
        if (reason := _unfit(method, setup) or (_large(setup) if asked != "1" else None)) is not None:
            self._say(reason)
            return method.step(setup, groups, options)
        own = self._with_rates(setup, groups)
        if not self._step(method, setup, own, options):
            method.step(setup, own, options)

    def _step(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> bool:
        """Take a step by a graph, or by the trial for one; tell whether a step was taken."""
        if listener() is not contextlib.nullcontext or setup.probe is not None:  # a graph has no phases
            return False
        gradients = _gradients(setup)
        key = _key(setup, groups, options, gradients)
        if key != self._key:
            self._graph, self._trial, self._key = None, None, key
            return False
        if self._trial is None:
            self._trial = _Trial(method, setup, groups, options)
            return True
        if self._graph is None and not self._make(self._trial, method, setup, groups, options):
            return False
        assert self._graph is not None
        self._graph.replay(gradients)
        torch.autograd.graph.increment_version([setup.params[i] for i in gradients])
        return True

    def _make(self, trial: _Trial, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> bool:
        """Make the graph; tell whether there is one now."""
        if self._made >= _MOST:
            self._say(f"the step has changed too often: after {_MOST} graphs, no more graphs are made")
            return False
        if trial.stops:
            self._say(f"a step waits for the device, in {', '.join(sorted(trial.stops))}")
            return False
        self._made += 1
        device = setup.counters.step.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            self._graph = _Graph(trial, method, setup, groups, options)
        except Exception as error:  # from CUDA's libraries or kernels: the step can be taken as usual
            self._made = _MOST
            lost = "What the attempt took of the GPU's memory may not come back; HF_EFCP_CUDA_GRAPH=0 attempts none"
            self._say(f"{type(error).__name__}: {error}. {lost}", logging.WARNING)
            if stream is not None:
                torch.cuda.set_stream(stream)  # after a capture that fails, torch leaves its own stream current
            return False
        return True

    def _with_rates(self, setup: Setup, groups: Sequence[Group]) -> list[Group]:
        """Give the groups with their rates on the device."""
        made_for = weakref.ref(setup), len(groups)
        if self._rates_for != made_for:
            self._rates = [torch.zeros((), dtype=setup.dtype, device=setup.counters.step.device) for _ in groups]
            self._rates_for = made_for
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(float(group["lr"]))
        return [{**group, RATE: rate} for group, rate in zip(groups, self._rates, strict=True)]

    def _say(self, reason: str, level: int | None = None) -> None:
        """Log once why there is no graph."""
        if reason not in self._said:
            _log.log(level or self._level, "no CUDA graph of a step: %s", reason)
            self._said.add(reason)


class _Watch(TorchDispatchMode):
    """Watches each operation of torch inside.

    Args:
        spans: of the gradients.

    Attributes:
        read: numbers of the gradients that operations of torch read.
        stops: names of the operations that wait for the device.
    """

    def __init__(self, spans: Spans):
        super().__init__()
        self.read, self.stops = set(spans.mixed), set[str]()
        self._spans = spans

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in _STOPS:
            self.stops.add(name)
        if name not in _VIEWS:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and (i := self._spans.at(x.data_ptr())) is not None:
                    self.read.add(i)
        return function(*args, **(kwargs or {}))


class _Trial:
    """A usual step, and the facts on it that a graph needs.

    Args:
        method, setup, groups, options: of the step.

    Attributes:
        read: numbers of the gradients that are read in another way than by tables of addresses.
        stops: names of the operations that wait for the device.
        entries: the number of entries of all tables.
    """

    def __init__(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any):
        spans, tables = Spans(_gradients(setup)), Tables(setup.counters.step.device)
        with _Watch(spans) as watch, tables.used():
            method.step(setup, groups, options)
        elsewhere = {i for i, address in spans.starts.items() if address not in tables.addresses}
        self.read, self.stops, self.entries = watch.read | elsewhere, watch.stops, tables.entries


class _Graph:
    """A CUDA graph of a step, with its tables and its copies of gradients.

    Args:
        trial: of a step like this one.
        method, setup, groups, options: of the step.

    Raises:
        Exception: of many types, when the graph cannot be made; no step was taken.
    """

    def __init__(self, trial: _Trial, method: Method, setup: Setup, groups: Sequence[Group], options: Any):
        gradients = _gradients(setup)
        self._copies = {i: torch.empty(g.shape, dtype=g.dtype, device=g.device) for i, g in gradients.items() if i in trial.read}
        spans = Spans({i: g for i, g in gradients.items() if i not in trial.read})
        self._tables, self._graph = Tables(setup.counters.step.device, trial.entries), torch.cuda.CUDAGraph()
        making = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        with _instead(setup.params, self._copies), _Watch(spans) as watch, self._tables.used(), making:
            method.step(setup, groups, options)
        followed = self._tables.follow(spans)
        if wrong := watch.read | (spans.starts.keys() - followed):
            raise RuntimeError(f"gradients {sorted(wrong)} are read in another way than in the step before")
        self._moving = list(spans.starts)
        self._alike: dict[tuple, list[int]] = {}  # numbers of the gradients that one operation can copy
        for i in self._copies:
            self._alike.setdefault((gradients[i].dtype, gradients[i].is_contiguous()), []).append(i)

    def replay(self, gradients: Mapping[int, Tensor]) -> None:
        """Take the step, for gradients that may have moved."""
        for some in self._alike.values():
            torch._foreach_copy_([self._copies[i] for i in some], [gradients[i] for i in some])
        self._tables.write([gradients[i].data_ptr() for i in self._moving])
        self._graph.replay()


def _gradients(setup: Setup) -> dict[int, Tensor]:
    """Give the gradients of the parameters that have one, by the parameters' numbers."""
    return {i: g for i, p in enumerate(setup.params) if (g := p.grad) is not None}


@contextlib.contextmanager
def _instead(params: Sequence[Tensor], gradients: Mapping[int, Tensor]) -> Iterator[None]:
    """Put these gradients in the place of some parameters' own inside."""
    before = [(params[i], params[i].grad) for i in gradients]
    try:
        for i, g in gradients.items():
            params[i].grad = g
        yield
    finally:
        for p, old in before:
            p.grad = old


def _unfit(method: Method, setup: Setup) -> str | None:
    """Tell why the step cannot be a graph; None: it may be."""
    if not method.capturable:
        return "only window methods take their steps by a graph"
    devices = {p.device for p in setup.params}
    if len(devices) != 1 or kind(next(iter(devices))) != "cuda":
        return "the parameters are not all on one GPU"
    if type(setup.placement) is not Alone or setup.factors:
        return "several processes share the state"
    for name in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING"):  # torch looks only whether they are there
        if name in os.environ:
            return f"{name} is set: every allocation is a cudaMalloc, which is not allowed while a graph is captured"
    if any(p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_neg()) for p in setup.params):
        return "a gradient is sparse, or stands for its negative"
    return None


def _large(setup: Setup) -> str | None:
    """Tell why there is no graph unless it is asked for; None: there may be one."""
    taken, whole = sum(p.nbytes for p in setup.params), _memory(setup.counters.step.device)
    if taken <= _SMALL * whole:
        return None
    share = round(1 / _SMALL)
    return f"the trained parameters take more than 1/{share} of the GPU's memory; HF_EFCP_CUDA_GRAPH=1 makes one all the same"


@functools.cache
def _memory(device: torch.device) -> int:
    """Give the bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _key(setup: Setup, groups: Sequence[Group], options: Any, gradients: Mapping[int, Tensor]) -> tuple:
    """Give everything that a graph depends on: addresses of parameters and state, layouts of gradients, plain numbers."""
    layouts = tuple((i, g.dtype, g.stride()) for i, g in gradients.items())
    state = [buffer for s in setup.stacks for buffer in s.buffers.values()]
    state += [*setup.counters.entries(0).values(), setup.last, setup.size, setup.rest]
    places = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in (*setup.params, *state))
    numbers = tuple(tuple(group.get(key) for key in _READ) for group in groups)
    return weakref.ref(setup), options, layouts, places, numbers
