"""DeepSpeed's ZeRO-1 and 2: each process has one flat piece of all parameters, their gradients and their state."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .placement import Placement


class ZeroPieces(Placement):
    """Flat pieces of the parameters of one group, over all processes; K is summed, and nothing else is sent.

    Each process's state_dict has its own state: DeepSpeed saves it by process.

    Args:
        coordinates: of all pieces, without padding.
    """

    alone = False
    flat = True

    def __init__(self, coordinates: int):
        self.coordinates = coordinates

    def sum(self, t: Tensor) -> Tensor:
        """See Placement."""
        dist.all_reduce(t)
        return t

    def any(self, flag: bool, device: torch.device) -> bool:
        """See Placement."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())
