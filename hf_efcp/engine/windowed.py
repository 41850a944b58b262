"""Algorithm 1 of EFCP (arXiv 2306.06098): the step of every method that keeps a window, whatever its compressor and its phi."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.accumulated import Accumulated
from ..core.cells import Layout, Parts, Spec, matrix_shape
from ..core.compressors import Identity
from ..core.deferred import masked
from ..core.gram import GramMatrix
from ..core.linalg import ieee_matmul
from ..kernels.devices import kind
from .apply import Rest, apply
from .costs import Count
from .diagnostics import of_last_step
from .factor_sync import FactorSync
from .formats import EntryFormat, costs_of, fp32_stays
from .method import Group
from .phases import PHASES, listener
from .setup import Setup, decoupled_of, l2_of, rate_of
from .sizes import averaged, by_group, finite, joined, over_processes, rescaled, rest_of
from .stacks import Piece, Stack
from .validate import gram_problem

# A share of all parameters that is worth a line in the log.
_MANY = 0.05


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
        self.residual = self.cell("residual") if "residual" in self.buffers else None
        self.momentum = self.buffers.get("momentum")
        self.metric = format.metric(self)

    def stage(self, step: Tensor, l2: float) -> None:
        """Compute a = e + S^-1 g and c = C(a) as the window stores it; the state stays as it is.

        A parameter without a gradient gives an entry of zeros, and its error stays.
        """
        self.open(step)
        gradients = self.gradients(l2)
        if self.metric is not None:
            self.metric.measure(gradients)
        self._compress(gradients)

    def _compress(self, gradients: Sequence[Tensor]) -> None:
        self.window.stage(self.compressor.compress(self._accumulated(gradients), self.turn.step))

    def _accumulated(self, gradients: Sequence[Tensor]) -> Accumulated:
        """Give the operand a = e + S^-1 g."""
        if self.metric is None:
            return Accumulated(gradients, self.error, self.turn.absent, self.total)
        return Accumulated(self.metric.whitened(gradients), self.error, self.turn.absent, self.total, self.metric.entering)

    def dots(self, j: Tensor) -> Tensor:
        """Give the staged entry's inner products with the window, (n, m) fp64. A plain entry, the gradient, is not held."""
        dots = self.window.dots(j.to(self.device))
        if isinstance(self.compressor, Identity):
            self.window.release()
        return dots

    def commit(self, j: Tensor, l2: float, ok: bool | Tensor) -> None:
        """Let e <- a - c, or r <- beta r + S^-1 g - c; write c into slot j, and let D contain g; where the step is accepted."""
        gradients = self.gradients(l2)
        if self.window.staged is None:
            self._compress(gradients)
        self.turn.ok = ok
        if self.error is not None and self.window.staged is not None:
            self._accumulated(gradients).keep(self.window.staged)
        if self.residual is not None and self.window.staged is not None:
            a = self._accumulated(gradients)
            a.error, a.decay = self.residual, self.format.options.averaging
            a.keep(self.window.staged)
        self.window.commit(j.to(self.device), ok)
        self.compressor.commit()
        if self.metric is not None:
            self.metric.commit(gradients)

    def apply(self, c: Tensor, outside: Tensor, group: Group, options: Any) -> None:
        """Let u = S^-1 (G^T c + outside * r) for c (n, m) and outside (n,);  v <- mu v + (1 - mu) u;  p <- (1 - lr*wd) p - lr v.

        A tensor without a gradient stays where it is, and so does its v. A large tensor's u is never whole. Of a refused step,
        u is zero; with lr and 1 - mu zero too, nothing moves.
        """
        ok, lr, weight_decay, momentum = self.turn.ok, rate_of(group), decoupled_of(group, options), options.momentum
        absent = self.turn.absent
        outside = outside if self.residual is None else outside.to(self.layout.dtype)
        if len(absent) == len(self.pieces) or self._apply_at_once(c, outside, lr, weight_decay):
            return
        rate: float | Tensor = lr
        new_part: float | Tensor = 1 - momentum
        if isinstance(ok, Tensor):
            flag = ok.to(self.device, self.layout.dtype)
            rate, new_part = lr * flag, new_part if self.momentum is None else new_part * flag

        def finished(u: Tensor, rows: slice) -> Tensor:
            u = u.to(self.layout.dtype)
            if self.residual is not None:
                u += outside[:, None, None] * self.residual.read(rows)
            return u if self.metric is None else self.metric.unwhiten_(u, rows)

        def update(rows: slice) -> Tensor:
            u = finished(self.window.combine(c, rows), rows)
            if self.momentum is None:
                return u
            v = self.momentum[:, rows]
            kept = [v[i].clone() for i in absent]  # a list as an index would wait for a GPU
            v.lerp_(u, new_part)
            for i, x in zip(absent, kept, strict=True):
                v[i] = x
            return v

        rounding, sizes = (
            self.turn.step if options.stochastic_rounding else None,
            None if self.metric is None else self.metric.scale,
        )
        if kind(self.device) == "cpu" or self.momentum is not None or (self.metric is not None and sizes is None):
            apply(self, update, rate, weight_decay, rounding, absent)
            return
        rest = Rest(finished, sizes, None if self.residual is None else (self.residual.stored, outside))
        apply(self, lambda rows: self.window.product(c, rows), rate, weight_decay, rounding, absent, rest)

    def _apply_at_once(self, c: Tensor, outside: Tensor, lr: float | Tensor, weight_decay: float) -> bool:
        """Do the plain case of `apply` without forming u; tell whether the window can."""
        pieces, dtype = self.pieces, self.layout.dtype
        factors = None if self.metric is None else self.metric.scale
        plain = self.momentum is None and not self.turn.absent and (self.metric is None or factors is not None)
        params = [piece.data for piece in pieces] if plain else []
        if not plain or any(p.dtype != dtype for p in params):
            return False
        # Copies where the layout is another.
        matrices = kernels.Held(p if p.shape == self.shape else p.reshape(self.shape) for p in params)
        matrices[:] = [matrix.contiguous() for matrix in matrices]
        decay: float | Tensor = 1 - lr * weight_decay if weight_decay else 1.0
        if weight_decay and isinstance(self.turn.ok, Tensor):  # of a refused step c is 0, and p has to stay
            kept = decay if isinstance(decay, Tensor) else torch.full((), decay, dtype=dtype, device=self.device)
            decay = masked(self.turn.ok, kept, 1.0)
        if not self.window.apply(c, matrices, -lr, decay, factors):
            return False
        if self.residual is not None:
            self.residual.add_to(matrices, -lr * outside, factors)
        for p, matrix in zip(params, matrices, strict=True):
            if not p.is_contiguous():  # then the matrix is a copy
                p.copy_(matrix.view(p.shape))
        # A kernel writes unseen by autograd, which has to refuse a graph from before.
        torch.autograd.graph.increment_version([piece.param for piece in pieces])
        return True


class Windowed:
    """A preconditioner phi(K) on a window of compressed gradients: u = G^T c, c = phi(K) w. A `Method`.

    Args:
        entries: the format of compressed tensors.
        phi: (options, gram, j, w, dtype) -> c = phi(K) w, (groups, m) fp64: for K with the newest entry in it, its slot j, a (1,)
            int64 tensor, w (groups, m) fp64, and the dtype in which G^T c will be summed.
        solve: m -> fp64 operations of `phi` for one Gram matrix.
        outside: (options, gram) -> phi(0), (groups,) fp64, by which residuals are preconditioned; None: there are none.
    """

    def __init__(
        self,
        entries: type[EntryFormat],
        phi: Callable[[Any, GramMatrix, Tensor, Tensor, torch.dtype], Tensor],
        solve: Callable[[int], float],
        outside: Callable[[Any, GramMatrix], Tensor] | None = None,
    ):
        self.entries, self.phi, self.solve, self.outside = entries, phi, solve, outside
        self.takes_flat_pieces = entries.takes_flat_pieces
        self.capturable = True

    def format(self, layout: Layout, group: Group, options: Any, flat: Parts | None) -> EntryFormat:
        """Choose the format of a tensor's entries."""
        layout = dataclasses.replace(layout, parts=flat)
        if group.get("compress", True) and (flat is not None or not layout.vector):
            compressed = self.entries(layout, options)
            if compressed.pays():
                return compressed
        return EntryFormat(layout, options)

    def specs(self, layout: Layout, group: Group, options: Any, flat: Parts | None) -> tuple[Spec, ...]:
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
        flat: Parts | None,
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
        gram, stacks, phase, dots = setup.counters, setup.stacks, listener(), []
        j, l2 = gram.next_slot(), [l2_of(group, o) for group in groups]
        for f in setup.factors:
            f.stage(gram.step)                                                  # made during backward, see factor_sync.py
        for s in stacks:
            with phase("compress"):
                s.stage(gram.step, l2[s.group])                                 # a = e + S^-1 g;  c_j = C(a), as it is stored
            with phase("dots"):
                dots.append(s.dots(j))                                          # <c_j, c_i> for all i
        k_j, size = over_processes(setup, _new_row(stacks, dots, gram, o.scope), o)  # and the sum of S^2
        ok = finite(k_j, size)                                                 # on a GPU a flag, which masks what follows
        if ok is False:
            return gram.count(ok)
        for s in (*stacks, *setup.factors):
            with phase("feedback"):
                s.commit(j, l2[s.group], ok)                                    # e <- a - c_j;  slot j of G <- c_j;  D
        with phase("solve"):
            w = averaged(gram.update(j, k_j, ok), gram, j, o)
            rest = rest_of(setup, self.outside, o)                                         # of gradients, outside of the window
            c, rest = rescaled(self.phi(o, gram, j, w, setup.dtype), rest, w, gram, size, o, setup.dtype, ok)  # c = phi(K) w
        for s in stacks:
            with phase("update"):                                               # u = S^-1 G^T c;  p <- (1 - lr wd) p - lr u
                s.apply(_coefficients_of(c, s, o.scope), _coefficients_of(rest.weight, s, o.scope), groups[s.group], o)
        setup.finish(c, ok, size, (rest.weight.square() * rest.square).sum())
    # fmt: on

    def mend(self, setup: Setup, options: Any) -> None:
        """See Method: without its K or its step a window is empty; and K is that of the entries, where one process has them."""
        gram, windows = setup.counters, [s for s in setup.stacks if s.pieces]
        started = bool(gram.step > 0)
        gone = ~gram.matrix.flatten(1).any(1) if started else torch.ones_like(gram.matrix[:, 0, 0], dtype=torch.bool)
        filled = int(gram.filled)
        if started and bool(gone.any()):  # a K of entries that are zero is zero, too: a tensor's that had no gradient yet
            gone &= torch.stack([self._row(setup, slot, options)[:, slot] for slot in range(filled)]).any(0)
        if bool(gone.any()):
            gram.matrix[gone] = 0
            for s in windows:
                empty = _coefficients_of(gone, s, options.scope)
                for spec in s.specs.values():
                    if spec.window or (spec.kind == "residual" and not started):  # a running mean counts steps as the window does
                        s.buffers[spec.name][empty] = 0
        if started and setup.placement.alone:
            newest = (int(gram.step) - 1) % gram.window_size
            if not gram.agrees(newest, self._row(setup, newest, options)):
                for slot in range(filled):
                    gram.put(slot, self._row(setup, slot, options))

    def problem(self, setup: Setup, options: Any) -> str | None:
        """See Method: K is that of the entries."""
        window = sum(s.nbytes for specs in setup.specs.values() for s in specs.values() if s.kind == "window")
        return gram_problem(setup.counters, lambda slot: self._row(setup, slot, options), setup.placement, window, options.verify)

    def _row(self, setup: Setup, slot: int, options: Any) -> Tensor:
        """Form a row of K, (groups, m) fp64, from the entries as they are stored."""
        gram, dots = setup.counters, []
        with ieee_matmul(gram.step.device):
            for s in setup.stacks:
                s.window.staged = s.window.stored(slot)
                dots.append(s.window.dots(torch.tensor([slot], device=s.device)))
                s.window.release()
        return _new_row(setup.stacks, dots, gram, options.scope)

    def remarks(self, setup: Setup, options: Any, given: Container[str]) -> list[str]:
        """See Method: the rank of small matrices, if they are more than a classification head; a product that stays in fp32."""
        lines, small = [], {}
        for p, specs in setup.specs.items():
            if "warm_start" in specs and (rank := specs["warm_start"].shape[1]) < min(options.rank, *matrix_shape(p)):
                small[p] = rank
        if sum(p.numel() for p in small) > _MANY * sum(p.numel() for p in setup.params):
            ranks, example = sorted(set(small.values())), " x ".join(map(str, matrix_shape(next(iter(small)))))
            between = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            lines.append(
                f"rank {between} instead of {options.rank} for the small and thin ones of the matrices, {len(small)} in number, "
                f"such as {example} (max_rank_fraction={options.max_rank_fraction})"
            )
        if "window_update_dtype" in given and any(fp32_stays(options, s.layout, s.device) for s in setup.stacks):
            lines.append(
                f"window_update_dtype=bfloat16 has no effect on this {'CPU' if setup.stacks[0].device.type == 'cpu' else 'GPU'}: "
                "without instructions for bf16 it would be slower than fp32"
            )
        return lines

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


def _new_row(stacks: Iterable[WindowStack], dots: Sequence[Tensor], gram: GramMatrix, scope: str) -> Tensor:
    """Sum the new row of K, (groups, m), over all tensors of this process; or give each tensor its own."""
    like = gram.matrix[:, 0]
    return by_group([s.ids for s in stacks], joined(dots, like).view(-1, like.shape[1]), like, scope)


def _coefficients_of(c: Tensor, s: WindowStack, scope: str) -> Tensor:
    """Give the stack's coefficients, (n, ...), from those of the groups."""
    c = c.to(s.device)
    return c.index_select(0, s.ids) if scope == "layer" else c.expand(len(s.pieces), *c.shape[1:])
