"""Where parameters and their state are: one object for every case, one process included, so that nobody asks which case it is.

| placement | parameters | state |
|---|---|---|
| `Alone` | on this process | with them |
| `Replicas` (ddp.py) | the same on every process | the same on every process, but for each process's own errors |
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
    """What the engine asks of a placement; the answers here are those of one process alone.

    Attributes:
        rank, size: this process among those that train together and save together.
        shards: into how many parts the state is divided.
        alone: whether nobody else trains with this process.
        follows: whether the parameters themselves are divided, and the state follows their rows.
        publishes: whether processes hand each other the parameters that they have updated.
        apart: whether the state of each process is saved in a folder beside `state_dict`, which then is a stub.
        flat: whether each parameter is a flat piece of several; then vectors are compressed too.
        parts: of this process's flat piece; None: parameters are no flat pieces.
        coordinates: of all pieces together, where parameters are flat pieces; None: the parameters say it.
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
        """The process group, where the state is saved apart; None elsewhere."""
        return None

    def sum(self, t: Tensor) -> Tensor:
        """Sum `t` in place over the processes that hold different parts of the state; not-a-number anywhere is so everywhere."""
        return t

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is set on any process that trains along."""
        return flag

    def gather(self, mine: object) -> list[Any]:
        """Give everybody's object, by rank."""
        return [mine]

    def owners(self, specs: Mapping[Tensor, Specs], known: Mapping[Tensor, Owners]) -> dict[Tensor, Owners]:
        """Say who holds which rows of every parameter's state; parameters that are `known` keep their owners."""
        return {p: {0: None} for p in specs}

    def check(self, specs: Mapping[Tensor, Specs]) -> None:
        """Raise OptionError where the state cannot be divided as this placement has to."""

    def publish(self, params: Sequence[Tensor], owners: Mapping[Tensor, Owners]) -> None:
        """Hand every process the parameters that others have updated."""

    def outer(self, t: Tensor, spec: Spec, p: Tensor) -> Tensor:
        """Give a state tensor as one process would have it, for whoever saves it."""
        return t

    def inner(self, t: Tensor, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
        """Give this process's rows of a state tensor as one process has it."""
        return t


class Alone(Placement):
    """One process."""


def cut(t: Tensor, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
    """Give `rows` of dimension 0 of p from a whole state tensor; a view."""
    dim = spec.divided(p)
    if rows is None or dim is None:
        return t
    return t.narrow(dim, rows.start // spec.per, spec.part(p, rows)[dim])
