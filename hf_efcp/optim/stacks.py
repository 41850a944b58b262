"""Tensors of one shape, stacked: their state is one buffer with a leading dimension n, and a step handles them as one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..core.compressors import Identity
from ..core.error_feedback import ErrorFeedback
from ..core.windows import DenseWindow, Window

# A stack's gradient is a temporary: it should stay in the cache on a CPU, and fill the device on a GPU.
STACK_BYTES = {"cpu": 4 * 2**20}
STACK_BYTES_ACCELERATOR = 32 * 2**20


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype of state and arithmetic for a parameter: fp64 for fp64, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """(rows, cols) of the 2-D view: (shape[0], the rest); (1, numel) for 0-D and 1-D tensors."""
    return (1, p.numel()) if p.ndim < 2 else (p.shape[0], math.prod(p.shape[1:]))


@dataclasses.dataclass
class Stack:
    """n tensors of one shape, dtype, device and parameter group, with everything that a step does to them.

    Attributes:
        params: the n parameters.
        group: index of their parameter group.
        compressor, feedback, window: the row's way from gradient to update.
    """

    params: list[Tensor]
    group: int
    compressor: object
    feedback: ErrorFeedback
    window: Window

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.params[0].device

    def gradient(self) -> Tensor:
        """g, (n, rows, cols) in the compute dtype; zeros where a parameter has no gradient. May share memory with `p.grad`."""
        first = self.params[0]
        shape, dtype = matrix_shape(first), compute_dtype(first)
        grads = [_dense(p).reshape(shape) for p in self.params]
        return (torch.stack(grads) if len(grads) > 1 else grads[0][None]).to(dtype)

    def buffers(self) -> dict[str, Tensor]:
        """State name -> buffer (n, ...)."""
        found = {"error": self.feedback.error, "warm_start": getattr(self.compressor, "q", None), **self.window.state}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def apply(self, update: Tensor, lr: float, weight_decay: float) -> None:
        """p <- (1 - lr*wd) p - lr * u for every p; low-precision parameters are rounded once."""
        for p, u in zip(self.params, update, strict=True):
            u = u.view(p.shape)
            new = p if p.dtype == u.dtype else p.to(u.dtype)
            if weight_decay:
                new = new.mul_(1 - lr * weight_decay)
            new.add_(u, alpha=-lr)
            if new is not p:
                p.copy_(new)


def _dense(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


# (n, rows, cols, first parameter, salt) -> (compressor, window), or None where a plain row is smaller and exact.
RowFormat = Callable[[int, int, int, Tensor, Tensor], tuple[object, Window] | None]


def build_stacks(groups: Iterable[list[Tensor]], window_size: int, row_format: RowFormat) -> list[Stack]:
    """Group parameters into stacks and allocate their state, all zeros.

    Args:
        groups: the trainable parameters of each parameter group.
        window_size: m, for plain rows.
        row_format: the method's compressor and window for tensors of two or more dimensions.
    """
    alike: dict[tuple, list[tuple[int, Tensor]]] = {}
    number = 0
    for index, params in enumerate(groups):
        for p in params:
            key = (index, matrix_shape(p), p.ndim < 2, p.dtype, p.device)
            alike.setdefault(key, []).append((number, p))
            number += 1
    stacks = []
    for (index, (rows, cols), plain, _, _), members in alike.items():
        for part in _parts(members):
            params = [p for _, p in part]
            salt = torch.tensor([number for number, _ in part], device=params[0].device)
            stacks.append(_allocate(params, index, rows, cols, salt, window_size, None if plain else row_format))
    return stacks


def _parts(members: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    first = members[0][1]
    limit = STACK_BYTES.get(first.device.type, STACK_BYTES_ACCELERATOR)
    size = max(1, limit // max(1, first.numel() * compute_dtype(first).itemsize))
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _allocate(params, index, rows, cols, salt, window_size, row_format) -> Stack:
    n, first = len(params), params[0]
    dtype = compute_dtype(first)
    compressed = row_format(n, rows, cols, first, salt) if row_format else None
    if compressed is None:
        window = DenseWindow(n, window_size, rows, cols, dtype=dtype, compute_dtype=dtype, device=first.device)
        return Stack(params, index, Identity(), ErrorFeedback(None), window)
    error = torch.zeros(n, rows, cols, dtype=dtype, device=first.device)
    return Stack(params, index, compressed[0], ErrorFeedback(error), compressed[1])
