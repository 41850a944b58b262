"""Where parameters and their state are: an object for every case, also for one process, so that no code asks for the case.

| placement | parameters | state |
|---|---|---|
| `Alone` | on this process | with them |
| `Replicas` (ddp.py) | the same on every process | the same on every process, except that each has its own errors |
| `DDPShards` (ddp.py) | the same on every process | divided by a plan |
| `FSDP2Mesh` (fsdp2.py) | DTensors, divided by rows | follows their rows |
| `ZeroPieces` (zero.py) | one flat piece on each process | with the piece |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Parts, Spec
from .plan import Owners

# State name -> spec, of one parameter.
Specs = Mapping[str, Spec]


class Placement:
    """What the engine asks of a placement. The answers here are those of a single process.

    Attributes:
        rank, size: this process's rank, and the number of processes that train and save together.
        shards: the number of parts that the state is divided into.
        alone: whether no other process trains with this one.
        follows: whether the parameters themselves are divided, and the state follows their rows.
        publishes: whether processes send each other the parameters that they have updated.
        apart: whether the state of each process is saved in a folder beside `state_dict`, which is then a stub.
        flat: whether each parameter is a flat piece of several parameters; then vectors are compressed too.
        parts: of this process's flat piece; None: parameters are no flat pieces.
        coordinates: the number of all coordinates, where parameters are flat pieces; None: it follows from the parameters.
    """

    rank = 0
    size = 1
    shards = 1
    alone = True
    follows = False
    publishes = False
    apart = False
    flat = False
    parts: Parts | None = None
    coordinates: int | None = None

    @property
    def group(self) -> Any:
        """The process group, if the state is saved apart; else None."""
        return None

    def sum(self, t: Tensor) -> Tensor:
        """Sum `t` in place over the processes that hold different parts of the state. NaN on one process gives NaN on all."""
        return t

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is set on any of the processes that train together."""
        return flag

    def gather(self, mine: object) -> list[Any]:
        """Give the objects of all processes, by rank."""
        return [mine]

    def owners(self, specs: Mapping[Tensor, Specs], known: Mapping[Tensor, Owners]) -> dict[Tensor, Owners]:
        """Say who holds which rows of every parameter's state. `known` parameters keep their owners."""
        return {p: {0: None} for p in specs}

    def check(self, specs: Mapping[Tensor, Specs]) -> None:
        """Raise OptionError where the state cannot be divided as this placement divides it."""

    def publish(self, params: Sequence[Tensor], owners: Mapping[Tensor, Owners]) -> None:
        """Give every process the parameters that other processes have updated."""

    def outer(self, t: Tensor, spec: Spec, p: Tensor) -> Tensor:
        """Give a state tensor as one process would have it, to save it."""
        return t

    def inner(self, t: Tensor, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
        """Give this process's rows of a state tensor that is whole, as on one process."""
        return t


class Alone(Placement):
    """One process."""


def cut(t: Tensor, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
    """Give the part of a whole state tensor that belongs to `rows` of dimension 0 of p, as a view."""
    dim = spec.divided(p)
    if rows is None or dim is None:
        return t
    return t.narrow(dim, rows.start // spec.per, spec.part(p, rows)[dim])
