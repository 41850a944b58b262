"""How many bytes the state takes: measured, estimated from shapes, and kept to a budget."""

from __future__ import annotations

import logging
import math
import warnings

import torch
from torch import Tensor

from ..core.gram import GramMatrix
from ..distributed.plan import Owners, Size, assign
from .budget import choose, described, shown
from .options import OptionError
from .sharding import ROW_DIM
from .stacks import Piece, build_stacks

_log = logging.getLogger("hf_efcp")


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
        options = self.options
        try:
            if self._free:
                self.options, _ = choose(options, self._choosable(fsdp), lambda o: self._bytes_with(o, processes, fsdp))
            if fsdp:
                self._check_fsdp()
            return self._footprint(processes, fsdp)
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

    def _choosable(self, follows: bool) -> tuple[str, ...]:
        """What is left to the budget: no codes for factors' errors, nor where FSDP2 cuts 1-D tensors inside a block."""
        cut = follows and any(p.ndim == 1 for params in self._trainable() for p in params)
        return tuple(n for n in self._free if not (n.endswith("_format") and (cut or self._by_factors)))

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

    def _keep_to_budget(self) -> None:
        """Choose the options that `memory_budget` leaves open, once; afterwards see that it is kept."""
        budget = self.options.memory_budget
        if budget is None:
            return
        processes, follows = (1, False) if self._shards is None else (self._shards.size, self._shards.follows)
        if self._free:
            options = self.options
            try:
                chosen, size = choose(options, self._choosable(follows), lambda o: self._bytes_with(o, processes, follows))
            finally:
                self.options = options
            self.options, self._free = chosen, ()
            if self._shards is None or self._shards.rank == 0:
                # A warning's level, because that is shown where nobody has set one.
                what = f"{type(self).__name__}: memory_budget={shown(budget)}: {described(chosen)}"
                _log.warning("%s: %s of state%s", what, shown(size), " for each process" if self._shards is not None else "")
            return
        size = self._bytes_with(self.options, processes, follows)
        if size > budget and self.state:
            warnings.warn(f"memory_budget={shown(budget)}: with the new parameters the state takes {shown(size)}", stacklevel=2)
        elif size > budget:
            raise OptionError(f"memory_budget={shown(budget)}: with {described(self.options)} the state takes {shown(size)}")

    def _bytes_with(self, options, processes: int, follows: bool) -> int:
        self.options = options
        return sum(self._footprint(processes, follows).values())
