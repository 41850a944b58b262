"""What an optimizer tells of itself: bytes of state, figures of a step, the least cost of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.linalg import cpu_by_default
from .builder import Builder
from .costs import Count
from .footprint import measured, plan_of
from .setup import Setup

# Figures is a mixin beside torch's Optimizer. The type checker takes it for an Optimizer.
if TYPE_CHECKING:
    _Base = torch.optim.Optimizer
else:
    _Base = object


class Figures(_Base):
    """The figures of an `EngineOptimizer`."""

    builder: Builder
    method: ClassVar[Any]
    _probed = False  # whether the next step is to be probed

    def setup(self) -> Setup:
        """See EngineOptimizer."""
        raise NotImplementedError

    def memory_footprint(self) -> dict[str, int]:
        """Count the bytes of state by kind, of the tensors that are held. Before the first step, they are allocated now."""
        there = self.builder.setup
        setup = there if there is not None and there.released else self.setup()
        return measured([self.state.get(p, {}) for p in setup.params], [setup.specs[p] for p in setup.params])

    @cpu_by_default()
    def estimate_footprint(self, processes: int = 1, fsdp: bool = False) -> dict[str, int]:
        """Predict from the parameters' shapes what `memory_footprint` of a fresh optimizer will measure. Nothing is allocated.

        Args:
            processes: the number of processes that share the state.
            fsdp: whether they share the parameters too (FSDP2). Each process then has the rows of its chunk of every tensor.

        Returns:
            Bytes by kind, of the process that holds most.

        Raises:
            OptionError: the run would be refused.
        """
        return self.builder.estimate(self.param_groups, self.state, processes, fsdp)[1]

    def probe_next_step(self) -> None:
        """Let the next step measure the figures that `diagnostics` gives of a probed step. Call it on every process.

        A probed step changes parameters and state by the same bits as any other step, and takes up to twice as long.
        """
        self._probed = True

    @torch.no_grad()
    @cpu_by_default()
    def diagnostics(self) -> dict[str, float]:
        """Give figures of the last accepted step, by name (docs/diagnostics.md); nothing before the first step.

        A probed step has more figures. Processes do not communicate here, so a single process may call this.
        """
        there = self.builder.setup
        if there is None:
            return {}
        figures = self.method.diagnostics(self.setup() if there.released else there)
        return figures | (there.probe.figures() if there.probe is not None and there.probe.done else {})

    def costs(self) -> dict[str, Count]:
        """Count the least that a step must do, by phase: operations, and bytes that must move (docs/benchmarks/roofline.md)."""
        return self.method.costs(self.setup(), self.builder.options)

    def sharding_plan(self) -> str:
        """Describe how many bytes of state each process holds, and which tensors are divided. Call it on every process."""
        return plan_of(self.setup(), self.param_groups)
