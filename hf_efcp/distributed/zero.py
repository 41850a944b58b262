"""DeepSpeed's ZeRO-1 and 2: each process has a flat piece of all parameters, of their gradients and of their state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.cells import Parts
from ..options import OptionError
from .placement import Placement, Specs


class ZeroPieces(Placement):
    """Flat pieces of one group's parameters, over all processes. K is summed over processes, and nothing else is sent.

    Each process's state_dict has its own state. DeepSpeed saves one for each process.

    Args:
        coordinates: the number of coordinates of all pieces, without padding.
        parts: the place of each parameter's part in this process's piece; None: not known, and then no metric is possible.
    """

    alone = False
    flat = True

    def __init__(self, coordinates: int, parts: Parts | None = None):
        self.coordinates: int = coordinates
        self.parts: Parts = parts or ()
        self._known = parts is not None

    def check(self, specs: Mapping[Tensor, Specs]) -> None:
        """See Placement."""
        names = {name for entries in specs.values() for name in entries}
        if "metric_values" in names:
            raise OptionError("metric=factored and diagonal need tensors or their rows, and these are flat pieces: use tensor")
        if "metric_mean" in names and not self._known:
            raise OptionError("metric='tensor': take_flat_pieces was not told which part of the piece belongs to which parameter")

    def sum(self, t: Tensor) -> Tensor:
        """See Placement."""
        dist.all_reduce(t)
        return t

    def any(self, flag: bool, device: torch.device) -> bool:
        """See Placement."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())
