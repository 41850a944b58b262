"""Who takes part in `bench`, and on what: a model with random gradients, and optimizers that are made, stepped and reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.base import EngineOptimizer
from . import roofline
from .measuring import fill, phases, seconds, spread, state_bytes, temporaries
from .peers import ADAMW

# Steps before the window is filled up, whose rows are what it is filled with.
_REAL_ROWS = 4


class Workload:
    """A model's parameters on a device, with gradients of random normal numbers: the same for all contenders.

    Args:
        model: on the meta device; gets parameters and gradients on `device`, and tied parameters stay tied.
        device: where.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._generator = torch.Generator(device).manual_seed(0)
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    values = torch.empty(p.shape, dtype=p.dtype, device=device).normal_(0, 0.02, generator=self._generator)
                    made[id(p)] = nn.Parameter(values, p.requires_grad)
                module._parameters[name] = made[id(p)]
        self.params = [p for p in model.parameters() if p.requires_grad]
        for p in self.params:
            p.grad = torch.empty_like(p)

    def new_gradients(self) -> None:
        """Draw new numbers: the same gradient twice would make entries that depend on each other."""
        for p in self.params:
            _gradient(p).normal_(generator=self._generator)

    def held_bytes(self) -> int:
        """Bytes of the parameters and their gradients."""
        return sum(p.nbytes + _gradient(p).nbytes for p in self.params)


def _gradient(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        raise RuntimeError("an optimizer has taken a parameter's gradient away")
    return p.grad


@dataclasses.dataclass
class Contender:
    """An optimizer in the run.

    Attributes:
        name: as it is shown.
        make: model -> optimizer.
        size: bytes that its state takes, for peers a guess.
        options: of one of ours; None: it is a peer.
        optimizer: None before it is made and after it is dropped.
        times: seconds of the timed steps.
        first: seconds of the first step.
    """

    name: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    size: int
    options: dict[str, Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    first: float = 0.0

    @property
    def running(self) -> torch.optim.Optimizer:
        """The optimizer; raises RuntimeError where there is none."""
        if self.optimizer is None:
            raise RuntimeError(f"{self.name} is not running")
        return self.optimizer

    def start(self, work: Workload, warmup: int) -> None:
        """Make the optimizer, take its first steps, fill its window, and take `warmup` more."""
        work.new_gradients()
        self.optimizer = self.make(work.model)
        self.first = seconds(self.optimizer.step, work.device)
        if self.options is not None:
            for _ in range(min(_REAL_ROWS, self.options.get("window_size", _REAL_ROWS)) - 1):
                work.new_gradients()
                self.optimizer.step()
            assert isinstance(self.optimizer, EngineOptimizer)
            fill(self.optimizer)
        for _ in range(warmup):
            work.new_gradients()
            self.optimizer.step()

    def time_step(self, work: Workload) -> None:
        """Take a timed step."""
        self.times.append(seconds(self.running.step, work.device))

    def report(self, work: Workload, apart: bool = True) -> dict[str, Any]:
        """What has been measured, and what is measured apart: phases and temporaries.

        Args:
            work: what the optimizer stepped on.
            apart: whether to measure what is measured apart, by more steps.

        Returns:
            As written to JSON, with "counts" (phase -> Count, or None where nobody has counted) in place of the roofline.
        """
        sizes = state_bytes(self.running)
        total = sum(sizes.values())
        entry: dict[str, Any] = {
            "options": self.options,
            "step_ms": {k: 1e3 * v for k, v in spread(self.times).items()},
            "first_step_ms": 1e3 * self.first,
            "bytes": sizes,
            "total": total,
            "bytes_per_parameter": total / sum(p.numel() for p in work.params),
            "counts": None,
        }
        if isinstance(self.running, EngineOptimizer):
            entry |= self._phases(work) if apart else {}
            entry["counts"] = self.running.costs()
        elif self.name in ADAMW:
            entry["counts"] = roofline.adamw(work.params)
        if apart:
            work.new_gradients()
            entry["temporaries"] = temporaries(self.running.step, work.device)
            entry["peak_bytes"] = work.held_bytes() + total + entry["temporaries"]
        return entry

    def _phases(self, work: Workload) -> dict[str, dict[str, float]]:
        """Mean milliseconds of the phases over some steps of their own, and their shares."""
        steps, total = max(1, min(5, len(self.times))), 0.0
        with phases(work.device) as times:
            for _ in range(steps):
                work.new_gradients()
                total += seconds(self.running.step, work.device)
        times["rest"] = max(0.0, total - sum(times.values()))
        return {
            "phases_ms": {k: 1e3 * v / steps for k, v in times.items()},
            "phase_share": {k: v / sum(times.values()) for k, v in times.items()},
        }
