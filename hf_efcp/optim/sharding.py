"""State divided among the processes of a group: which pieces this process holds, and when the processes meet.

A process compresses, stores and combines its own pieces. The processes meet in a step to sum the new row of K, for low-rank
tensors that are divided by rows (see PowerIteration), and to hand out the updated parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.plan import Size, assign, describe, loads
from ..distributed.shards import Shards
from .budget import choose, described, shown
from .options import OptionError
from .stacks import Piece, Stack, build_stacks

if TYPE_CHECKING:
    from ..distributed.checkpoint import Part

_log = logging.getLogger("hf_efcp")

# Name of the folder of the shards in a checkpoint of Trainer or Accelerate.
SHARD_FOLDER = "efcp_optim"
# Of the state whose size goes with the rows: in which dimension they are.
ROW_DIM = {
    **dict.fromkeys(("error", "error_scale", "momentum"), 0),
    **dict.fromkeys(("window_indices", "window_values", "window_entries", "window_scale"), 0),
    **dict.fromkeys(("window_rows", "window_rows_scale"), 1),
    "window_p": 2,
}
# What the first parameter's entry holds for the whole optimizer; with scope="layer" every parameter has its own K.
SHARED = ("gram", "step", "skipped")


def of_window(name: str) -> bool:
    """Whether a state entry means nothing without the window's rows."""
    return name.startswith("window_") or name in ("gram", "step")


def _narrowed(t: Any, dim: int | None, rows: slice, total: int) -> Any:
    """`rows` of a state tensor that has `total` rows in dimension `dim`; what does not fit is left for the checks."""
    if dim is None or not isinstance(t, Tensor) or t.ndim <= dim or t.shape[dim] % total:
        return t
    each = t.shape[dim] // total
    return t.narrow(dim, rows.start * each, (rows.stop - rows.start) * each)


class ShardingMixin:
    """The part of a WindowedOptimizer that knows about other processes.

    Attributes:
        shard_folder: where the next `load_state_dict` finds the tensors of a sharded optimizer's state_dict; None afterwards.
    """

    shard_folder: str | Path | None = None

    def sharding_plan(self) -> str:
        """Who holds how many bytes of state, and which tensors are divided by rows; to be called on every process."""
        self._prepare()
        if self._shards is None:
            return "not sharded"
        names = {p: n for g in self.param_groups for p, n in zip(g["params"], g.get("param_names", []), strict=False)}
        labels = [names.get(p, f"parameter {i}") for i, p in enumerate(self._params)]
        return describe(labels, [self._owners[p] for p in self._params], list(self._sizes().values()), self._shards.size)

    def _build(self, groups: list[list[Tensor]]) -> list[Stack]:
        """This process's stacks; parameters that are new get owners, the others keep theirs."""
        self._shards = self._find_shards()
        processes = 1 if self._shards is None else self._shards.size
        if self._owners and processes != self._copied_from:
            raise OptionError(
                f"this is a copy of an optimizer whose state was divided among {self._copied_from} processes, and holds one "
                "process's part only (a copy has no process_group): use save_shards, state_dict and load_state_dict"
            )
        self._copied_from = processes
        if self._shards is not None:
            self._agree()
        self._keep_to_budget()
        formats = [self._format(g) for g in self.param_groups]
        number = {p: i for i, p in enumerate(self._params)}
        if self._shards is None:
            pieces = [[Piece(p, number[p]) for p in params] for params in groups]
            return build_stacks(pieces, self.options, formats)
        self._assign()
        rank, owners = self._shards.rank, self._owners
        pieces = [[Piece(p, number[p], owners[p][rank]) for p in params if rank in owners[p]] for params in groups]
        return build_stacks(pieces, self.options, formats, self._shards.sum)

    def _keep_to_budget(self) -> None:
        """Choose the options that `memory_budget` leaves open, once; afterwards see that it is kept."""
        budget = self.options.memory_budget
        if budget is None:
            return
        if self._free:
            options = self.options
            try:
                chosen, size = choose(options, self._free, self._bytes_with)
            finally:
                self.options = options
            self.options, self._free = chosen, ()
            if self._shards is None or self._shards.rank == 0:
                # A warning's level, because that is shown where nobody has set one.
                what = f"{type(self).__name__}: memory_budget={shown(budget)}: {described(chosen)}"
                _log.warning("%s: %s of state%s", what, shown(size), " for each process" if self._shards is not None else "")
            return
        size = self._bytes_with(self.options)
        if size > budget and self.state:
            warnings.warn(f"memory_budget={shown(budget)}: with the new parameters the state takes {shown(size)}", stacklevel=2)
        elif size > budget:
            raise OptionError(f"memory_budget={shown(budget)}: with {described(self.options)} the state takes {shown(size)}")

    def _bytes_with(self, options) -> int:
        self.options = options
        return self.expected_bytes()

    def expected_bytes(self) -> int:
        """Bytes of state on the process that has most, as `memory_footprint` will measure them; nothing is allocated."""
        sizes, processes = list(self._sizes().values()), 1 if self._shards is None else self._shards.size
        held = loads(assign(sizes, processes), sizes, processes)
        grams = len(sizes) if self.options.scope == "layer" else 1
        return round(max(held)) + 8 * grams * self.options.window_size**2 + 16  # two counters

    def _hand_out(self) -> None:
        """Every process gets the parameters that the others have updated."""
        if self._shards is not None:
            self._shards.hand_out(self._params, [self._owners[p] for p in self._params])

    def _format(self, group: dict):
        return self.row_format if group.get("compress", True) else None

    def _find_shards(self) -> Shards | None:
        running = self.options.shard == "auto" and dist.is_available() and dist.is_initialized()
        if self._process_group is None and not running:
            return None
        return Shards(self._process_group) if dist.get_world_size(self._process_group) > 1 else None

    def _assign(self) -> None:
        sizes, held = self._sizes(), [0.0] * self._shards.size
        new = [p for p in sizes if p not in self._owners]
        for p, size in sizes.items():
            for rank, rows in self._owners.get(p, {}).items():
                held[rank] += size.of(rows)
        self._owners |= dict(zip(new, assign([sizes[p] for p in new], self._shards.size, held), strict=True))

    def _sizes(self) -> dict[Tensor, Size]:
        """Bytes of every parameter's state."""
        sizes = {}
        for p, state in self._whole_state().items():
            bytes_ = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in state.items()}
            fixed, total = sum(n for name, n in bytes_.items() if name not in ROW_DIM), sum(bytes_.values())
            divisible = p.ndim >= 2 and p.numel() > 0
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
                    (stack,) = build_stacks([[meta]], self.options, [self._format(group)])
                    known[key] = {name: (tuple(b.shape[1:]), b.dtype) for name, b in stack.buffers().items()}
                found[p] = known[key]
        return found

    # Checkpoints ------------------------------------------------------------------------------------------------------------

    def save_shards(self, folder: str | Path) -> None:
        """Write this process's part of a sharded state; to be called on every process. Not sharded: nothing to do.

        `state_dict()` then is a stub, without tensors; `load_state_dict(stub)` reads the folder that `shard_folder` names,
        on any number of processes.
        """
        if self._shards is not None:
            from ..distributed import checkpoint  # takes most of a second

            checkpoint.save(self._parts(self.options.save_window), Path(folder), self._shards.group)

    def _stub(self) -> dict[str, Any]:
        """What stands in the state_dict of a sharded optimizer: from which process and step it is, and what has state."""
        trained = [i for i, p in enumerate(self._all_params()) if p in self.state]
        origin = f"{os.getpid()}/{id(self)}/{int(self._gram.step)}"
        return {"processes": self._shards.size, "origin": origin, "trained": trained}

    def _all_params(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    def _load_shards(self, stub: dict[str, Any], with_window: bool) -> None:
        if self.shard_folder is None:
            # As `Accelerator.prepare` does: out and in again. With a folder every process has to read it: of a stub in a file
            # the first process alone could say that it is its own.
            if self._shards is not None and stub == self._stub():
                return
            raise OptionError(
                "this state_dict is the stub of a sharded optimizer; its tensors are in a folder beside it "
                f"({SHARD_FOLDER} in a checkpoint): set shard_folder to it before load_state_dict"
            )
        from ..distributed import checkpoint

        # A parameter that was frozen after it had been trained has state too.
        trained = [p for i, p in enumerate(self._all_params()) if i in stub.get("trained", [])]
        frozen = [p for p in trained if p not in self.state and not p.requires_grad]
        self.state.update({p: {} for p in frozen})
        try:
            self._prepare()
            group = self._shards and self._shards.group
            checkpoint.load(self._parts(with_window), self._expected_parts(with_window), Path(self.shard_folder), group)
        except (OptionError, checkpoint.CheckpointError) as error:
            for p in frozen:
                del self.state[p]
            raise OptionError(str(error)) from None
        self.shard_folder = None
        if not with_window:
            self._start_without_window()

    def _parts(self, with_window: bool) -> dict[str, Part]:
        """What this process holds, by the names in a checkpoint."""
        from ..distributed.checkpoint import Part

        parts = {}
        for number, p in enumerate(self._params):
            rows = self._owners[p].get(self._shards.rank) if self._shards is not None else None
            for name, t in self.state[p].items():
                key, dim = f"{number}.{name}", ROW_DIM.get(name) if rows else None
                if not with_window and of_window(name):
                    continue
                if dim is None:
                    parts[key] = Part(t, tuple(t.shape))
                elif t.numel():
                    each = t.shape[dim] // (rows.stop - rows.start)  # numbers to a row along this dimension
                    shape = [len(p) * each if d == dim else n for d, n in enumerate(t.shape)]
                    parts[key] = Part(t, tuple(shape), dim, rows.start * each)
        return parts

    def _expected_parts(self, with_window: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that a checkpoint of this optimizer has."""
        whole = self._whole_state()
        found = {f"{i}.{name}": what for i, p in enumerate(self._params) for name, what in whole[p].items()}
        for i, p in enumerate(self._params):
            found |= {f"{i}.{name}": (tuple(t.shape), t.dtype) for name, t in self.state[p].items() if name in SHARED}
        return {key: what for key, what in found.items() if with_window or not of_window(key.partition(".")[2])}

    def _own_part(self, p: Tensor, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the state of p on one process, what this process holds."""
        if self._shards is None:
            return entry
        if self._shards.rank not in self._owners[p]:
            return {name: t for name, t in entry.items() if name in self.state[p]}
        rows = self._owners[p][self._shards.rank]
        return {name: t if rows is None else _narrowed(t, ROW_DIM.get(name), rows, len(p)) for name, t in entry.items()}

    def _agree(self) -> None:
        """Raise on every process where one has another class, other options or other parameters."""
        mine = [f"class {type(self).__name__}"]
        mine += [f"{name}={value!r}" for name, value in dataclasses.asdict(self.options).items()]
        for i, group in enumerate(self._trainable()):
            mine += [f"group {i}: a parameter {tuple(p.shape)} {p.dtype}" for p in group]
        everybody = self._shards.gather(mine)
        for rank, theirs in enumerate(everybody):
            for a, b in itertools.zip_longest(everybody[0], theirs, fillvalue="no more parameters"):
                if a != b:
                    raise OptionError(f"the processes do not train the same: rank 0 has {a}, rank {rank} has {b}")
