"""Algorithm 1 of EFCP (arXiv 2306.06098): the step of every method with a window, whatever its compressor and its phi."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Layout, Parts, Spec, matrix_shape
from ..core.gram import GramMatrix
from ..core.linalg import ieee_matmul
from .costs import Count
from .diagnostics import of_last_step
from .factor_sync import FactorSync
from .formats import EntryFormat, costs_of, fp32_stays
from .method import Group
from .phases import PHASES, listener
from .setup import Setup, l2_of
from .sizes import averaged, by_group, finite, joined, over_processes, rescaled, rest_of
from .stacks import Piece
from .together import stacks_of
from .validate import gram_problem
from .window_stack import WindowStack

# A share of all parameters that is worth a line in the log.
_MANY = 0.05


class Windowed:
    """A preconditioner phi(K) on a window of compressed gradients: u = G^T c, c = phi(K) w. A `Method`.

    Args:
        entries: the format of compressed tensors.
        phi: (options, gram, j, w, dtype) -> c = phi(K) w, (groups, m) fp64. K contains the newest entry; j is its slot, a (1,)
            int64 tensor; w is (groups, m) fp64; dtype is the one in which G^T c will be summed.
        solve: m -> fp64 operations of `phi` for one Gram matrix.
        outside: (options, gram) -> phi(0), (groups,) fp64, by which residuals are preconditioned; None: the method takes no
            residuals.
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
        """See Method: K of the model, or K of each tensor."""
        m = options.window_size
        gram = Spec("gram", (m, m), torch.float64, window=True, held="everywhere")
        step = Spec("step", (), torch.int64, window=True, held="everywhere")
        skipped = Spec("skipped", (), torch.int64, held="everywhere")
        return (gram, step, skipped) if number == 0 else (gram,) if options.scope == "layer" else ()

    def make_stack(
        self,
        pieces: list[Piece],
        group: Group,
        options: Any,
        flat: Parts | None,
        sync: FactorSync,
        total: Callable[[Tensor], Tensor] | None,
    ) -> WindowStack:
        """See Method."""
        format = self.format(Layout.of(pieces[0].param), group, options, flat)
        return WindowStack(pieces, sync.in_window(format), total)

    def make_counters(self, number: int, options: Any, device: torch.device) -> GramMatrix:
        """See Method."""
        return GramMatrix(number if options.scope == "layer" else 1, options.window_size, device)

    # fmt: off
    def step(self, setup: Setup, groups: Sequence[Group], o: Any) -> None:
        """Take a step of Algorithm 1."""
        gram, stacks, phase, dots = setup.counters, stacks_of(setup), listener(), []
        j, t, l2 = gram.next_slot(), gram.step.clone(), [l2_of(group, o) for group in groups].__getitem__
        for f in setup.factors:
            f.stage(t)                                                          # made during backward, see factor_sync.py
        for s in stacks:
            with phase("compress"):
                s.stage(t, s.each(l2))                                          # a = e + S^-1 g;  c_j = C(a), as it is stored
            with phase("dots"):
                dots.append(s.dots(j))                                          # <c_j, c_i> for all i
        k_j, size = over_processes(setup, stacks, _new_row(stacks, dots, gram, o.scope), o)  # and |S|^2
        ok = finite(k_j, size)                                                 # on a GPU a flag, which masks what follows
        if ok is False:
            return gram.count(ok)
        with phase("solve"):
            gram.update(j, k_j, ok)
            w, c = self._solved(setup, j, o)                                    # c = phi(K) w; so far K alone is new
        if setup.probe is not None:
            setup.probe.read_entries(stacks)                                    # of a and c_j, for `diagnostics`
        setup.writing = True
        for s in (*stacks, *setup.factors):
            with phase("feedback"):
                s.commit(j, s.each(l2), ok)                                     # e <- a - c_j;  slot j of G <- c_j;  D
        with phase("solve"):
            if self._settled(setup, o):                                         # K was not that of the entries, as they are now
                w, c = self._solved(setup, j, o)
            rest = rest_of(setup, stacks, self.outside, o)                      # of gradients, outside of the window
            c, rest = rescaled(c, rest, w, gram, size, o, setup.dtype, ok)      # update_rms
        for s in stacks:
            s.turn.step = gram.step
            with phase("update"):                                               # u = S^-1 G^T c;  p <- (1 - lr wd) p - lr u
                s.apply(_coefficients_of(c, s, o.scope), _coefficients_of(rest.weight, s, o.scope), groups, o)
        if setup.probe is not None:
            setup.probe.read_committed(j, lambda s: (_coefficients_of(c, s, o.scope), _coefficients_of(rest.weight, s, o.scope)))
            setup.probe.finish(ok)
        setup.finish(c, ok, size, (rest.weight.square() * rest.square).sum())
    # fmt: on

    def mend(self, setup: Setup, options: Any) -> None:
        """See Method: at step 0 the window is emptied, later K is made to fit the entries. Several processes do so in a step."""
        gram = setup.counters
        if bool(gram.step == 0):
            gram.matrix.zero_()
            for s in setup.stacks:
                for spec in s.specs.values():
                    if spec.window or spec.kind == "residual":  # a residual's running mean counts the window's steps
                        s.buffers[spec.name].zero_()
        elif setup.placement.alone:
            self._renew(setup, options, int(gram.step) - 1)

    def _solved(self, setup: Setup, j: Tensor, o: Any) -> tuple[Tensor, Tensor]:
        """Give w, the average that is preconditioned, and c = phi(K) w."""
        w = averaged(setup.counters.matrix, setup.counters, j, o)
        return w, self.phi(o, setup.counters, j, w, setup.dtype)

    def _settled(self, setup: Setup, options: Any) -> bool:
        """Form K anew if a process had a doubt: no process knows of changes to others' entries. Tell whether it was formed."""
        if setup.heard is None or not setup.doubts.exchange(setup.heard):
            return False
        setup.doubt = False
        if int(setup.counters.step) > 1:  # the newest row is right
            self._renew(setup, options, int(setup.counters.step) - 2)
        return True

    def _renew(self, setup: Setup, options: Any, step: int) -> None:
        """Form K anew from the entries, where the row of K that `step` wrote does not fit the entries."""
        gram, total = setup.counters, setup.placement.sum
        slot = step % gram.window_size
        wrong = ~gram.agrees(slot, total(self._row(setup, slot, options))) | ~gram.matrix.flatten(1).any(1)
        if bool(wrong.any()):
            for i in range(int(gram.filled)):
                gram.put(i, total(self._row(setup, i, options)), wrong)

    def problem(self, setup: Setup, options: Any) -> str | None:
        """See Method: K has to fit the entries. A zero K was lost with the first parameter's entries, and is formed anew."""
        if bool(setup.counters.step > 0) and not bool(setup.counters.matrix.any()):
            self.mend(setup, options)
            return None
        window = sum(s.nbytes for specs in setup.specs.values() for s in specs.values() if s.kind == "window")
        return gram_problem(setup.counters, lambda slot: self._row(setup, slot, options), setup.placement, window, options.verify)

    def _row(self, setup: Setup, slot: int, options: Any) -> Tensor:
        """Form this process's part of a row of K, (groups, m) fp64, from the entries as they are stored."""
        gram, dots = setup.counters, []
        with ieee_matmul(gram.step.device):
            for s in setup.stacks:
                s.window.staged = s.window.stored(slot)
                dots.append(s.window.dots(torch.tensor([slot], device=s.device)))
                s.window.release()
        return _new_row(setup.stacks, dots, gram, options.scope)

    def remarks(self, setup: Setup, options: Any, given: Container[str]) -> list[str]:
        """See Method: small matrices' rank, if they are more than a classification head; a product that stays in fp32."""
        lines, small = [], {}
        for p, specs in setup.specs.items():
            if "warm_start" in specs and (rank := specs["warm_start"].shape[1]) < min(options.rank, *matrix_shape(p)):
                small[p] = rank
        if sum(p.numel() for p in small) > _MANY * sum(p.numel() for p in setup.params):
            ranks, example = sorted(set(small.values())), " x ".join(map(str, matrix_shape(next(iter(small)))))
            between = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            which = f"{len(small)} small or thin {'matrix' if len(small) == 1 else 'matrices'}"
            lines.append(
                f"rank {between} instead of {options.rank} for {which}, such as {example} "
                f"(max_rank_fraction={options.max_rank_fraction})"
            )
        if "window_update_dtype" in given and any(fp32_stays(options, s.layout, s.device) for s in setup.stacks):
            lines.append(
                f"window_update_dtype=bfloat16 has no effect on this {'CPU' if setup.stacks[0].device.type == 'cpu' else 'GPU'}: "
                "without instructions for bf16 it would be slower than fp32"
            )
        return lines

    def costs(self, setup: Setup, options: Any) -> dict[str, Count]:
        """See Method. The counts are those of a step with a full window."""
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
    """Sum the new row of K, (groups, m), over all tensors of this process; with scope="layer", give each tensor's own row."""
    like = gram.matrix[:, 0]
    return by_group([s.ids for s in stacks], joined(dots, like).view(-1, like.shape[1]), like, scope)


def _coefficients_of(c: Tensor, s: WindowStack, scope: str) -> Tensor:
    """Take the stack's coefficients, (n, ...), from those of the Gram matrices."""
    c = c.to(s.device)
    return c.index_select(0, s.ids) if scope == "layer" else c.expand(len(s.pieces), *c.shape[1:])
