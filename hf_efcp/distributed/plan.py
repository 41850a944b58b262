"""Plans which process holds the state of which rows, by a pure function of sizes, which is the same on every process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# A plan is good when no process holds more than this times an equal share.
_BALANCED = 1.05

# rank -> the rows it holds; None: the whole tensor.
Owners = dict[int, slice | None]


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of a tensor's state: `fixed` on each process that holds a part of it, and `per_row` for each of its rows.

    Attributes:
        rows: the number of rows of the tensor's 2-D view, or of units of rows that stay together.
        divisible: whether rows may go to different processes.
        unit: how many rows of the view count as one row here.
    """

    rows: int
    fixed: float
    per_row: float
    divisible: bool
    unit: int = 1

    @property
    def total(self) -> float:
        """The bytes of the whole state on one process."""
        return self.fixed + self.rows * self.per_row

    def of(self, rows: slice | None) -> float:
        """Give the bytes of some rows of the 2-D view; None: of all."""
        return self.total if rows is None else self.fixed + -(-(rows.stop - rows.start) // self.unit) * self.per_row


def assign(sizes: Sequence[Size], processes: int, held: Sequence[float] | None = None) -> list[Owners]:
    """Divide the state among `processes`: whole tensors where possible, and as few by rows as balance needs.

    A divided tensor needs collectives and, for low-rank windows, a second copy of Q. So whole tensors are given out, the largest
    first, each to the process that holds least. While a process then holds more than 1.05 times an equal share, the largest
    tensor that is still whole is divided instead, and its rows level the processes.

    Args:
        sizes: of every tensor.
        processes: the number of processes.
        held: bytes that each process holds already.

    Returns:
        For each tensor, its owners. Every process has the `fixed` part of a divided tensor, but some may have no rows of it.
    """
    if processes == 1:
        return [{0: None} for _ in sizes]
    start = list(held or [0.0] * processes)
    equal_share = (sum(start) + sum(s.total for s in sizes)) / processes
    by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i].total)
    candidates = [i for i in by_size if sizes[i].divisible and sizes[i].rows > 1]
    least, best = math.inf, list[Owners]()
    for number in range(len(candidates) + 1):
        most, owners = _place(sizes, by_size, candidates[:number], list(start))
        if most < least:
            least, best = most, owners
        if most <= _BALANCED * equal_share:
            break
    return best


def _place(sizes: Sequence[Size], by_size: list[int], divided: list[int], loads: list[float]) -> tuple[float, list[Owners]]:
    """Give the bytes of the fullest process, and the owners, where the tensors `divided` go by rows."""
    owners: list[Owners] = [{} for _ in sizes]
    for i in by_size:
        if i not in divided:
            rank = loads.index(min(loads))
            loads[rank] += sizes[i].total
            owners[i] = {rank: None}
    for i in divided:
        loads = [load + sizes[i].fixed for load in loads]
        start = 0
        for rank, rows in enumerate(_levelling_rows(loads, sizes[i])):
            if rows or sizes[i].fixed:
                owners[i][rank] = slice(start, start + rows)
            loads[rank] += rows * sizes[i].per_row
            start += rows
    return max(loads), owners


def _levelling_rows(loads: list[float], size: Size) -> list[int]:
    """Share out rows so that the loads become as even as possible."""
    per_row = max(size.per_row, 1e-9)
    order = sorted(range(len(loads)), key=loads.__getitem__)
    # The water level: the lowest k loads are filled up to it.
    for k in range(len(order), 0, -1):
        level = (sum(loads[r] for r in order[:k]) + size.rows * per_row) / k
        if level >= loads[order[k - 1]]:
            break
    exact = [max(0.0, (level - load) / per_row) for load in loads]
    rows = [int(x) for x in exact]
    by_remainder = sorted(range(len(loads)), key=lambda r: rows[r] - exact[r])
    for r in by_remainder[: size.rows - sum(rows)]:
        rows[r] += 1
    return rows


def loads(owners: Sequence[Owners], sizes: Sequence[Size], processes: int) -> list[float]:
    """Count the bytes that every process holds."""
    held = [0.0] * processes
    for who, size in zip(owners, sizes, strict=True):
        for rank, rows in who.items():
            held[rank] += size.of(rows)
    return held


def describe(names: Sequence[str], owners: Sequence[Owners], sizes: Sequence[Size], processes: int) -> tuple[str, str]:
    """Write the plan as text: a line for the bytes of every process, and a line for every divided tensor."""
    held = [f"rank {rank}: {round(load):,} bytes" for rank, load in enumerate(loads(owners, sizes, processes))]
    divided = ""
    for name, who in zip(names, owners, strict=True):
        if len(who) > 1:
            parts = ((rank, rows) for rank, rows in who.items() if rows is not None)
            divided += f"\n{name}: " + ", ".join(f"rank {rank} rows {rows.start}-{rows.stop}" for rank, rows in parts)
    return "\n".join(held), divided
