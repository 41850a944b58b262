"""Tables of addresses that the kernels of a CUDA graph read. Before a replay, they are rewritten if matrices have moved."""

from __future__ import annotations

import bisect
import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# A table begins at a multiple of this many entries, which is 16 bytes, as memory of its own would: Triton compiles for that.
_ALIGNED = 2


class Spans:
    """Where tensors lie in memory.

    Args:
        tensors: by number. Empty tensors are left out.

    Attributes:
        starts: number -> address.
        mixed: numbers of the tensors that share memory with others, so that an address may belong to several.
    """

    def __init__(self, tensors: Mapping[int, Tensor]):
        self.starts = {i: t.data_ptr() for i, t in tensors.items() if t.numel()}
        self._order = sorted((start, start + _length(tensors[i]), i) for i, start in self.starts.items())
        self._firsts = [start for start, _, _ in self._order]
        self.mixed: set[int] = set()
        last, of = 0, -1
        for start, end, i in self._order:
            if start < last:
                self.mixed |= {i, of}
            if end > last:
                last, of = end, i

    def at(self, address: int) -> int | None:
        """Give the number of the tensor that an address lies in; None if it lies in none."""
        place = bisect.bisect_right(self._firsts, address) - 1
        if place < 0 or address >= self._order[place][1]:
            return None
        return self._order[place][2]


class Tables:
    """The tables of one graph. Without room, it only counts what a step asks for, which is the room that a graph will need.

    Args:
        device: where the tables are.
        entries: how many entries there is room for; None: there is no room.

    Attributes:
        fixed: whether there is room. Then a graph is being made, and nothing else may be brought to the device.
        entries: how many entries were asked for.
        addresses: the addresses that were asked for.
    """

    def __init__(self, device: torch.device, entries: int | None = None):
        self.device, self.fixed = device, entries is not None
        self.entries, self.addresses = 0, set[int]()
        self._memory = torch.zeros(entries or 0, dtype=torch.int64, device=device)
        self._made: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self._likes: dict[torch.dtype, Tensor] = {}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the kernels inside take their tables from here, in this thread."""
        token = TABLES.set(self)
        try:
            yield
        finally:
            TABLES.reset(token)

    def table(self, addresses: tuple[int, ...]) -> Tensor | None:
        """Give a table, whose content `write` brings later; None where there is no room at all.

        Raises:
            RuntimeError: more entries are asked for than there is room for.
        """
        if addresses in self._made:
            return self._made[addresses][1]
        self.addresses.update(addresses)
        start, self.entries = self.entries, self.entries + -(-len(addresses) // _ALIGNED) * _ALIGNED
        if not self.fixed:
            return None
        if self.entries > len(self._memory):
            raise RuntimeError(f"more than {len(self._memory)} addresses, which is how many the step before had")
        table = self._memory[start : start + len(addresses)]
        self._made[addresses] = start, table
        return table

    def like(self, x: Tensor) -> Tensor:
        """Give a tensor of the dtype of x, for kernels to know the dtype by. They never see x itself, which may move."""
        if x.dtype not in self._likes:
            self._likes[x.dtype] = torch.empty(1, dtype=x.dtype, device=self.device)
        return self._likes[x.dtype]

    def follow(self, moving: Spans) -> set[int]:
        """Find the entries that are addresses of these matrices, for `write` to update. Give the numbers of the matrices found.

        Raises:
            RuntimeError: an entry points inside a matrix, not to its beginning.
        """
        content, places, sources = [0] * len(self._memory), list[int](), list[int]()
        numbers = {i: place for place, i in enumerate(moving.starts)}
        for addresses, (start, _) in self._made.items():
            content[start : start + len(addresses)] = addresses
            for place, address in enumerate(addresses, start):
                i = moving.at(address)
                if i is None:
                    continue
                if address != moving.starts[i]:
                    raise RuntimeError(f"a kernel reads matrix {i} from its middle on")
                places.append(place)
                sources.append(numbers[i])
        self._places, self._sources = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (places, sources))
        pinned = self.device.type == "cuda"
        self._hosts = [torch.tensor(content, dtype=torch.int64, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._written: Sequence[int] | None = None
        found = set(sources)
        return {i for i, place in numbers.items() if place in found}

    def write(self, addresses: Sequence[int]) -> None:
        """Bring the tables to the device, unless they are there already, without waiting for this step's work.

        Args:
            addresses: of the matrices that `follow` was given, in the order of `Spans.starts`.
        """
        if addresses == self._written:
            return
        self._written = list(addresses)
        self._hosts.reverse()  # the copy from the other host tensor may still be under way
        self._copied.reverse()
        host, copied = self._hosts[0], self._copied[0]
        if copied is not None:
            copied.synchronize()  # this copy was queued two steps ago
        host.index_copy_(0, self._places, torch.tensor(addresses, dtype=torch.int64, device="cpu").index_select(0, self._sources))
        self._memory.copy_(host, non_blocking=True)
        if self._memory.is_cuda:
            self._copied[0] = copied = copied or torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))


# Where kernels take their tables from. None: from the tables that all steps share.
TABLES: contextvars.ContextVar[Tables | None] = contextvars.ContextVar("hf_efcp_tables", default=None)


def _length(x: Tensor) -> int:
    """Count the bytes from the first to the last number of a tensor."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()
