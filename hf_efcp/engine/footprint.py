"""Bytes of state: counted on the tensors that are held, or from specs before anything is allocated; and who holds them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.ddp import plan, size_of
from ..distributed.placement import Specs
from ..distributed.plan import Owners, describe
from ..kernels.devices import kind
from ..options import OptionError
from .choices import shown

if TYPE_CHECKING:
    from .method import Group
    from .setup import Setup


def measured(entries: Iterable[Mapping[str, Tensor]], specs: Iterable[Specs]) -> dict[str, int]:
    """Count the bytes of the state that is held, by kind."""
    kinds: dict[str, int] = {}
    for entry, known in zip(entries, specs, strict=True):
        for name, t in entry.items():
            if name in known:
                kind = known[name].kind
                kinds[kind] = kinds.get(kind, 0) + t.numel() * t.element_size()
    return kinds


def estimated(specs: Mapping[Tensor, Specs], processes: int = 1, fsdp: bool = False) -> dict[str, int]:
    """Count the bytes of the process that will hold most, by kind.

    Args:
        specs: of every parameter, including what the first one holds for all parameters.
        processes: the number of processes that share the state.
        fsdp: whether they share the parameters too. Each process then has the rows of its chunk of every tensor.
    """
    if fsdp:  # the first chunk is the largest
        chunks: list[Owners] = [{0: slice(0, -(-len(p) // processes)) if p.ndim and p.numel() else None} for p in specs]
        owners, ranks = dict(zip(specs, chunks, strict=True)), 1
    else:
        owners, ranks = plan(specs, processes, {}), processes
    loads = [_bytes_on(specs, owners, rank) for rank in range(ranks)]
    return max(loads, key=lambda kinds: sum(kinds.values()))


def check_room(specs: Mapping[Tensor, Specs], owners: Mapping[Tensor, Owners], rank: int, options: Any) -> None:
    """Raise OptionError where the state that a process holds is larger than its device's whole memory."""
    devices = {p.device for p in specs}
    if len(devices) != 1 or kind(device := devices.pop()) != device.type or (room := _memory(device)) is None:
        return
    size = sum(_bytes_on(specs, owners, rank).values())
    if size > room:
        names = [name for name in ("window_size", "rank", "density") if hasattr(options, name)]
        values = ", ".join(f"{name}={getattr(options, name)}" for name in names)
        raise OptionError(
            f"{values}: the state would take {shown(size)}, and {device} has {shown(room)} in all: take less, or let "
            "memory_budget choose"
        )


def _memory(device: torch.device) -> int | None:
    """Give the bytes of a device's whole memory, in use or not; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def plan_of(setup: Setup, groups: Sequence[Group]) -> str:
    """Describe how many bytes of state each process holds, and which tensors are divided by rows."""
    placement = setup.placement
    if placement.shards == 1 and not placement.follows:
        return "not sharded"
    names = {p: n for g in groups for p, n in zip(g["params"], g.get("param_names", []), strict=False)}
    labels = [names.get(p, f"parameter {i}") for i, p in enumerate(setup.params)]
    sizes = [size_of(p, setup.specs[p], 1 if placement.follows else 2) for p in setup.params]
    loads, divided = describe(labels, [setup.owners[p] for p in setup.params], sizes, placement.shards)
    return loads + ("\nevery tensor divided by rows, as the parameters are" if placement.follows else divided)


def _bytes_on(specs: Mapping[Tensor, Specs], owners: Mapping[Tensor, Owners], rank: int) -> dict[str, int]:
    """Count the bytes that the plan gives to a process, by kind."""
    kinds: dict[str, int] = {}
    for p, entries in specs.items():
        held, rows = rank in owners[p], owners[p].get(rank)
        for spec in entries.values():
            if held or spec.held != "owner":
                size = spec.nbytes if rows is None else math.prod(spec.part(p, rows)) * spec.dtype.itemsize
                kinds[spec.kind] = kinds.get(spec.kind, 0) + size
    return kinds
