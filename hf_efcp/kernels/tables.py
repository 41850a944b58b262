"""Tables of addresses that the kernels of a CUDA graph read, written anew before a replay where matrices have moved."""

from __future__ import annotations

import bisect
import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Tables begin at multiples of so many entries, 16 bytes, as memory of their own does: Triton compiles for that.
_ALIGNED = 2


class Spans:
    """Where tensors lie in memory.

    Args:
        tensors: by number; empty ones lie nowhere.

    Attributes:
        starts: number -> address.
        mixed: numbers of those that share memory with others, so that an address does not tell which one it is of.
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
        """Give the number of the tensor that an address lies in; None: it is elsewhere."""
        place = bisect.bisect_right(self._firsts, address) - 1
        if place < 0 or address >= self._order[place][1]:
            return None
        return self._order[place][2]


class Tables:
    """The tables of one graph. Without room it only takes notes, of a step that shows how much room a graph will need.

    Args:
        device: where they are.
        entries: how many there is room for; None: none.

    Attributes:
        fixed: whether there is room, and a graph is being made, so that nothing else may be brought to the device.
        entries: how many were asked for.
        addresses: that were asked for.
    """

    def __init__(self, device: torch.device, entries: int | None = None):
        self.device, self.fixed = device, entries is not None
        self.entries, self.addresses = 0, set[int]()
        self._memory = torch.zeros(entries or 0, dtype=torch.int64, device=device)
        self._made: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self._likes: dict[torch.dtype, Tensor] = {}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let kernels take their tables from here inside, in this thread."""
        token = TABLES.set(self)
        try:
            yield
        finally:
            TABLES.reset(token)

    def table(self, addresses: tuple[int, ...]) -> Tensor | None:
        """Give a table, whose content is written later, by `write`; None where there is no room at all."""
        if addresses in self._made:
            return self._made[addresses][1]
        self.addresses.update(addresses)
        start, self.entries = self.entries, self.entries + -(-len(addresses) // _ALIGNED) * _ALIGNED
        if not self.fixed:
            return None
        if self.entries > len(self._memory):
            raise RuntimeError(f"more than {len(self._memory)} addresses, as many as the step before had")
        table = self._memory[start : start + len(addresses)]
        self._made[addresses] = start, table
        return table

    def like(self, x: Tensor) -> Tensor:
        """Give a tensor that stands for the dtype of x: kernels never see x itself, which may move."""
        if x.dtype not in self._likes:
            self._likes[x.dtype] = torch.empty(1, dtype=x.dtype, device=self.device)
        return self._likes[x.dtype]

    def follow(self, moving: Spans) -> set[int]:
        """Let the entries that are addresses of these matrices follow them; give the numbers of the matrices that are found.

        Raises:
            RuntimeError: an entry lies inside of a matrix, not at its beginning.
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
        """Bring the tables to the device, unless they are there; nothing waits.

        Args:
            addresses: of the matrices that `follow` was given, in the order of `Spans.starts`.
        """
        if addresses == self._written:
            return
        self._written = list(addresses)
        self._hosts.reverse()  # the other one may still be on its way
        self._copied.reverse()
        host, copied = self._hosts[0], self._copied[0]
        if copied is not None:
            copied.synchronize()  # queued two steps ago
        host.index_copy_(0, self._places, torch.tensor(addresses, dtype=torch.int64, device="cpu").index_select(0, self._sources))
        self._memory.copy_(host, non_blocking=True)
        if self._memory.is_cuda:
            self._copied[0] = copied = copied or torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))


# Where kernels take their tables from; None: from those that all steps share.
TABLES: contextvars.ContextVar[Tables | None] = contextvars.ContextVar("hf_efcp_tables", default=None)


def _length(x: Tensor) -> int:
    """Count the bytes from the first number of a tensor to its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()
