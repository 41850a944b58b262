"""What an optimizer tells of itself: bytes of state, figures of a step, what a step costs at least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .builder import Builder
from .costs import Count
from .footprint import measured, plan_of
from .setup import Setup

# Figures stands beside torch's Optimizer: types are checked as if it were one itself.
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
        """Count the bytes of state by kind, on the tensors that are held (allocated now if no step was taken yet)."""
        there = self.builder.setup
        setup = there if there is not None and there.released else self.setup()
        return measured([self.state.get(p, {}) for p in setup.params], [setup.specs[p] for p in setup.params])

    def estimate_footprint(self, processes: int = 1, fsdp: bool = False) -> dict[str, int]:
        """Tell what `memory_footprint` of a fresh optimizer will measure, from its parameters' shapes: nothing is allocated.

        Args:
            processes: that share the state.
            fsdp: they share the parameters too (FSDP2): each has the rows of its chunk of every tensor.

        Returns:
            Bytes by kind, of the process that holds most.

        Raises:
            OptionError: the run would be refused.
        """
        return self.builder.estimate(self.param_groups, self.state, processes, fsdp)[1]

    def probe_next_step(self) -> None:
        """Let the next step measure what `diagnostics` tells of a probed step; to be called on every process.

        The step moves parameters and state by the same bits as any other, and takes up to twice as long.
        """
        self._probed = True

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Give figures of the last accepted step, by name (docs/diagnostics.md); nothing before the first step.

        A probed step has more of them. Processes do not meet here, so one of them may ask alone.
        """
        there = self.builder.setup
        if there is None:
            return {}
        figures = self.method.diagnostics(self.setup() if there.released else there)
        return figures | (there.probe.figures() if there.probe is not None and there.probe.done else {})

    def costs(self) -> dict[str, Count]:
        """Count what a step must do at least, by phase: operations, and bytes that must move (docs/benchmarks/roofline.md)."""
        return self.method.costs(self.setup(), self.builder.options)

    def sharding_plan(self) -> str:
        """Describe who holds how many bytes of state, and which tensors are divided by rows; to be called on every process."""
        return plan_of(self.setup(), self.param_groups)
