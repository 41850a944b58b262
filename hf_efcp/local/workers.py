"""The workers of local updates: means over them, the bytes that they send, and who of them is still there.

Without `min_workers` a worker that dies ends the others with an error at their next synchronisation. With it they meet before
and after each one, by short messages in torch.distributed's key-value store, and go on with those who came. That store must
outlive every worker: a file, or a TCP store that the launcher holds. Each attempt has names of its own in the store, so that a
worker that comes late finds what was decided without it.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..options import OptionError

logger = logging.getLogger(__name__)

# Bytes that are sent as one message.
BUCKET_BYTES = 64 * 2**20
_POLL_SECONDS = 0.01
_T = TypeVar("_T")


class WorkerError(RuntimeError):
    """A worker has died or was left behind, and this one cannot go on."""


class Workers:
    """The processes that train together; one alone where torch.distributed does not run.

    Args:
        min_workers: how many must be left for the others to go on without those who died; None: all.
        timeout: seconds that a worker waits for the others at a synchronisation, with `min_workers`.

    Attributes:
        members: ranks of those who are there, ascending.
        bytes_sent: bytes of the tensors that this worker has given to the others so far: of a mean its own term, of what one
            sends to all the whole. A library may send each of them more than once.
    """

    def __init__(self, min_workers: int | None = None, timeout: float = 300.0):
        running = dist.is_available() and dist.is_initialized()
        self.rank, total = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
        self.members, self.bytes_sent, self.min_workers, self.timeout = list(range(total)), 0, min_workers, timeout
        self._group: Any = None
        self._meetings, self._broken = 0, False
        if min_workers is None or total == 1:
            if min_workers is not None and min_workers > total:
                raise OptionError(f"min_workers={min_workers}: there is one worker; allowed is 1, or none")
            self.min_workers = None
            return
        if not 1 <= min_workers <= total:
            raise OptionError(f"min_workers={min_workers}: must be from 1 to the number of workers, {total}")
        self._store = dist.PrefixStore("hf_efcp.local", dist.distributed_c10d._get_default_store())
        self._group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))

    @property
    def size(self) -> int:
        """How many are there."""
        return len(self.members)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give the mean over the workers of each tensor, in its dtype and on its device; every worker gets the same bits."""
        if self.size == 1:
            return list(tensors)
        means: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket]).div_(self.size)
            self._send(flat)
            dist.all_reduce(flat, group=self._group)
            means += [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in bucket]), bucket, strict=True)]
        return means

    def shared(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        """Give each tensor as its owner has it.

        Args:
            tensors: of the right shape, dtype and device on every worker; the numbers count on the owner alone.
            owners: a position in `members` for each.
        """
        found = list(tensors)
        for position, rank in enumerate(self.members if self.size > 1 else ()):
            mine = [i for i, owner in enumerate(owners) if owner == position]
            if not mine:
                continue
            flat = torch.cat([tensors[i].flatten() for i in mine])
            if rank == self.rank:
                self._send(flat)
            dist.broadcast(flat, src=rank, group=self._group)
            for i, part in zip(mine, flat.split([tensors[i].numel() for i in mine]), strict=True):
                found[i] = part.view(tensors[i].shape)
        return found

    @property
    def position(self) -> int:
        """This worker's position in `members`."""
        return self.members.index(self.rank)

    def together(self, exchange: Callable[[], _T]) -> _T:
        """Give what `exchange` gives, once all workers that are there have it.

        Args:
            exchange: sends and receives, and changes nothing: after a failure it is called again, among fewer workers.

        Raises:
            WorkerError: a worker has died, and fewer than `min_workers` are left; or this one came too late.
        """
        attempts = self.size + 1
        while True:
            name = str(self._meetings)
            if self.min_workers is not None:
                self._meetings += 1
                self._meet(name)
            failure = None
            try:
                found = exchange()
            except RuntimeError as error:  # what a library raises for a dead peer has no type of its own
                attempts -= 1
                if self.size == 1 or isinstance(error, WorkerError) or not attempts:
                    raise
                if self.min_workers is None:
                    raise WorkerError(
                        f"worker {self.rank}: the synchronisation of {self.size} workers failed, probably as one has died "
                        f"({str(error).splitlines()[0]}). Start again from the last checkpoint, or give min_workers, so that the "
                        "others go on"
                    ) from error
                failure = error
            if self.min_workers is None or self._all_have(name, failure is None):
                return found
            logger.warning("worker %d: the synchronisation failed (%s); it is tried again", self.rank, failure)

    def _meet(self, name: str) -> None:
        """Agree on who is there."""
        self._store.set(f"{name}/here/{self.rank}", "1")
        late = self._wait(lambda: [rank for rank in self.members if not self._there(f"{name}/here/{rank}")])
        present = [rank for rank in self.members if rank not in late]
        decided = self._store.compare_set(f"{name}/members", "", ",".join(map(str, present))).decode()
        members = [int(rank) for rank in decided.split(",")]
        if self.rank not in members:
            raise WorkerError(
                f"worker {self.rank}: the others have gone on without it, as it came later than {self.timeout:g} seconds after "
                "them; a larger worker_timeout waits longer"
            )
        if len(members) < (self.min_workers or 1):
            raise WorkerError(
                f"worker {self.rank}: {len(members)} of {self.size} workers are left, and min_workers={self.min_workers}: start "
                "again from the last checkpoint"
            )
        if members != self.members or self._broken:
            gone = [rank for rank in self.members if rank not in members]
            if gone:
                logger.warning("worker %d: %s did not come, and %d go on", self.rank, _named(gone), len(members))
            self._regroup(members)

    def _regroup(self, members: list[int]) -> None:
        self.members, self._broken = members, False
        if len(members) > 1:
            timeout = datetime.timedelta(seconds=self.timeout)
            self._group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)

    def _all_have(self, name: str, mine: bool) -> bool:
        """Agree on whether all have what was exchanged; else on a new group, since a failure leaves the old one unusable."""
        self._store.set(f"{name}/{'had' if mine else 'failed'}/{self.rank}", "1")

        def open_() -> list[int]:
            if any(self._there(f"{name}/failed/{rank}") for rank in self.members):
                return []
            return [rank for rank in self.members if not self._there(f"{name}/had/{rank}")]

        late = self._wait(open_)
        good = not late and not any(self._there(f"{name}/failed/{rank}") for rank in self.members)
        if self._store.compare_set(f"{name}/verdict", "", "good" if good else "again").decode() == "good":
            return True
        self._broken = True
        return False

    def _wait(self, missing: Callable[[], list[int]]) -> list[int]:
        """Wait until nobody is missing, or the time is over; give who is missing then."""
        end = time.monotonic() + self.timeout
        while (gone := missing()) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return gone

    def _there(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _send(self, t: Tensor) -> None:
        self.bytes_sent += t.nbytes


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Give the tensors, in order, in lists of one dtype and device and of at most `BUCKET_BYTES` (or a single one)."""
    buckets: list[list[Tensor]] = []
    size = 0
    for t in tensors:
        last = buckets[-1][-1] if buckets else None
        if last is None or (last.dtype, last.device) != (t.dtype, t.device) or size + t.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(t)
        size += t.nbytes
    return buckets


def _named(ranks: Sequence[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, ranks))
