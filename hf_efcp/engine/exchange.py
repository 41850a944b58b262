"""Messages in place of parameters: the process that updates a tensor sends the update's parts, and all processes apply it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.ddp import GATHER_BYTES
from ..distributed.placement import Placement
from ..distributed.plan import Owners

if TYPE_CHECKING:
    from .method import Group
    from .tensorwise import TensorStack


class Exchange:
    """The tensors that are updated by messages: one process owns the whole tensor, and its rule has a message.

    The owner applies its message as every other process does, for the tensor alone and not in a batch. So the parameters stay
    equal bit for bit.

    Args:
        stacks: a stack without state for each of these tensors, in the same order on every process.
        owners: which process holds which tensor's state.
        placement: which processes train together.
        options: of the optimizer.

    Attributes:
        params: the tensors.
    """

    def __init__(self, stacks: Sequence[TensorStack], owners: dict[Tensor, Owners], placement: Placement, options: Any):
        self._stacks, self._owners, self._placement, self._options = stacks, owners, placement, options
        self.params = {s.params[0] for s in stacks}
        self._own: dict[Tensor, list[Tensor]] = {}

    def put(self, s: TensorStack, message: Sequence[Tensor]) -> None:
        """Take the message for n tensors of this process; each part of it is (n, ...)."""
        for i, p in enumerate(s.params):
            self._own[p] = [part[i] for part in message]

    def finish(self, groups: Sequence[Group], step: Tensor, ok: bool | Tensor) -> None:
        """Send this process's messages, and apply those of all processes to the tensors that have a gradient."""
        for stacks in self._together():
            messages = [self._message(s) for s in stacks]
            owners = {t: self._owners[s.params[0]] for s, parts in zip(stacks, messages, strict=True) for t in parts}
            self._placement.publish(list(owners), owners)
            for s, parts in zip(stacks, messages, strict=True):
                s.open(step)
                s.turn.ok = ok
                s.apply(s.formed([part[None] for part in parts], self._options), groups, self._options)
        self._own = {}

    def _message(self, s: TensorStack) -> list[Tensor]:
        own = self._own.get(s.params[0])
        return own or [torch.empty(spec.shape, dtype=spec.dtype, device=s.device) for spec in s.message(self._options)]

    def _together(self) -> Iterator[list[TensorStack]]:
        """Give the stacks whose tensors have a gradient, a few at a time, so that their messages take little memory."""
        together: list[TensorStack] = []
        size = 0
        for s in self._stacks:
            if s.params[0].grad is None:
                continue
            size += sum(spec.nbytes for spec in s.message(self._options))
            together.append(s)
            if size > GATHER_BYTES:
                yield together
                together, size = [], 0
        if together:
            yield together
