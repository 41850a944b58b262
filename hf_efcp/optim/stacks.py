"""Tensors of one shape, stacked: their state is one buffer with a leading dimension n, and a step handles them as one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..core.compressors import Identity
from ..core.error_feedback import ErrorFeedback
from ..core.linalg import add_scaled_, chunks
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
        momentum: v, (n, rows, cols), or None.
    """

    params: list[Tensor]
    group: int
    compressor: object
    feedback: ErrorFeedback
    window: Window
    momentum: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.params[0].device

    def stage(self, step: Tensor, l2: float = 0.0) -> None:
        """a = e + g, and c = C(a) as the window stores it; the state stays as it is.

        A parameter without a gradient gives a zero row, and its error stays.
        """
        gradient = self.gradient(l2)
        a = self.feedback.accumulate(gradient, self._owns(gradient))
        for i, p in enumerate(self.params):
            if p.grad is None:
                a[i] = 0
        self.window.stage(self.compressor.compress(a, step))

    def dots(self, j: Tensor) -> Tensor:
        """(n, m) fp64: the staged row's inner products with the window. A plain row is not held, as it is the gradient."""
        dots = self.window.dots(j.to(self.device))
        if isinstance(self.compressor, Identity):
            self.window.release()
        return dots

    def commit(self, j: Tensor, step: Tensor, l2: float, accepted: bool | Tensor) -> None:
        """e <- a - c, and c enters slot j, where `accepted`."""
        if accepted is False:
            self.window.release()
            return
        if isinstance(self.compressor, Identity):
            self.stage(step, l2)
        gradient = self.gradient(l2) if self.feedback.error is not None else None
        self.feedback.keep(gradient, self.window, step, accepted, self._owns(gradient))
        self.window.commit(j.to(self.device), accepted)
        self.compressor.commit(accepted)

    def gradient(self, l2: float = 0.0) -> Tensor:
        """g + l2 * p, (n, rows, cols) in the compute dtype; zeros where a parameter has no gradient.

        May share memory with `p.grad`, which is never written to.
        """
        shape, dtype = matrix_shape(self.params[0]), compute_dtype(self.params[0])
        grads = [_gradient(p).reshape(shape).to(dtype) for p in self.params]
        stacked = torch.stack(grads) if len(grads) > 1 else grads[0][None]
        if l2:
            stacked = stacked if self._owns(stacked) else stacked.clone()
            for g, p in zip(stacked, self.params, strict=True):
                if p.grad is not None:
                    matrix = p.reshape(shape)
                    for part in chunks(shape[0], 8 * shape[1]):
                        g[part].add_(matrix[part].to(dtype), alpha=l2)
        return stacked

    def _owns(self, gradient: Tensor | None) -> bool:
        """Whether `gradient` is a copy, which may be overwritten."""
        grad = self.params[0].grad
        return gradient is not None and (grad is None or grad.is_sparse or gradient.data_ptr() != grad.data_ptr())

    def buffers(self) -> dict[str, Tensor]:
        """State name -> buffer (n, ...)."""
        found = {
            "error": self.feedback.error,
            "warm_start": getattr(self.compressor, "q", None),
            **self.window.state,
            "momentum": self.momentum,
        }
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def apply(self, update: Tensor, lr: float, weight_decay: float, momentum: float, accepted: bool | Tensor) -> None:
        """v <- mu v + (1 - mu) u;  p <- (1 - lr*wd) p - lr v. Low-precision parameters are rounded once.

        Of a step that is not `accepted`, u is zero; with lr and 1 - mu zero too, nothing moves.
        """
        new_part = 1 - momentum
        if accepted is not True:
            flag = accepted.to(update)
            lr, new_part = lr * flag, new_part * flag
        if self.momentum is not None:
            update = self.momentum.lerp_(update, new_part)
        for p, u in zip(self.params, update, strict=True):
            if not p.requires_grad:  # frozen since; its rows stay in the window, which K counts
                continue
            u = u.view(p.shape)
            if p.dtype == u.dtype:
                if weight_decay:
                    p.mul_(1 - lr * weight_decay)
                add_scaled_(p, u, -lr)
                continue
            p, u = (p, u) if p.ndim else (p.view(1), u.view(1))
            for part in chunks(len(p), 8 * p[:1].numel()):
                new = p[part].to(u.dtype)
                if weight_decay:
                    new.mul_(1 - lr * weight_decay)
                p[part] = add_scaled_(new, u[part], -lr)


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


# (n, rows, cols, first parameter, salt) -> (compressor, window), or None where a plain row is smaller.
RowFormat = Callable[[int, int, int, Tensor, Tensor], tuple[object, Window] | None]


def build_stacks(groups: Iterable[list[Tensor]], options, formats: list[RowFormat | None]) -> list[Stack]:
    """Group parameters into stacks and allocate their state, all zeros.

    Args:
        groups: the trainable parameters of each parameter group.
        options: WindowOptions.
        formats: for each group, the compressor and window of tensors of two or more dimensions; None: plain rows.
    """
    alike: dict[tuple, list[tuple[int, Tensor]]] = {}
    number = 0
    for index, params in enumerate(groups):
        for p in params:
            key = (index, matrix_shape(p), p.ndim < 2, p.dtype, p.device)
            alike.setdefault(key, []).append((number, p))
            number += 1
    stacks = []
    for (index, _, plain, _, _), members in alike.items():
        for part in _parts(members):
            params = [p for _, p in part]
            salt = torch.tensor([number for number, _ in part], device=params[0].device)
            stacks.append(_allocate(params, index, salt, options, None if plain else formats[index]))
    return stacks


def _parts(members: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    first = members[0][1]
    limit = STACK_BYTES.get(first.device.type, STACK_BYTES_ACCELERATOR)
    size = max(1, limit // max(1, first.numel() * compute_dtype(first).itemsize))
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _allocate(params: list[Tensor], index: int, salt: Tensor, options, row_format: RowFormat | None) -> Stack:
    n, first, (rows, cols) = len(params), params[0], matrix_shape(params[0])
    dtype, device = compute_dtype(first), first.device
    window_dtype = options.window_dtype or dtype
    compressed = row_format(n, rows, cols, first, salt) if row_format else None
    if compressed is None:
        window = DenseWindow(n, options.window_size, rows, cols, dtype=window_dtype, compute_dtype=dtype, device=device)
        compressed = Identity(), window
        exact = window_dtype.itemsize >= dtype.itemsize
    else:
        exact = False
    error = None if exact else torch.zeros(n, rows, cols, dtype=options.error_dtype or dtype, device=device)
    momentum = torch.zeros(n, rows, cols, dtype=dtype, device=device) if options.momentum else None
    return Stack(params, index, compressed[0], ErrorFeedback(error, salt), compressed[1], momentum)
