"""What the engine asks of a method. There are two kinds of methods: `Windowed` (windowed.py) and `Tensorwise` (tensorwise.py)."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.cells import Layout, Parts, Spec
from .costs import Count
from .factor_sync import FactorSync
from .setup import Setup
from .stacks import Piece

# The shapes of a matrix and of a vector.
_EXAMPLES = Layout(64, 64, torch.float32), Layout(1, 64, torch.float32, vector=True)
# A parameter group, as torch.optim has it.
Group = Mapping[str, Any]


class Method(Protocol):
    """The state that a method keeps, and its step."""

    @property
    def takes_flat_pieces(self) -> bool:
        """Whether the method works on flat pieces of the parameters (DeepSpeed's ZeRO-1 and 2), which have no matrices."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether a step may be a CUDA graph: what it does between two waits for the device follows from its arguments alone."""
        ...

    def specs(self, layout: Layout, group: Group, options: Any, flat: Parts | None) -> tuple[Spec, ...]:
        """Declare the state of a parameter. `flat`: the parts of the several parameters in a flat piece; else None."""
        ...

    def shared_specs(self, number: int, options: Any) -> tuple[Spec, ...]:
        """Declare what the entry of parameter `number` holds for all parameters."""
        ...

    def make_stack(
        self,
        pieces: list[Piece],
        group: Group,
        options: Any,
        flat: Parts | None,
        sync: FactorSync,
        total: Callable[[Tensor], Tensor] | None,
    ) -> Any:
        """Allocate the state of pieces of one shape. `group` is one piece's, which stands for all; other arguments: see Stack."""
        ...

    def make_counters(self, number: int, options: Any, device: torch.device) -> Any:
        """Make the counters of a run with `number` parameters."""
        ...

    def step(self, setup: Setup, groups: Sequence[Group], options: Any) -> None:
        """Take a step. If it is refused, nothing changes but the count of refused steps."""
        ...

    def mend(self, setup: Setup, options: Any) -> None:
        """Make numbers that are computed from the state fit it, after others have written to the state."""
        ...

    def problem(self, setup: Setup, options: Any) -> str | None:
        """Say what is wrong with a state that was read; None: nothing. Each entry on its own was checked before.

        It is called on all processes that hold the state.
        """
        ...

    def remarks(self, setup: Setup, options: Any, given: Container[str]) -> list[str]:
        """Say what the method has chosen by shapes and devices, in lines for the log; `given`: options that the user gave."""
        ...

    def diagnostics(self, setup: Setup) -> dict[str, float]:
        """Give figures of the last accepted step."""
        ...

    def costs(self, setup: Setup, options: Any) -> dict[str, Count]:
        """Count what a step must do, by phase."""
        ...


def of_all(method: Method, options: Any) -> set[str]:
    """Give the names of the entries that the first parameter holds for all parameters."""
    first, second = ({spec.name for spec in method.shared_specs(i, options)} for i in (0, 1))
    return first - second


def entry_names(method: Method, options: Any) -> set[str]:
    """Give the names of a method's entries under its options."""
    specs = [method.shared_specs(number, options) for number in (0, 1)]
    specs += [method.specs(layout, {}, options, None) for layout in _EXAMPLES]
    return {spec.name for some in specs for spec in some}
