"""What an optimizer has built for its present parameters; it is built anew when the parameters change."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import compute_dtype
from ..core.deferred import DelayedFlag, masked
from ..distributed.placement import Placement, Specs
from ..distributed.plan import Owners
from .parameters import levels_to_caller


@dataclasses.dataclass(eq=False)
class Setup:
    """The parameters, where their state is, and the state itself.

    Attributes:
        key: of the parameters for which this was built.
        params: those that have state, in the order in which they are numbered.
        placement: which processes train together, and what this one holds.
        owners: who holds which rows of each parameter's state.
        specs: the state of each parameter as one process has it, with what it holds for all of them.
        stacks, factors: batches of the parameters; those whose factors are made during backward (comm="factors").
        counters: of steps; a window method's Gram matrix.
        last: coefficients of the last accepted step, for diagnostics.
        started: whether a step was taken.
        skips: the number of refused steps, as far as the host knows.
    """

    key: list[Any]
    params: list[Tensor]
    placement: Placement
    owners: dict[Tensor, Owners]
    specs: dict[Tensor, Specs]
    stacks: Sequence[Any]
    factors: Sequence[Any]
    counters: Any
    last: Tensor | None = None
    started: bool = False

    def __post_init__(self) -> None:
        self.dtype = torch.float64 if {compute_dtype(p) for p in self.params} == {torch.float64} else torch.float32
        self.listen_anew()

    @property
    def coordinates(self) -> int:
        """d, the number of coordinates that are trained, on all processes."""
        if self.placement.coordinates is not None:
            return self.placement.coordinates
        return sum(p.numel() for p in self.params if p.requires_grad)

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """Give the state by parameter and name: views of the stacks' buffers, and of the counters."""
        views: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        for s in (*self.stacks, *self.factors):
            for i, p in enumerate(s.params):
                views[p] |= {name: buffer[i] for name, buffer in s.buffers.items()}
        for number, p in enumerate(self.params):
            views[p] |= {name: t for name, t in self.counters.entries(number).items() if name in self.specs[p]}
        return views

    def finish(self, last: Tensor | None = None, ok: bool | Tensor = True) -> None:
        """End a step: hand out the parameters, and remember the coefficients, if there are any, where the step was accepted."""
        self.placement.publish(self.params, self.owners)
        self.last = last if ok is True or last is None or self.last is None else masked(ok, last, self.last)
        self.started = True

    def listen_anew(self) -> None:
        """Forget what flags said one step ago: the state is another, and whoever saved it was warned of its skips."""
        self.counters.listen_anew()
        self.skips, self._warned_of = DelayedFlag(), int(self.counters.skipped)

    def warn_of_skips(self, name: str) -> None:
        """Warn of the 1st, 2nd, 4th, 8th, ... refused step; on a GPU one step late."""
        count = self.skips.exchange(self.counters.skipped)
        if count <= self._warned_of:
            return
        self._warned_of = count
        if count & (count - 1) == 0:
            warnings.warn(
                f"{name}: a gradient is not finite, or its square is out of range: step skipped, state "
                f"unchanged ({count} skipped so far)",
                RuntimeWarning,
                stacklevel=levels_to_caller(),
            )


def l2_of(group: Mapping[str, Any], options: Any) -> float:
    """Give the weight decay that enters the gradient."""
    return group["weight_decay"] if options.weight_decay_mode == "l2" else 0.0


def decoupled_of(group: Mapping[str, Any], options: Any) -> float:
    """Give the weight decay of p <- (1 - lr*wd) p."""
    return 0.0 if l2_of(group, options) else group["weight_decay"]
