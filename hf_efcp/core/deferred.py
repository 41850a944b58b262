"""What the host may know of a device without waiting for it.

Reading a flag from a GPU stops the host until all queued work is done. On a GPU, the flag masks the writes of a step instead, and
the host reads it one step later. On a CPU a flag is read at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.devices import kind

# Operations of torch that stop the host, because they bring a number from the device.
NUMBERS = {"_local_scalar_dense", "equal"}
# Operations that stop the host, because the size of their result depends on numbers.
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
# Operations that stop the host, to see whether they succeeded, or because their operand comes from the host.
WAITS = {"_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_check_errors", "lift_fresh"}


def readable(device: torch.device) -> bool:
    """Tell whether a flag on this device can be read without waiting."""
    return kind(device) != "cuda"


def masked(accepted: bool | Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """Give `new` if the step is accepted, else `old`. With True there is nothing to do; a 0-D flag decides on its device."""
    return new if accepted is True else torch.where(torch.as_tensor(accepted, device=new.device), new, old)


class DelayedFlag:
    """A small number on the device that the host knows one step late; on a CPU, and the first time, the host knows it at once."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def exchange(self, value: Tensor) -> int:
        """Queue a copy of `value` (0-D bool or int64) to the host; return the value that was given to the call before."""
        if readable(value.device):
            return int(value)
        if self._copy is None:
            before = int(value)
            self._copy = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=value.is_cuda)
        else:
            if self._copied is not None:
                self._copied.synchronize()  # this copy was queued a step ago: it is done, or nearly
            before = int(self._copy)
        self._copy.copy_(value, non_blocking=True)
        if value.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))
        return before
