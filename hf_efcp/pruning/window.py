"""Scores of the whole model from an M-FAC window, F = S (damping I + G^T G / N) S, and the exact OBS update for them.

G (m, d) are the entries of the window, S the metric (1 without one). With B = (N damping I + K)^-1, K = G G^T:

    [F^-1]_ii = (1 - (G^T B G)_ii) / (damping S_i^2),     score_i = w_i^2 / [F^-1]_ii
    w_Q <- w_Q + F_QQ^-1 F_QS w_S,     F_QQ^-1 F_QS w_S = S^-1 G_Q^T (N damping I + G_Q G_Q^T)^-1 G_S S w_S

so that nothing of size d x d is formed. Which entries to remove by these scores is M-FAC's (arXiv 2107.03356); that the chosen
ones are then removed exactly, all at once, in the whole model, is this package's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.linalg import chunks, ieee_matmul
from ..optim.mfac import DenseMFAC, damping_of
from ..options import OptionError
from .layers import Layer, called, evaluating, on_device
from .options import PruningOptions
from .patterns import Pattern
from .projection import ROOM

# Of the window that is filled here, times the mean squared norm of a gradient: as preset="measured" has it.
DAMPING = 0.1
# Of 1 - g^T B g, which is above 0 but for rounding.
_LEAST = 1e-12


def filled_window(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], o: PruningOptions) -> DenseMFAC:
    """Fill an M-FAC window with the gradients of the loss on the last m batches; no weight moves.

    Several processes have the mean of their gradients, and all call this.

    Args:
        model: returns the loss, as `output.loss` or `output["loss"]`, for batches with labels.
        layers: whose weights count.
        batches: a gradient each.
        o: `window_size` is m.

    Raises:
        OptionError: the model returns no loss, or a weight is frozen.
    """
    params = [x.weight for x in layers]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    fewest = torch.tensor(min(len(batches), o.window_size), device=params[0].device)
    if several:
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
    batches = batches[len(batches) - int(fewest) :]
    for x in layers:
        if not x.weight.requires_grad:
            raise OptionError(f"method='mfac': {x.parameter} is frozen and has no gradient; choose layers by modules")
    before = [p.grad for p in params]
    size = max(1, len(batches))
    window = DenseMFAC(params, lr=0.0, window_size=size, damping=DAMPING, damping_mode="relative", shard="off")
    try:
        with torch.enable_grad(), evaluating(model):
            for batch in batches:
                output = called(model, on_device(batch, params[0].device))
                loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
                if loss is None:
                    raise OptionError("method='mfac': the model returned no loss; calibration batches need labels")
                for p, gradient in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
                    p.grad = gradient
                    if several and gradient is not None:
                        dist.all_reduce(gradient)
                        gradient.div_(dist.get_world_size())
                window.step()
    finally:
        for p, former in zip(params, before, strict=True):
            p.grad = former
    return window


def prune_by_window(optimizer: Any, layers: Sequence[Layer], pattern: Pattern, sparsity: float) -> dict[str, Tensor]:
    """Remove what F says costs least, in all layers together; update all parameters that the window knows.

    Args:
        optimizer: of the M-FAC family, alone in its process, with at least one entry in its window.
        layers: whose weights may be removed; the optimizer has all of them.
        pattern, sparsity: what is removed.

    Returns:
        Name of a weight -> which of its entries are kept.

    Raises:
        OptionError: another optimizer, one whose window is empty, divided or of single tensors, or that lacks a weight.
    """
    window = WindowCurvature(optimizer)
    known = {id(p) for p in window.params}
    for x in layers:
        if id(x.weight) not in known:
            raise OptionError(f"optimizer: it does not train {x.parameter}, which is to be pruned")
    with torch.no_grad(), ieee_matmul(layers[0].weight.device):
        everywhere = window.scores()
        scores = {x.parameter: pattern.blocks(x.matrix_of(everywhere[x.weight])).sum((2, 3)) for x in layers}
        if pattern.of:
            chosen = {name: pattern.keep(s, sparsity) for name, s in scores.items()}
        else:  # one threshold for all layers
            everything = torch.cat([s.flatten() for s in scores.values()])
            flat = Pattern("unstructured").keep(everything[None], sparsity)[0]
            parts = flat.split([s.numel() for s in scores.values()])
            r, c = pattern.block
            chosen = {
                name: part.view_as(s).repeat_interleave(r, 0).repeat_interleave(c, 1)
                for (name, s), part in zip(scores.items(), parts, strict=True)
            }
        keep = {x.parameter: x.weight_of(chosen[x.parameter]) for x in layers}
        window.remove({x.weight: keep[x.parameter] for x in layers})
    return keep


def refuse_unfit(optimizer: Any) -> None:
    """Raise OptionError for a window of M-FAC that is not one matrix for the whole model, in this process."""
    options = optimizer.options
    if options.centered:
        raise OptionError("centered=True: pruning with method='mfac' needs centered=False")
    if options.scope != "model":
        raise OptionError(f"scope={options.scope!r}: pruning with method='mfac' needs scope='model'")
    if not optimizer.setup().placement.alone:
        raise OptionError(
            f"shard={options.shard!r}: pruning with method='mfac' needs a window that is not divided; set shard=off"
        )


class WindowCurvature:
    """F of an M-FAC optimizer's window.

    Args:
        optimizer: ours, or what Accelerate made of it.

    Attributes:
        params: the parameters that the window knows.

    Raises:
        OptionError: see `prune_by_window`.
    """

    def __init__(self, optimizer: Any):
        while not hasattr(optimizer, "builder") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        options: Any = getattr(optimizer, "options", None)
        if not hasattr(options, "damping") or not hasattr(options, "window_size"):
            raise OptionError(f"optimizer={type(optimizer).__name__}: method='mfac' needs one of the M-FAC family")
        refuse_unfit(optimizer)
        setup = optimizer.setup()
        gram = setup.counters
        if not int(gram.filled):
            raise OptionError("optimizer: its window is empty; take steps first")
        filled = int(gram.filled)
        self._n = float(filled if options.divisor == "filled" else options.window_size)
        self._damping = float(damping_of(options, gram))
        self._k = gram.matrix[0, :filled, :filled]
        self._stacks, self._slots = setup.stacks, options.window_size
        self.params = [piece.param for s in setup.stacks for piece in s.pieces]

    def scores(self) -> dict[Tensor, Tensor]:
        """Give w_i^2 / [F^-1]_ii of every parameter, in its shape, fp64."""
        found = {p: torch.empty(p.shape, dtype=torch.float64, device=p.device) for p in self.params}
        system = self._system(self._k)
        for s, rows, g, size in self._pieces():
            taken = (g * torch.linalg.solve(system.to(g.device), g)).sum(1)
            inverse = (1 - taken).clamp_min(_LEAST) / (self._damping * size.square())
            for i, piece in enumerate(s.pieces):
                w = piece.data.detach().reshape(s.shape)[rows].double()
                found[piece.param].view(s.shape)[rows] = w.square() / inverse[i].view_as(w)
        return found

    def remove(self, keep: dict[Tensor, Tensor]) -> None:
        """Set to zero what is not kept, and let all other entries of the window's parameters make up for it."""
        k, v = torch.zeros_like(self._k), self._k.new_zeros(len(self._k))
        for s, rows, g, size in self._pieces():
            for i, piece in enumerate(s.pieces):
                kept = self._kept(keep, s, piece, rows)
                inside = g[i] * kept
                k += (inside @ inside.mT).to(k.device)
                v += ((g[i] - inside) @ (size[i] * piece.data.reshape(s.shape)[rows].double().flatten())).to(v.device)
        c = torch.linalg.solve(self._system(k), v)
        for s, rows, g, size in self._pieces():
            for i, piece in enumerate(s.pieces):
                part = piece.data.view(s.shape)[rows]
                change = ((c.to(g.device) @ g[i]) / size[i]).view_as(part)
                kept = self._kept(keep, s, piece, rows).view_as(part)
                part.copy_(torch.where(kept, part + change.to(part.dtype), 0))

    def _system(self, k: Tensor) -> Tensor:
        return k + self._n * self._damping * torch.eye(len(k), dtype=k.dtype, device=k.device)

    def _pieces(self) -> Iterator[tuple[Any, slice, Tensor, Tensor]]:
        """Give (stack, rows of its matrices, their columns of G, S): (n, m, r) and (n, r) fp64, a few rows at a time."""
        m = len(self._k)
        for s in self._stacks:
            n, (all_rows, cols) = len(s.pieces), s.shape
            for rows in chunks(all_rows, n * m * cols * 8, ROOM):
                g = torch.empty(n, m, (rows.stop - rows.start) * cols, dtype=torch.float64, device=s.device)
                for slot in range(m):
                    one = torch.zeros(n, self._slots, dtype=torch.float64, device=s.device)
                    one[:, slot] = 1
                    g[:, slot] = s.window.combine(one, rows).double().flatten(1)
                inverse = g.new_ones(n, rows.stop - rows.start, cols)
                if s.metric is not None:
                    inverse = s.metric.unwhiten_(inverse.to(s.layout.dtype), rows).double()
                yield s, rows, g, 1 / inverse.flatten(1)

    def _kept(self, keep: dict[Tensor, Tensor], s: Any, piece: Any, rows: slice) -> Tensor:
        if piece.param in keep:
            return keep[piece.param].reshape(s.shape)[rows].flatten()
        return torch.ones((), dtype=torch.bool, device=s.device).expand((rows.stop - rows.start) * s.shape[1])
