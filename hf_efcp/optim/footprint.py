"""How many bytes the state takes: measured, or estimated from shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.gram import GramMatrix
from ..distributed.plan import Owners, Size, assign
from ..options import OptionError
from .sharding import ROW_DIM
from .stacks import Piece, build_stacks


def kind_of(name: str) -> str:
    """The kind of a state entry, as memory_footprint() counts it."""
    return "window" if name.startswith("window_") else name.removesuffix("_scale")


class FootprintMixin:
    """The part of a WindowedOptimizer that counts bytes."""

    def memory_footprint(self) -> dict[str, int]:
        """Bytes of state by kind, measured on the tensors that are held (allocated now if no step was taken yet)."""
        self._prepare()
        kinds: dict[str, int] = {}
        for entry in self.state.values():
            for name, tensor in entry.items():
                kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + tensor.numel() * tensor.element_size()
        return kinds

    def _sizes(self, processes: int = 1) -> dict[Tensor, Size]:
        """Bytes of every parameter's state, but for what is on every process."""
        sizes, least = {}, 1 if self._shards is not None and self._shards.follows else 2
        for p, state in self._whole_state().items():
            divided = {name: what for name, what in state.items() if name not in self._everywhere(state, processes)}
            bytes_ = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in divided.items()}
            fixed, total = sum(n for name, n in bytes_.items() if name not in ROW_DIM), sum(bytes_.values())
            divisible = p.ndim >= least and p.numel() > 0
            sizes[p] = Size(len(p), fixed, (total - fixed) / len(p), True) if divisible else Size(1, total, 0.0, False)
        return sizes

    def _whole_state(self) -> dict[Tensor, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """Shape and dtype of every parameter's state on one process, from buffers that are never allocated."""
        known: dict[tuple, dict] = {}
        found = {}
        for group, params in zip(self.param_groups, self._trainable(), strict=True):
            for p in params:
                key = (p.shape, p.dtype, group.get("compress", True))
                if key not in known:
                    meta = Piece(torch.empty(p.shape, dtype=p.dtype, device="meta"), 0)
                    (stack,) = build_stacks([[meta]], self.options, [self._format(group)], flat=self._flat is not None)
                    known[key] = {name: (tuple(b.shape[1:]), b.dtype) for name, b in stack.buffers().items()}
                found[p] = known[key]
        return found

    def estimate_footprint(self, processes: int = 1, fsdp: bool = False) -> dict[str, int]:
        """What `memory_footprint` of a fresh optimizer will measure, from its parameters' shapes: nothing is allocated.

        Args:
            processes: that share the state.
            fsdp: they share the parameters too (FSDP2): each has the rows of its chunk of every tensor.

        Returns:
            Bytes by kind, of the process that holds most.

        Raises:
            OptionError: such a run would be refused.
        """
        options, budget = self.options, self.options.memory_budget
        try:
            if self._free and not self._chosen:
                self.options, _ = self._choice(processes, fsdp)
            if fsdp:
                self._check_fsdp()
            found = self._footprint(processes, fsdp)
            if budget is not None and not self._free and sum(found.values()) > budget:
                raise self._too_large(sum(found.values()))
            return found
        finally:
            self.options = options

    def _check_fsdp(self) -> None:
        """Raise what a run under FSDP2 would."""
        if self._by_factors:
            raise OptionError("comm='factors' is for DDP: under FSDP2 gradients are sharded, take comm='gradients'")
        scalars = sum(p.ndim == 0 for params in self._trainable() for p in params)
        if scalars:
            raise OptionError(f"FSDP2 divides no 0-D parameters, and the model has {scalars}: make them 1-D")
        self._check_blocks()

    def _footprint(self, processes: int, fsdp: bool) -> dict[str, int]:
        whole, sizes = self._whole_state(), self._sizes(processes)
        if fsdp:  # the first chunk is the largest
            chunks = [slice(0, -(-len(p) // processes)) if p.ndim and p.numel() else None for p in whole]
            plan, ranks = [{0: rows} for rows in chunks], 1
        else:
            plan, ranks = assign(list(sizes.values()), processes), processes
        loads = [self._bytes_on(whole, plan, rank, ranks) for rank in range(ranks)]
        return max(loads, key=lambda kinds: sum(kinds.values()))

    def _bytes_on(self, whole: dict[Tensor, dict], plan: list[Owners], rank: int, processes: int) -> dict[str, int]:
        """Bytes by kind that the plan gives to a process."""
        kinds: dict[str, int] = {}
        for (p, state), owners in zip(whole.items(), plan, strict=True):
            everywhere = self._everywhere(state, processes)
            for name, (shape, dtype) in state.items():
                if rank not in owners and name not in everywhere:
                    continue
                size, rows = math.prod(shape) * dtype.itemsize, owners.get(rank)
                if rows is not None and name in ROW_DIM and name not in everywhere:
                    size = size * (rows.stop - rows.start) // len(p)
                kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + size
        if whole:
            gram = GramMatrix(len(whole) if self.options.scope == "layer" else 1, self.options.window_size, torch.device("meta"))
            kinds |= {"gram": gram.matrix.nbytes, "step": gram.step.nbytes, "skipped": gram.skipped.nbytes}
        return kinds
