"""A process group over which state is divided (ZeRO-1 style): sums, agreement, and handing out the updated parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Owners

# Bytes that the buffers of one all-gather may take on a process.
GATHER_BYTES = 128 * 2**20
_ALIGNMENT = 16


class Shards:
    """What a WindowedOptimizer needs of its process group.

    Args:
        group: a process group of two or more processes, this one among them; None: torch's default one, which is not held,
            since one that outlives destroy_process_group may abort the interpreter at its end.
    """

    # Parameters are whole on every process.
    follows = False

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        return dist.group.WORLD if self._group is None else self._group

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over all processes, in place; not-a-number anywhere is not-a-number everywhere."""
        dist.all_reduce(t, group=self.group)
        return t

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())

    def gather(self, mine: object) -> list:
        """Everybody's object, by rank."""
        everybody = [None] * self.size
        dist.all_gather_object(everybody, mine, group=self.group)
        return everybody

    def hand_out(self, params: Sequence[Tensor], owners: Sequence[Owners]) -> None:
        """Every process gets from the owners what they made of their rows; one all-gather for each bucket of rows."""
        device = params[0].device
        limit = max(2**16, GATHER_BYTES // (self.size + 1))
        streams = [list(_buckets(params, owners, rank, limit)) for rank in range(self.size)]
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


def _buckets(params: Sequence[Tensor], owners: Sequence[Owners], rank: int, limit: int) -> Iterator[list[Tensor]]:
    """What `rank` owns, as views of the parameters, in lists of at most `limit` bytes (or a single row)."""
    bucket, size = [], 0
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
    """The parts of a byte buffer that belong to `tensors`, in their dtypes and shapes."""
    start = 0
    for t in tensors:
        part = flat[start : start + t.numel() * t.element_size()]
        yield part.view(t.dtype).view(t.shape), t
        start += _padded(t)
