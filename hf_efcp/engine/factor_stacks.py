"""Stacks of the matrices whose factors the processes make together: errors, warm starts, metric, factors. See factor_sync.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated, LowRankEntry
from ..core.compressors import PowerIteration
from ..core.deferred import DelayedFlag
from ..core.lagged import Lagged
from ..core.metric import scaled_
from ..core.windows import LowRankWindow
from ..distributed.placement import Specs
from ..options import OptionError
from .stacks import Floats, Piece, Stack

# How many entries of a gradient are kept from backward to step, to see that it is still the same.
_SAMPLE = 16


class FactorStack(Stack):
    """Whole matrices whose factors the processes make together. The window has no slots: it only rounds the new entry.

    Attributes:
        start: the Q that this backward starts from, (n, cols, r).
        p, q: the factors, (n, rows, r) and (n, cols, r); zeros until the hook has seen their bucket.
        samples: some entries of the gradients that the hook has seen, (n, k).
        seen: the positions of these gradients.
        metric: of the matrices; None: there is no metric.
    """

    def __init__(self, pieces: list[Piece], specs: Specs, options: Any):
        super().__init__(pieces, [spec for name, spec in specs.items() if in_factors(name)])
        self.error, warm_start = self.cell("error"), self.cell("warm_start")
        self.compressor = PowerIteration(warm_start, options.power_iterations)
        n, rank = len(pieces), warm_start.buffer.shape[2]
        specs_of_window = LowRankWindow.specs(self.layout, 0, rank, specs["window_p"].dtype)
        rounding = {s.name: torch.zeros(n, *s.shape, dtype=s.dtype, device=self.device) for s in specs_of_window}
        self.window = LowRankWindow(rounding, self.layout.dtype)
        self.changed = DelayedFlag()
        self.start: Any = None
        self.p: Any = None
        self.q: Any = None
        self.samples: Any = None
        self.seen: set[int] = set()
        self._indices: dict[int, tuple[list[int], Tensor]] = {}
        cells = self.metric_cells()
        self.metric = Lagged(cells, self.layout, options.metric_beta, options.metric_eps) if cells else None

    def begin(self, step: Tensor) -> None:
        """Begin a backward. What an earlier backward has left without a step is dropped."""
        self.turn.step = step
        start = self.compressor.start(step)
        self.start, self.q = start, torch.zeros_like(start)
        self.p = start.new_zeros(len(self.pieces), self.shape[0], start.shape[2])
        self.samples, self.seen = torch.stack([_sample(piece.data) for piece in self.pieces]), set()
        if self.metric is not None:
            self.metric.open()

    def index(self, bucket: int, positions: list[int]) -> Tensor:
        """Give the positions in a bucket as a tensor on the device. It is copied there only when DDP changes the bucket."""
        if bucket not in self._indices or self._indices[bucket][0] != positions:
            self._indices[bucket] = positions, torch.tensor(positions, device=self.device)
        return self._indices[bucket][1]

    def operand(self, members: Mapping[int, Tensor], index: Tensor, l2: Floats) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Form a = e + S^-1 (g + l2 * p) for the matrices of a bucket.

        Args:
            members: position -> g.
            index: the same positions as a tensor.
            l2: the weight decay that enters the gradient.

        Returns:
            a, a copy (members, rows, cols), and the tensors whose means over the processes the metric needs.
        """
        samples = torch.stack([_sample(g) for g in members.values()])
        self.samples.index_copy_(0, index, samples.to(self.samples.dtype))
        self.seen |= members.keys()
        a = torch.stack([g.reshape(self.shape).to(self.layout.dtype) for g in members.values()])
        if l2:
            matrices = [self.pieces[i].data.reshape(self.shape) for i in members]
            if isinstance(l2, list):
                decayed = torch._foreach_mul([x.to(self.layout.dtype) for x in matrices], [l2[i] for i in members])
                torch._foreach_add_(a.unbind(), decayed)
            else:
                torch._foreach_add_(a.unbind(), matrices, alpha=l2)
        means: tuple[Tensor, ...] = ()
        if self.metric is not None:
            means = tuple(t.to(self.layout.dtype) for t in self.metric.read(list(a), index))
            x, y = self.metric.entering
            a = scaled_(a, (x[index], y[index]))
        torch._foreach_add_(a.unbind(), [self.error.buffer[i] for i in members])
        return a, means

    def put(self, index: Tensor, p: Tensor, q: Tensor, means: Sequence[Tensor]) -> None:
        """Take the factors of the tensors at these positions, and the means over the processes of `operand`'s tensors."""
        if self.metric is not None:
            self.metric.put(index, *means)
        self.p.index_copy_(0, index, p)
        self.q.index_copy_(0, index, q)

    def stage(self, step: Tensor) -> None:
        """Stage the entry as the window stores it. It is zero for a parameter without a gradient on all processes.

        Raises:
            OptionError: a gradient is not the one that the hook has seen. On a GPU this is known one step late.
        """
        if self.start is None:
            self.begin(step)
        self.open(step)
        self._check_gradients()
        for i in self.turn.absent:
            self.p[i], self.q[i] = 0, 0
        self.window.stage(LowRankEntry.of(self.p, self.q))
        self.compressor.prepare(self.q)

    def commit(self, j: Tensor, l2: Floats, ok: bool | Tensor) -> None:
        """If the step is accepted: e <- e + S^-1 g - P Q^T; Q becomes the next warm start; D takes g."""
        self.turn.ok = ok
        assert self.window.staged is not None, "stage comes first"
        gradients, scale = self.gradients(l2), None if self.metric is None else self.metric.entering
        Accumulated(gradients, self.error, scale=scale).keep(self.window.staged)
        if self.metric is not None:
            self.metric.commit(gradients)
        self.compressor.commit()
        self.window.release()
        self.void()

    def void(self) -> None:
        """Forget the factors after their use."""
        self.start = self.p = self.q = self.samples = None
        self.seen = set()

    def _check_gradients(self) -> None:
        gradients = {i: p.grad for i, p in enumerate(self.params) if p.grad is not None}
        if not self.seen >= gradients.keys():
            raise OptionError(
                "comm='factors': a gradient did not come from a backward through the DistributedDataParallel that "
                "synchronizes (the last one before step() has to be outside no_sync)"
            )
        if not gradients:
            return
        seen = torch.stack([self.samples[i] for i in gradients])
        there = torch.stack([_sample(g) for g in gradients.values()])
        if self.changed.exchange(((seen != there) & ~(seen.isnan() & there.isnan())).any()):
            raise OptionError(
                "comm='factors': gradients were changed between backward() and step() (clipping, a GradScaler), which would have "
                "no effect on the factors: take max_grad_norm=0 and no fp16, or comm='gradients'"
            )


def in_factors(name: str) -> bool:
    """Tell whether a state entry of a compressed matrix is in its `FactorStack`, whole on every process."""
    return name in ("error", "warm_start") or name.startswith("metric_")


def places_of(stacks: Sequence[FactorStack]) -> dict[Tensor, tuple[FactorStack, int]]:
    """Give the stack and the position of each parameter."""
    return {p: (s, i) for s in stacks for i, p in enumerate(s.params)}


def _sample(g: Tensor) -> Tensor:
    """Give a few entries of a gradient."""
    flat = g.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
