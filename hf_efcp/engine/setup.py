"""The setup that an optimizer has built for its present parameters. It is built anew when the parameters change."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import compute_dtype
from ..core.deferred import DelayedFlag, masked
from ..distributed.fsdp2 import local_gradient
from ..distributed.placement import Placement, Specs
from ..distributed.plan import Owners
from ..options import OptionError
from .entries import Watch
from .parameters import levels_to_caller

# Key in a group for the learning rate as a number on the device, where a CUDA graph reads it.
RATE = "rate on the device"

# By rounding, a schedule may end this far below 0.
_ROUNDING = 1e-12
# This many steps in a row without any gradient are no accident.
_IDLE_STEPS = 3


@dataclasses.dataclass(eq=False)
class Setup:
    """The parameters, where their state is, and the state itself.

    Attributes:
        key: of the parameters for which this was built.
        params: the parameters that have state, in the order in which they are numbered.
        placement: which processes train together, and what this process holds.
        owners: who holds which rows of each parameter's state.
        specs: the state of each parameter as one process has it, including what it holds for all parameters.
        make: makes stacks, factors and counters.
        stacks: batches of the parameters.
        factors: batches of the parameters whose factors are made during backward (comm="factors").
        together: batches of stacks that take a step together (together.py); None: not made yet.
        counters: of steps; for a window method, the Gram matrix.
        names: of the entries that this process holds for each parameter.
        watch: of the entries as they were handed out; None: they are not in the state yet.
        released: whether stacks and factors were freed, because the state is kept elsewhere.
        last: coefficients of the last accepted step, for diagnostics.
        size: the sum of S_i^2 over the coordinates that had a gradient in the last step; without a metric, their number.
        rest: |S u|^2 of the update's part outside of the window.
        started: whether a step was taken.
        writing: whether a step has begun to change state and parameters, and has not ended.
        skips: the number of refused steps, as far as the host knows.
        exchange: of messages in place of parameters (exchange.py); None: not made yet.
        probe: the probe of this step, if somebody asked for it. It keeps the figures until the next step.
        doubt: whether K may not fit this process's entries, because others may have changed them.
        heard: the number of processes with a doubt, 0-D; None: there is one process. `doubts` tells the host.
    """

    key: list[Any]
    params: list[Tensor]
    placement: Placement
    owners: dict[Tensor, Owners]
    specs: dict[Tensor, Specs]
    make: Callable[[], tuple[Sequence[Any], Sequence[Any], Any]]
    last: Tensor | None = None
    size: Tensor | float = 0.0
    rest: Tensor | float = 0.0
    started: bool = False
    writing: bool = False

    def __post_init__(self) -> None:
        self._idle = 0
        self.watch: Watch | None = None
        self.probe: Any = None
        self.exchange: Any = None
        self.counters: Any = None
        self.heard: Tensor | None = None
        self.doubts = DelayedFlag()  # is never replaced, so that all processes hear of a doubt in the same step
        self.renew()
        self.names = {p: tuple(entry) for p, entry in self.views().items()}
        self.dtype = torch.float64 if {compute_dtype(p) for p in self.params} == {torch.float64} else torch.float32
        self.listen_anew()

    def renew(self) -> None:
        """Make new stacks, factors and counters. The counters continue the old ones."""
        before = self.counters
        self.stacks, self.factors, self.counters = self.make()
        self.together: list[Any] | None = None
        if before is not None:
            self.counters.go_on(before)
        self.released = False

    def release(self) -> None:
        """Free the state's memory."""
        self.stacks, self.factors, self.together, self.released = (), (), None, True
        self.counters.release()

    def note(self) -> None:
        """Note that only this package has written to the state so far."""
        if self.watch is not None:
            self.watch.note(self)

    def coordinates(self) -> int:
        """Count d, the number of coordinates of all tensors that have a gradient in this step, on all processes."""
        if self.placement.coordinates is not None:
            return self.placement.coordinates
        return sum(p.numel() for p in self.params if p.grad is not None)

    def has_gradients(self) -> bool:
        """Tell whether any parameter has a gradient."""
        return any(p.grad is not None for p in self.params)

    def has_work(self) -> bool:
        """Tell whether there is a gradient; before the first step, whether there is a gradient that is not zero.

        torch.distributed.checkpoint takes a step with zero gradients, so that the state is allocated. The same parameters have a
        gradient on all processes, except with flat pieces.
        """
        if self.started or self.counters.step > 0:
            return self.placement.flat or self.has_gradients()
        gradients = [g for p in self.params if (g := local_gradient(p)) is not None]
        work = any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in gradients)
        return self.placement.any(work, self.counters.step.device)

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """Give the state by parameter and name: views of the stacks' buffers, and of the counters."""
        views: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        for s in (*self.stacks, *self.factors):
            for i, p in enumerate(s.params):
                views[p] |= {name: buffer[i] for name, buffer in s.buffers.items()}
        for number, p in enumerate(self.params):
            if more := self.specs[p].keys() - views[p].keys():
                views[p] |= {name: t for name, t in self.counters.entries(number).items() if name in more}
        return views

    def finish(
        self, last: Tensor | None = None, ok: bool | Tensor = True, size: Tensor | float = 0.0, rest: Tensor | float = 0.0
    ) -> None:
        """End a step: publish the parameters; if the step was accepted, remember coefficients, size and rest, if any."""
        travelling = () if self.exchange is None else self.exchange.params
        if params := [p for p in self.params if p not in travelling]:
            self.placement.publish(params, self.owners)
        if isinstance(ok, Tensor):
            size = torch.ones((), dtype=torch.float64, device=ok.device) * size
        self.last, self.size, self.rest = (
            _remembered(old, new, ok) for old, new in ((self.last, last), (self.size, size), (self.rest, rest))
        )
        self.started, self.writing = True, False
        self._idle = 0 if self._idle < _IDLE_STEPS else self._idle

    def listen_anew(self) -> None:
        """Forget what the host knew of the state, since it is a new one. The user was warned of its skips before it was saved."""
        self.skips, self._warned_of, self.doubt = DelayedFlag(), int(self.counters.skipped), True
        self.counters.believe()
        for s in self.stacks:
            s.begun = False

    def warn_of_idleness(self, name: str) -> None:
        """Warn once when several steps in a row find no gradient at all: the user may train other parameters than these."""
        self._idle += 1
        if self._idle == _IDLE_STEPS:
            warnings.warn(
                f"{name}: no parameter had a gradient in {_IDLE_STEPS} steps, and nothing was updated: are the parameters those "
                "of the model that computes the loss?",
                RuntimeWarning,
                stacklevel=levels_to_caller(),
            )

    def warn_of_skips(self, name: str) -> None:
        """Warn at the 1st, 2nd, 4th, 8th, ... refused step; on a GPU one step late."""
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


def _remembered(old: Any, new: Any, ok: bool | Tensor) -> Any:
    """Give `new` if the step is accepted, else `old`; on a GPU in the memory of `old`, where a CUDA graph finds it again."""
    if ok is True or not isinstance(new, Tensor) or old is None:
        return new
    kept = masked(ok, new, old)
    return old.copy_(kept) if isinstance(old, Tensor) and old.shape == kept.shape and old.device == kept.device else kept


def check_numbers(groups: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise OptionError for a learning rate or weight decay that would destroy the parameters."""
    for i, group in enumerate(groups):
        for key in ("lr", "weight_decay"):
            if not -_ROUNDING <= (x := _number(group, key)) < math.inf:
                raise OptionError(f"{name}: {key}={x} in parameter group {i}: expected a finite number >= 0")


def rate_of(group: Mapping[str, Any]) -> float | Tensor:
    """Give the learning rate; for a CUDA graph, the number on the device."""
    return group[RATE] if RATE in group else _number(group, "lr")


def l2_of(group: Mapping[str, Any], options: Any) -> float:
    """Give the weight decay that enters the gradient; 0 unless weight_decay_mode is l2."""
    return _number(group, "weight_decay") if options.weight_decay_mode == "l2" else 0.0


def decoupled_of(group: Mapping[str, Any], options: Any) -> float:
    """Give the weight decay of p <- (1 - lr*wd) p."""
    return 0.0 if l2_of(group, options) else _number(group, "weight_decay")


def shrink_of(group: Mapping[str, Any], options: Any) -> float | Tensor:
    """Give lr*wd, the fraction by which p shrinks."""
    return rate_of(group) * decoupled_of(group, options)


def _number(group: Mapping[str, Any], key: str) -> float:
    """Read a number of a group. The user may have changed it after it was checked."""
    try:
        return float(group[key])
    except (KeyError, TypeError, ValueError):
        raise OptionError(f"{key}={group.get(key)!r} in a parameter group: expected a number") from None
