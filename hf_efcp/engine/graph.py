"""A step as a CUDA graph: the host launches one thing instead of hundreds. An experiment, off unless HF_EFCP_CUDA_GRAPH=1.

A graph repeats its launches on the same memory. It is made when two steps in a row found gradients, parameters and state at the
same addresses, and used as long as they stay there; a step that finds something elsewhere is taken as usual.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.placement import Alone
from ..kernels.devices import keeping
from .method import Group, Method
from .setup import RATE, Setup

_log = logging.getLogger("hf_efcp")
# Graphs that are made before it is clear that addresses do not stay.
_MOST = 8


class StepGraph:
    """The graph of an optimizer's steps."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._key: tuple | None = None
        self._warm = 0
        self._made = 0
        self._rates: list[Tensor] = []
        self._tables: list[Tensor] = []

    def step(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> None:
        """Take a step: by a graph where one is wanted and possible."""
        if not self._step(method, setup, groups, options):
            method.step(setup, groups, options)

    def _step(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> bool:
        """Take a step by a graph, or on the way to one; tell whether it was taken."""
        if os.environ.get("HF_EFCP_CUDA_GRAPH") != "1" or self._made >= _MOST or not _possible(setup):
            return False
        key = _key(setup, groups)
        if key != self._key:
            self._graph, self._key, self._warm = None, key, 0
            return False
        self._set_rates(setup, groups)
        own = [{**group, RATE: rate} for group, rate in zip(groups, self._rates, strict=True)]
        if self._graph is None and self._warm < 1:  # the kernels that read rates on the device are compiled
            self._warm += 1
            method.step(setup, own, options)
            return True
        if self._graph is None and not self._make(method, setup, own, options):
            return False
        self._graph.replay()
        torch.autograd.graph.increment_version([p for p in setup.params if p.grad is not None])
        return True

    def _set_rates(self, setup: Setup, groups: Sequence[Group]) -> None:
        device = setup.counters.step.device
        if len(self._rates) != len(groups) or self._graph is None:
            self._rates = [torch.zeros((), dtype=setup.dtype, device=device) for _ in groups]
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(float(group["lr"]))

    def _make(self, method: Method, setup: Setup, groups: Sequence[Group], options: Any) -> bool:
        graph = torch.cuda.CUDAGraph()
        self._made += 1
        try:
            self._tables = []
            with keeping(self._tables), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                method.step(setup, groups, options)
        except Exception as error:  # of CUDA's libraries, of kernels: the step can be taken as usual
            self._made = _MOST
            _log.warning("no CUDA graph of a step: %s: %s", type(error).__name__, error)
            return False
        self._graph = graph
        return True


def _possible(setup: Setup) -> bool:
    """Tell whether all is on one GPU and of one process."""
    devices = {p.device for p in setup.params}
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and type(setup.placement) is Alone and not setup.factors


def _key(setup: Setup, groups: Sequence[Group]) -> tuple:
    """Give everything that a graph is made for: addresses, and numbers that are no tensors."""
    addresses = [(p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()) for p in setup.params]
    buffers = [buffer.data_ptr() for s in setup.stacks for buffer in s.buffers.values()]
    numbers = [[(k, v) for k, v in sorted(group.items()) if k not in ("params", "lr")] for group in groups]
    return id(setup), tuple(addresses), tuple(buffers), repr(numbers)
