"""Algorithm 1 of EFCP (arXiv 2306.06098): the step of every method that keeps a window, whatever its compressor and its phi."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Layout, Spec
from ..core.coefficients import quadratic
from ..core.compressors import Identity
from ..core.deferred import masked, readable
from ..core.gram import GramMatrix
from .apply import apply
from .costs import Count
from .diagnostics import of_last_step
from .factor_sync import FactorSync
from .formats import EntryFormat, costs_of
from .method import Group
from .phases import LISTENER, PHASES
from .setup import Setup, decoupled_of, l2_of
from .stacks import Piece, Stack


class WindowStack(Stack):
    """n pieces of one shape, with their way from the gradient to the window and from the window to the parameter.

    Args:
        pieces, group, total: as in Stack.
        format: of their entries.
    """

    def __init__(self, pieces: list[Piece], group: int, format: EntryFormat, total: Callable[[Tensor], Tensor] | None = None):
        super().__init__(pieces, group, format.specs(), total)
        self.format = format
        self.compressor = format.compressor(self)
        self.window = format.window(self.buffers)
        self.error = self.cell("error") if "error" in self.buffers else None
        self.momentum = self.buffers.get("momentum")

    def stage(self, step: Tensor, l2: float) -> None:
        """Compute a = e + g and c = C(a) as the window stores it; the state stays as it is.

        A parameter without a gradient gives an entry of zeros, and its error stays.
        """
        self.open(step)
        self._compress(l2)

    def _compress(self, l2: float) -> None:
        self.window.stage(self.compressor.compress(self.accumulated(self.error, l2), self.turn.step))

    def dots(self, j: Tensor) -> Tensor:
        """Give the staged entry's inner products with the window, (n, m) fp64. A plain entry, the gradient, is not held."""
        dots = self.window.dots(j.to(self.device))
        if isinstance(self.compressor, Identity):
            self.window.release()
        return dots

    def commit(self, j: Tensor, l2: float, ok: bool | Tensor) -> None:
        """Let e <- a - c, and write c into slot j, where the step is accepted."""
        if self.window.staged is None:
            self._compress(l2)
        self.turn.ok = ok
        if self.error is not None and self.window.staged is not None:
            self.accumulated(self.error, l2).keep(self.window.staged)
        self.window.commit(j.to(self.device), ok)
        self.compressor.commit()

    def apply(self, c: Tensor, group: Group, options: Any) -> None:
        """Let u = G^T c for coefficients c (n, m);  v <- mu v + (1 - mu) u;  p <- (1 - lr*wd) p - lr v.

        A large tensor's u is never whole. Of a refused step, u is zero; with lr and 1 - mu zero too, nothing moves.
        """
        ok, lr, weight_decay, momentum = self.turn.ok, float(group["lr"]), decoupled_of(group, options), options.momentum
        if self._apply_at_once(c, lr, weight_decay):
            return
        rate: float | Tensor = lr
        new_part: float | Tensor = 1 - momentum
        if isinstance(ok, Tensor):
            flag = ok.to(self.device, self.layout.dtype)
            rate, new_part = lr * flag, new_part * flag

        def update(rows: slice) -> Tensor:
            u = self.window.combine(c, rows)
            return u if self.momentum is None else self.momentum[:, rows].lerp_(u, new_part)

        frozen = [i for i, piece in enumerate(self.pieces) if not piece.param.requires_grad]
        apply(self, update, rate, weight_decay, self.turn.step if options.stochastic_rounding else None, frozen)

    def _apply_at_once(self, c: Tensor, lr: float, weight_decay: float) -> bool:
        """Do the plain case of `apply` without forming u; tell whether the window can."""
        pieces, dtype = self.pieces, self.layout.dtype
        unmasked = self.turn.ok is True or not weight_decay  # of a refused step c is zero
        plain = unmasked and self.momentum is None and all(piece.param.requires_grad for piece in pieces)
        params = [piece.data for piece in pieces] if plain else []
        if not plain or any(p.dtype != dtype for p in params):
            return False
        matrices = [p.reshape(self.shape).contiguous() for p in params]  # copies where the layout is another
        if not self.window.apply(c, matrices, -lr, 1 - lr * weight_decay):
            return False
        for p, matrix in zip(params, matrices, strict=True):
            if matrix.data_ptr() != p.data_ptr():
                p.copy_(matrix.view(p.shape))
        # A kernel writes unseen by autograd, which has to refuse a graph from before.
        torch.autograd.graph.increment_version([piece.param for piece in pieces])
        return True


class Windowed:
    """A preconditioner phi(K) on a window of compressed gradients: u = G^T c, c = phi(K) w. A `Method`.

    Args:
        entries: the format of compressed tensors.
        phi: (options, gram, j, dtype) -> c = phi(K) w, (groups, m) fp64: for K with the newest entry in it, its slot j, a (1,)
            int64 tensor, and the dtype in which G^T c will be summed.
        solve: m -> fp64 operations of `phi` for one Gram matrix.
    """

    def __init__(
        self,
        entries: type[EntryFormat],
        phi: Callable[[Any, GramMatrix, Tensor, torch.dtype], Tensor],
        solve: Callable[[int], float],
    ):
        self.entries, self.phi, self.solve = entries, phi, solve
        self.takes_flat_pieces = entries.takes_flat_pieces

    def format(self, layout: Layout, group: Group, options: Any, flat: bool) -> EntryFormat:
        """Choose the format of a tensor's entries."""
        if group.get("compress", True) and (flat or not layout.vector):
            compressed = self.entries(layout, options)
            if compressed.pays():
                return compressed
        return EntryFormat(layout, options)

    def specs(self, layout: Layout, group: Group, options: Any, flat: bool) -> tuple[Spec, ...]:
        """See Method."""
        return self.format(layout, group, options, flat).specs()

    def shared_specs(self, number: int, options: Any) -> tuple[Spec, ...]:
        """See Method: K of the model, or of each tensor."""
        m = options.window_size
        gram = Spec("gram", (m, m), torch.float64, window=True, held="everywhere")
        step = Spec("step", (), torch.int64, window=True, held="everywhere")
        skipped = Spec("skipped", (), torch.int64, held="everywhere")
        return (gram, step, skipped) if number == 0 else (gram,) if options.scope == "layer" else ()

    def make_stack(
        self,
        pieces: list[Piece],
        index: int,
        group: Group,
        options: Any,
        flat: bool,
        sync: FactorSync,
        total: Callable[[Tensor], Tensor] | None,
    ) -> WindowStack:
        """See Method."""
        format = self.format(Layout.of(pieces[0].param), group, options, flat)
        return WindowStack(pieces, index, sync.in_window(format), total)

    def make_counters(self, number: int, options: Any, device: torch.device) -> GramMatrix:
        """See Method."""
        return GramMatrix(number if options.scope == "layer" else 1, options.window_size, device)

    # fmt: off
    def step(self, setup: Setup, groups: Sequence[Group], o: Any) -> None:
        """Take a step of Algorithm 1."""
        gram, stacks, phase, dots = setup.counters, setup.stacks, LISTENER.get(), []
        j, l2 = gram.next_slot(), [l2_of(group, o) for group in groups]
        for f in setup.factors:
            f.stage(gram.step)                                                  # made during backward, see factor_sync.py
        for s in stacks:
            with phase("compress"):
                s.stage(gram.step, l2[s.group])                                 # a = e + g;  c_j = C(a), as the window stores it
            with phase("dots"):
                dots.append(s.dots(j))                                          # <c_j, c_i> for all i
        k_j = setup.placement.sum(_new_row(stacks, dots, gram, o.scope))
        ok = _finite(k_j)                                                       # on a GPU a flag, which masks what follows
        if ok is False:
            return gram.count(ok)
        for s in (*stacks, *setup.factors):
            with phase("feedback"):
                s.commit(j, l2[s.group], ok)                                    # e <- a - c_j;  slot j of G <- c_j
        with phase("solve"):
            gram.update(j, k_j, ok)
            c = _rescaled(self.phi(o, gram, j, setup.dtype), setup, o.update_rms, ok)  # c = phi(K) w
        for s in stacks:
            with phase("update"):
                s.apply(_coefficients_of(c, s, o.scope), groups[s.group], o)             # u = G^T c;  p <- (1 - lr wd) p - lr u
        setup.finish(c, ok)
    # fmt: on

    def costs(self, setup: Setup, options: Any) -> dict[str, Count]:
        """See Method: of a step with a full window."""
        counts = {name: Count() for name in PHASES}
        for s in setup.stacks:
            for name, count in costs_of(s).items():
                counts[name] += count
        gram = setup.counters.matrix
        groups, m, _ = gram.shape
        counts["solve"] += Count(fp64=groups * self.solve(m), bytes=gram.nbytes + 2 * groups * m * 8)
        return counts

    def diagnostics(self, setup: Setup) -> dict[str, float]:
        """See Method."""
        return of_last_step(setup)


def _new_row(stacks: Iterable[WindowStack], dots: Iterable[Tensor], gram: GramMatrix, scope: str) -> Tensor:
    """Sum the new row of K, (groups, m), over all tensors of this process; or give each tensor its own."""
    k_j = torch.zeros_like(gram.matrix[:, 0])
    for s, d in zip(stacks, dots, strict=True):
        if scope == "layer":
            k_j.index_add_(0, s.ids.to(k_j.device), d.to(k_j.device))
        else:
            k_j += d.sum(0).to(k_j.device)
    return k_j


def _finite(k_j: Tensor) -> bool | Tensor:
    """Tell whether the staged entry may enter: a flag, or on a GPU the tensor that holds it.

    A gradient with NaN or infinity leaves its mark in the entry's own norm.
    """
    finite = k_j.isfinite().all()
    return bool(finite) if readable(finite.device) else finite


def _rescaled(c: Tensor, setup: Setup, rms: float | None, ok: bool | Tensor) -> Tensor:
    """Multiply c by rms * sqrt(d) / |u|: |u|^2 = c^T K c is free, so no pass over the parameters is needed.

    A refused step has zeros.
    """
    if rms is not None:
        norm = quadratic(setup.counters.matrix, c).sum().sqrt()
        c = c * torch.where(norm > 0, rms * math.sqrt(setup.coordinates) / norm, 0.0)
    # Gradients near the smallest fp32 number ask for coefficients beyond the largest: they are zeros.
    c = torch.where(c.abs().amax(-1, keepdim=True) < torch.finfo(setup.dtype).max / 2**20, c, 0.0)
    return c if ok is True else masked(ok, c, 0.0)


def _coefficients_of(c: Tensor, s: WindowStack, scope: str) -> Tensor:
    """Give the stack's coefficients, (n, m)."""
    c = c.to(s.device)
    return c.index_select(0, s.ids) if scope == "layer" else c.expand(len(s.pieces), -1)
