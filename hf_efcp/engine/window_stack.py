"""Stacks of a method with a window: n tensors of one shape, from the gradient to the window, and from there to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.accumulated import Accumulated
from ..core.compressors import Identity
from ..core.deferred import masked
from ..kernels.devices import is_plain, kind
from .apply import Rest, apply
from .formats import EntryFormat
from .method import Group
from .stacks import Floats, Number, Piece, Stack, times


class WindowStack(Stack):
    """n pieces of one shape, which pass from the gradient to the window, and from the window to the parameter.

    Args:
        pieces, total: see Stack.
        format: of their entries.
    """

    def __init__(self, pieces: list[Piece], format: EntryFormat, total: Callable[[Tensor], Tensor] | None = None):
        super().__init__(pieces, format.specs(), total)
        self.format = format
        self.compressor = format.compressor(self)
        self.window = format.window(self.buffers)
        self.error = self.cell("error") if "error" in self.buffers else None
        self.residual = self.cell("residual") if "residual" in self.buffers else None
        self.momentum = self.buffers.get("momentum")
        self.metric = format.metric(self)

    def stage(self, step: Tensor, l2: Floats) -> None:
        """Compute a = e + S^-1 g, and c = C(a) as the window stores it. The state does not change.

        A parameter without a gradient gives an entry of zeros, and its error stays as it is.
        """
        self.open(step)
        gradients = self.gradients(l2)
        if self.metric is not None:
            self.metric.measure(gradients)
        self.compress(gradients)

    def compress(self, gradients: Sequence[Tensor]) -> None:
        """Stage the entry c = C(a)."""
        self.window.stage(self.compressor.compress(self.accumulated(gradients), self.turn.step))

    def accumulated(self, gradients: Sequence[Tensor]) -> Accumulated:
        """Give the operand a = e + S^-1 g."""
        if self.metric is None:
            return Accumulated(gradients, self.error, self.turn.absent, self.total)
        return Accumulated(self.metric.whitened(gradients), self.error, self.turn.absent, self.total, self.metric.entering)

    def dots(self, j: Tensor) -> Tensor:
        """Give the staged entry's inner products with the window, (n, m) fp64. An entry that is the gradient is then released."""
        dots = self.window.dots(j.to(self.device))
        if isinstance(self.compressor, Identity):
            self.window.release()
        return dots

    def commit(self, j: Tensor, l2: Floats, ok: bool | Tensor) -> None:
        """If the step is accepted: e <- a - c, or r <- beta r + S^-1 g - c; c goes into slot j; D takes g."""
        gradients = self.gradients(l2)
        if self.window.staged is None:
            self.compress(gradients)
        self.turn.ok = ok
        if self.error is not None and self.window.staged is not None:
            self.accumulated(gradients).keep(self.window.staged)
        if self.residual is not None and self.window.staged is not None:
            a = self.accumulated(gradients)
            a.error, a.decay = self.residual, self.format.options.averaging
            a.keep(self.window.staged)
        self.window.commit(j.to(self.device), ok)
        self.compressor.commit()
        if self.metric is not None:
            self.metric.commit(gradients)

    def apply(self, c: Tensor, outside: Tensor, groups: Sequence[Group], options: Any) -> None:
        """Form u = S^-1 (G^T c + outside * r) for c (n, m) and outside (n,);  v <- mu v + (1 - mu) u;  p <- (1 - lr*wd) p - lr v.

        A tensor without a gradient does not change, and neither does its v. A large tensor's u is formed a few rows at a time. In
        a refused step on a GPU, u, lr and 1 - mu are zero, so nothing changes. Where tensors have different rates, the rates
        multiply c and `outside`, since u is linear in both; with momentum they multiply v.
        """
        ok, absent, momentum, own = self.turn.ok, self.turn.absent, options.momentum, None
        lr, weight_decay = self.rates(groups, options)
        if isinstance(lr, list):
            c, outside = (c, outside) if momentum else (times(c, lr), times(outside, lr))
            own, lr = lr if momentum else None, 1.0
        if isinstance(weight_decay, list) and all(p.dtype == self.layout.dtype for p in self.params):
            self._shrink([lr * x for x in weight_decay])
            weight_decay = 0.0
        outside = outside if self.residual is None else outside.to(self.layout.dtype)
        if len(absent) == len(self.pieces):
            return
        if not isinstance(weight_decay, list) and self._apply_at_once(c, outside, lr, weight_decay):
            return
        rate: Number = lr
        new_part: Number = 1 - momentum
        if isinstance(ok, Tensor):
            flag = ok.to(self.device, self.layout.dtype)
            rate, new_part = lr * flag, new_part if self.momentum is None else new_part * flag

        def finished(u: Tensor, rows: slice) -> Tensor:
            return self._finished(u, outside, rows)

        def update(rows: slice) -> Tensor:
            u = finished(self.window.combine(c, rows), rows)
            if self.momentum is None:
                return u
            v = self.momentum[:, rows]
            kept = [v[i].clone() for i in absent]  # a list as an index would wait for a GPU
            v.lerp_(u, new_part)
            for i, x in zip(absent, kept, strict=True):
                v[i] = x
            return v if own is None else times(v, own)

        rounding = self.turn.step if options.stochastic_rounding else None
        sizes = None if self.metric is None else self.metric.scale
        if kind(self.device) == "cpu" or self.momentum is not None or (self.metric is not None and sizes is None):
            apply(self, update, rate, weight_decay, rounding, absent)
            return
        rest = Rest(finished, sizes, None if self.residual is None else (self.residual.stored, outside))
        apply(self, lambda rows: self.window.product(c, rows), rate, weight_decay, rounding, absent, rest)

    def update(self, c: Tensor, outside: Tensor, rows: slice) -> Tensor:
        """Give rows `rows` of u (with momentum, of v), which `apply` has just multiplied by lr and subtracted; change nothing."""
        if self.momentum is not None:
            return self.momentum[:, rows]
        outside = outside if self.residual is None else outside.to(self.layout.dtype)
        return self._finished(self.window.combine(c, rows), outside, rows)

    def _finished(self, u: Tensor, outside: Tensor, rows: slice) -> Tensor:
        """Make rows of u from rows of G^T c."""
        u = u.to(self.layout.dtype)
        if self.residual is not None:
            u += outside[:, None, None] * self.residual.read(rows)
        return u if self.metric is None else self.metric.unwhiten_(u, rows)

    def _shrink(self, by: Sequence[Any]) -> None:
        """Compute p <- (1 - by_i) p for the tensors that have a gradient, if the step is accepted."""
        live = sorted(set(range(len(self.pieces))).difference(self.turn.absent))
        ok = 1.0 if self.turn.ok is True else torch.as_tensor(self.turn.ok).to(self.device, self.layout.dtype)
        if live:
            torch._foreach_mul_([self.pieces[i].data for i in live], [1 - by[i] * ok for i in live])

    def _apply_at_once(self, c: Tensor, outside: Tensor, lr: Number, weight_decay: Number) -> bool:
        """Do the plain case of `apply` without forming u; tell whether it was done."""
        pieces, dtype = self.pieces, self.layout.dtype
        factors = None if self.metric is None else self.metric.scale
        plain = self.momentum is None and not self.turn.absent and (self.metric is None or factors is not None)
        params = [piece.data for piece in pieces] if plain else []
        if not plain or any(p.dtype != dtype for p in params):
            return False
        matrices = kernels.Held(p if p.shape == self.shape else p.reshape(self.shape) for p in params)
        matrices[:] = [matrix.resolve_neg().contiguous() for matrix in matrices]
        decay: Number = 1 - lr * weight_decay if weight_decay else 1.0
        if weight_decay and isinstance(self.turn.ok, Tensor):  # a refused step has c = 0, and must not shrink p
            kept = decay if isinstance(decay, Tensor) else torch.full((), decay, dtype=dtype, device=self.device)
            decay = masked(self.turn.ok, kept, 1.0)
        if not self.window.apply(c, matrices, -lr, decay, factors):
            return False
        if self.residual is not None:
            self.residual.add_to(matrices, -lr * outside, factors)
        for p, matrix in zip(params, matrices, strict=True):
            if not is_plain(p):  # then the matrix is a copy
                p.copy_(matrix.view(p.shape))
        # Autograd does not see a kernel's writes. The new version makes it refuse a graph from before.
        torch.autograd.graph.increment_version([piece.param for piece in pieces])
        return True
