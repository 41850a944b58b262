"""DDP: parameters are the same on every process. Their state is divided by a plan (ZeRO-1 style), or whole on every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.cells import Spec
from .placement import Placement, Specs, cut
from .plan import Owners, Size, assign

# Bytes that the buffers of one all-gather may take on a process.
GATHER_BYTES = 128 * 2**20
_ALIGNMENT = 16


class Replicas(Placement):
    """Processes with equal parameters and equal state, except entries that a spec gives each process alone (comm="factors").

    Args:
        group: a process group that this process is in; None: torch's default group. The default group is not stored here: if it
            outlives destroy_process_group, it may abort the interpreter at its end.
    """

    alone = False
    apart = True

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = None if group is dist.group.WORLD else group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def group(self) -> Any:
        """See Placement."""
        return dist.group.WORLD if self._group is None else self._group

    def any(self, flag: bool, device: torch.device) -> bool:
        """See Placement."""
        flags = torch.tensor([float(flag)], device=device)
        dist.all_reduce(flags, group=self.group)
        return bool(flags.item())

    def gather(self, mine: object) -> list[Any]:
        """See Placement."""
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine, group=self.group)
        return everybody

    def owners(self, specs: Mapping[Tensor, Specs], known: Mapping[Tensor, Owners]) -> dict[Tensor, Owners]:
        """See Placement."""
        return {p: dict.fromkeys(range(self.size)) for p in specs}


class DDPShards(Replicas):
    """Processes that share the state: each process compresses, stores and combines the pieces that the plan gives it."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        self.shards = self.size
        self.publishes = self.size > 1

    def sum(self, t: Tensor) -> Tensor:
        """See Placement."""
        dist.all_reduce(t, group=self.group)
        return t

    def owners(self, specs: Mapping[Tensor, Specs], known: Mapping[Tensor, Owners]) -> dict[Tensor, Owners]:
        """See Placement. The plan is the same on every process."""
        return plan(specs, self.size, known)

    def inner(self, t: Tensor, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
        """See Placement."""
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        return cut(t, spec, p, rows)

    def publish(self, params: Sequence[Tensor], owners: Mapping[Tensor, Owners]) -> None:
        """See Placement. There is one all-gather for each bucket of rows."""
        device = params[0].device
        limit = max(2**16, GATHER_BYTES // (self.size + 1))
        streams = [list(_buckets(params, [owners[p] for p in params], rank, limit)) for rank in range(self.size)]
        for number in range(max(map(len, streams))):
            buckets = [stream[number] if number < len(stream) else [] for stream in streams]
            length = max(sum(_padded(t) for t in bucket) for bucket in buckets)
            received = torch.empty(self.size, length, dtype=torch.uint8, device=device)
            sent = torch.empty(length, dtype=torch.uint8, device=device)
            for part, t in _cut(sent, buckets[self.rank]):
                part.copy_(t)
            dist.all_gather(list(received.unbind(0)), sent, group=self.group)
            for rank, bucket in enumerate(buckets):
                if rank != self.rank:
                    for part, t in _cut(received[rank], bucket):
                        t.copy_(part)


def plan(specs: Mapping[Tensor, Specs], processes: int, known: Mapping[Tensor, Owners], least: int = 2) -> dict[Tensor, Owners]:
    """Divide the state of parameters among processes, balanced by bytes.

    Args:
        specs: of every parameter.
        processes: the number of processes.
        known: owners of the parameters that have owners already.
        least: the fewest dimensions of a parameter that may be divided by rows.
    """
    sizes = {p: size_of(p, entries, least) for p, entries in specs.items()}
    held = [0.0] * processes
    for p, size in sizes.items():
        for rank, rows in known.get(p, {}).items():
            held[rank] += size.of(rows)
    new = [p for p in sizes if p not in known]
    assigned = assign([sizes[p] for p in new], processes, held)
    return {p: known[p] for p in sizes if p in known} | {
        p: _whole_units(o, p, specs[p]) for p, o in zip(new, assigned, strict=True)
    }


def size_of(p: Tensor, specs: Specs, least: int = 2) -> Size:
    """Give the bytes of a parameter's state, without entries that every process holds. Rows count in units that stay together."""
    held = [spec for spec in specs.values() if spec.held == "owner"]
    total, fixed = sum(s.nbytes for s in held), sum(s.nbytes for s in held if s.divided(p) is None)
    if p.ndim < least or p.numel() == 0:
        return Size(1, total, 0.0, False)
    by = unit(specs)
    units = -(-len(p) // by)
    return Size(units, fixed, (total - fixed) / units, True, by)


def unit(specs: Specs) -> int:
    """Give the number of rows that must stay together."""
    return math.lcm(*(spec.per for spec in specs.values()))


def _whole_units(owners: Owners, p: Tensor, specs: Specs) -> Owners:
    by = unit(specs)
    if by == 1:
        return owners
    return {r: o if o is None else slice(min(o.start * by, len(p)), min(o.stop * by, len(p))) for r, o in owners.items()}


def _buckets(params: Sequence[Tensor], owners: Sequence[Owners], rank: int, limit: int) -> Iterator[list[Tensor]]:
    """Give views of the parameters' rows that `rank` owns, in lists of at most `limit` bytes (or of a single row)."""
    bucket: list[Tensor] = []
    size = 0
    for p, who in zip(params, owners, strict=True):
        if rank not in who or p.numel() == 0:
            continue
        data, rows = p.detach(), who[rank]
        data = data if rows is None else data[rows]
        step = len(data) if data.ndim else 1
        step = max(1, min(step, limit // max(1, _padded(data[:1] if data.ndim else data))))
        for part in data.split(step) if data.ndim else [data]:
            if size + _padded(part) > limit and bucket:
                yield bucket
                bucket, size = [], 0
            if part.numel():
                bucket.append(part)
                size += _padded(part)
    if bucket:
        yield bucket


def _padded(t: Tensor) -> int:
    return -(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT


def _cut(flat: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a byte buffer into the parts that belong to `tensors`, in their dtypes and shapes."""
    start = 0
    for t in tensors:
        part = flat[start : start + t.numel() * t.element_size()]
        yield part.view(t.dtype).view(t.shape), t
        start += _padded(t)
