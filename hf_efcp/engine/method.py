"""What a method gives to the engine. Two kinds exist: `Windowed` (windowed.py) and `Tensorwise` (tensorwise.py)."""

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
        """Whether a step may be a CUDA graph: all that it does between two waits for the device follows from its arguments."""
        ...

    def specs(self, layout: Layout, group: Group, options: Any, flat: Parts | None) -> tuple[Spec, ...]:
        """Declare the state of a parameter; `flat`: their parts, where it is a flat piece of several, else None."""
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
        """Allocate the state of pieces of one shape; `group`: of one, which stands for those of all. Others: see Stack."""
        ...

    def make_counters(self, number: int, options: Any, device: torch.device) -> Any:
        """Make the counters of a run with so many parameters."""
        ...

    def step(self, setup: Setup, groups: Sequence[Group], options: Any) -> None:
        """Take a step: everything changes, or nothing but the count of refused steps."""
        ...

    def mend(self, setup: Setup, options: Any) -> None:
        """Make what is computed from the state fit it, after others have written to it."""
        ...

    def problem(self, setup: Setup, options: Any) -> str | None:
        """Say what is wrong with a state that was read, whose entries are each as they may be; None: nothing.

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
    """Give the names of the entries that the first parameter holds for all of them."""
    first, second = ({spec.name for spec in method.shared_specs(i, options)} for i in (0, 1))
    return first - second


def entry_names(method: Method, options: Any) -> set[str]:
    """Give the names of a method's entries under its options."""
    specs = [method.shared_specs(number, options) for number in (0, 1)]
    specs += [method.specs(layout, {}, options, None) for layout in _EXAMPLES]
    return {spec.name for some in specs for spec in some}
