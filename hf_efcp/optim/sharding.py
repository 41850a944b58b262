"""State divided among the processes of a group: which pieces this process holds, and when the processes meet.

A process compresses, stores and combines its own pieces. The processes meet in a step to sum the new row of K, for low-rank
tensors that are divided by rows (see PowerIteration), and to hand out the updated parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.ddp import Shards
from ..distributed.fsdp2 import MeshShards, is_sharded
from ..distributed.plan import assign, describe
from ..options import OptionError
from .stacks import Piece, Stack, build_stacks

if TYPE_CHECKING:
    from ..distributed.folder import Part


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


def row_dim(name: str, p: Tensor) -> int | None:
    """Of a state entry of p, the dimension that goes with dimension 0 of p; None: it has none."""
    dim = ROW_DIM.get(name)
    return dim if dim is None or p.ndim > 1 else dim + 1  # a 1-D tensor is one row


class ShardingMixin:
    """The part of a WindowedOptimizer that knows about other processes.

    Attributes:
        shard_folder: where the next `load_state_dict` finds the tensors of a sharded optimizer's state_dict; None afterwards.
    """

    shard_folder: str | Path | None = None
    # Where somebody else divides parameters, gradients and state: the processes, and the number of all coordinates.
    _flat: tuple[Shards, int] | None = None
    # Whether a tensor that is no nn.Parameter was given; of a copy it is not known.
    _given_plain = True

    def take_flat_pieces(self, processes: Shards, coordinates: int) -> None:
        """The parameters of the one group are about to be replaced by this process's flat piece of all of them (ZeRO-1, 2).

        K is then summed over `processes`, and nothing else is sent. Sparse blocks are runs of the piece. Each process's
        state_dict has its own state.

        Args:
            processes: those that divide the parameters.
            coordinates: of all pieces, without padding.
        """
        self._flat = processes, coordinates

    @property
    def _meeting(self) -> Shards | None:
        """The processes over which K is summed."""
        return self._flat[0] if self._flat else self._shards

    def _check_replaced(self, p: Tensor) -> None:
        if self._flat is None and not self._given_plain and type(p) is Tensor:
            raise OptionError(
                f"{type(self).__name__} was given parameters, and finds a plain tensor {tuple(p.shape)} in their place, as "
                "DeepSpeed does: prepare it by Accelerate or Trainer, without ZeRO in full precision; or use DDP"
            )

    def sharding_plan(self) -> str:
        """Who holds how many bytes of state, and which tensors are divided by rows; to be called on every process."""
        self._prepare()
        if self._shards is None:
            return "not sharded"
        names = {p: n for g in self.param_groups for p, n in zip(g["params"], g.get("param_names", []), strict=False)}
        labels = [names.get(p, f"parameter {i}") for i, p in enumerate(self._params)]
        loads, divided = describe(
            labels, [self._owners[p] for p in self._params], list(self._sizes().values()), self._shards.size
        )
        return loads + ("\nevery tensor divided by rows, as the parameters are" if self._shards.follows else divided)

    def _build(self, groups: list[list[Tensor]]) -> list[Stack]:
        """This process's stacks; parameters that are new get owners, the others keep theirs."""
        self._shards = self._find_shards()
        follows = self._shards is not None and self._shards.follows
        self._check_comm(groups)
        processes = 1 if self._shards is None else self._shards.size
        if self._owners and not follows and processes != self._copied_from:
            raise OptionError(
                f"this is a copy of an optimizer whose state was divided among {self._copied_from} processes, and holds one "
                "process's part only (a copy has no process_group): use save_shards, state_dict and load_state_dict"
            )
        self._copied_from = processes
        if self._shards is not None:
            self._agree(self._shards)
        self._keep_to_budget()
        formats = [self._format(g) for g in self.param_groups]
        number = {p: i for i, p in enumerate(self._params)}
        if self._shards is None:
            pieces = [[Piece(p, number[p]) for p in params] for params in groups]
            return self._with_factors(groups, build_stacks(pieces, self.options, formats, flat=self._flat is not None))
        if follows:
            self._check_blocks()
            self._owners = {p: self._shards.owners(p) for p in self._params}
        else:
            self._assign()
        rank, owners = self._shards.rank, self._owners
        pieces = [[Piece(p, number[p], owners[p][rank]) for p in params if rank in owners[p]] for params in groups]
        return self._with_factors(groups, build_stacks(pieces, self.options, formats, self._shards))

    def _hand_out(self) -> None:
        """Every process gets the parameters that the others have updated."""
        if self._shards is not None and not self._shards.follows:
            self._shards.hand_out(self._params, [self._owners[p] for p in self._params])

    def _format(self, group: dict):
        return self.row_format if group.get("compress", True) else None

    def _find_shards(self) -> Shards | MeshShards | None:
        if any(map(is_sharded, self._params)):
            return self._find_mesh()
        if self._flat is not None:
            return None
        running = self.options.shard == "auto" and dist.is_available() and dist.is_initialized()
        if self._process_group is None and not running:
            return None
        return Shards(self._process_group) if dist.get_world_size(self._process_group) > 1 else None

    def _find_mesh(self) -> MeshShards:
        shards, name = MeshShards([p for p in self._params if is_sharded(p)]), type(self).__name__
        if self._process_group is not None:
            raise OptionError(f"{name}: process_group has no meaning where parameters are DTensors: state follows their mesh")
        for i, p in enumerate(self._params):
            if not shards.fits(p):
                what = f"{p.placements} on {p.device_mesh}" if is_sharded(p) else "a plain tensor"
                raise OptionError(
                    f"{name}: all parameters must lie alike on one device mesh; parameter {i} is {what}, others are "
                    f"{shards.placements} on {shards.mesh}: give each kind an optimizer of its own"
                )
        return shards

    def _check_blocks(self) -> None:
        """FSDP2 cuts 1-D tensors anywhere, also inside a block of numbers that share a scale."""
        for p, state in self._whole_state().items():
            if p.ndim == 1 and any(name.endswith("_scale") for name in state):
                o = self.options
                raise OptionError(
                    f"window_format={o.window_format!r}, error_format={o.error_format!r}: under FSDP2 1-D tensors cannot have "
                    "blocks: use window_format='plain', and int8 or int4 errors only with an exact window_dtype"
                )

    def _assign(self) -> None:
        sizes, held = self._sizes(), [0.0] * self._shards.size
        new = [p for p in sizes if p not in self._owners]
        for p, size in sizes.items():
            for rank, rows in self._owners.get(p, {}).items():
                held[rank] += size.of(rows)
        self._owners |= dict(zip(new, assign([sizes[p] for p in new], self._shards.size, held), strict=True))

    # Checkpoints ------------------------------------------------------------------------------------------------------------

    def save_shards(self, folder: str | Path) -> None:
        """Write this process's part of a sharded state; to be called on every process.

        Nothing is written where there is no need: a state that is not sharded, or one of DTensors (FSDP2), is in `state_dict`.
        `state_dict()` then is a stub, without tensors; `load_state_dict(stub)` reads the folder that `shard_folder` names,
        on any number of processes.
        """
        if self._together is not None:
            from ..distributed import folder as checkpoint  # takes most of a second

            checkpoint.save(self._parts(self.options.save_window), Path(folder), self._together.group)

    def _stub(self) -> dict[str, Any]:
        """What stands in the state_dict of a sharded optimizer: from which process and step it is, and what has state.

        `errors`: of how many processes it has errors (comm="factors"); 0: there is one error, of all.
        """
        trained = [i for i, p in enumerate(self._all_params()) if p in self.state]
        origin = f"{os.getpid()}/{id(self)}/{int(self._gram.step)}"
        stub = {"processes": self._together.size, "origin": origin, "trained": trained}
        return stub if self._comm is None else {**stub, "errors": self._comm.size}

    def _all_params(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    def _load_shards(self, stub: dict[str, Any], with_window: bool) -> None:
        if self.shard_folder is None:
            # As `Accelerator.prepare` does: out and in again. With a folder every process has to read it: of a stub in a file
            # the first process alone could say that it is its own.
            if self._together is not None and stub == self._stub():
                return
            raise OptionError(
                "this state_dict is the stub of a sharded optimizer; its tensors are in a folder beside it "
                f"({SHARD_FOLDER} in a checkpoint): set shard_folder to it before load_state_dict"
            )
        from ..distributed import folder as checkpoint

        # A parameter that was frozen after it had been trained has state too.
        trained = [p for i, p in enumerate(self._all_params()) if i in stub.get("trained", [])]
        frozen = [p for p in trained if p not in self.state and not p.requires_grad]
        self.state.update({p: {} for p in frozen})
        try:
            self._prepare()
            group, errors = self._together and self._together.group, stub.get("errors", 0)
            parts = self._parts(with_window)
            means = self._errors_of_others(errors, parts)
            checkpoint.load(parts, self._expected_parts(with_window, errors), Path(self.shard_folder), group, means)
        except (OptionError, checkpoint.CheckpointError) as error:
            for p in frozen:
                del self.state[p]
            raise OptionError(str(error)) from None
        self.shard_folder = None
        if not with_window:
            self._start_without_window()

    def _parts(self, with_window: bool) -> dict[str, Part]:
        """What this process holds, by the names in a checkpoint."""
        from ..distributed.folder import Part

        parts = {}
        for number, p in enumerate(self._params):
            rows = self._owners[p].get(self._shards.rank) if self._shards is not None else None
            everywhere = self._everywhere(self.state[p])
            for name, t in self.state[p].items():
                key, dim = f"{number}.{name}", row_dim(name, p) if rows and name not in everywhere else None
                if not with_window and of_window(name):
                    continue
                if name == "error" and everywhere:  # each process's own, side by side
                    parts[key] = Part(t[None], (self._comm.size, *t.shape), 0, self._comm.rank)
                elif dim is None:
                    parts[key] = Part(t, tuple(t.shape))
                elif t.numel():
                    shape = [len(p) if d == dim else n for d, n in enumerate(t.shape)]
                    parts[key] = Part(t, tuple(shape), dim, rows.start)
        return parts

    def _expected_parts(self, with_window: bool, errors: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that a checkpoint of this optimizer has; with the errors of so many processes."""
        whole = dict(self._whole_state())
        for p, state in whole.items():
            if errors and "warm_start" in state:
                shape, dtype = state["error"]
                whole[p] = {**state, "error": ((errors, *shape), dtype)}
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
        everywhere = self._everywhere(entry)
        dims = {name: None if name in everywhere else row_dim(name, p) for name in entry}
        return {name: self._own_rows(t, dims[name], rows) for name, t in entry.items()}

    def _own_rows(self, t: Tensor, dim: int | None, rows: slice | None) -> Tensor:
        if is_sharded(t):
            mine = rows is not None and dim is not None and t.device_mesh == self._shards.mesh
            if mine and tuple(t.placements) == self._shards.placed(dim):
                return t.to_local()
            t = t.full_tensor()
        return t if rows is None or dim is None else t[(slice(None),) * dim + (rows,)]

    def _global_entry(self, p: Tensor, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of p as DTensors, where it follows a parameter that is one: as on one process, for whoever saves it."""
        if self._shards is None or not self._shards.follows:
            return entry
        found = {}
        for name, t in entry.items():
            dim = row_dim(name, p)
            t = t.int() if t.dtype == torch.int16 else t  # neither NCCL nor gloo sends int16, as a full state dict needs it
            found[name] = t if dim is None else self._shards.whole(t, dim, len(p))
        return found

    def _agree(self, processes: Shards) -> None:
        """Raise on every process where one has another class, other options or other parameters."""
        mine = [f"class {type(self).__name__}"]
        mine += [f"{name}={value!r}" for name, value in dataclasses.asdict(self.options).items()]
        for i, group in enumerate(self._trainable()):
            mine += [f"group {i}: a parameter {tuple(p.shape)} {p.dtype}" for p in group]
        everybody = processes.gather(mine)
        for rank, theirs in enumerate(everybody):
            for a, b in itertools.zip_longest(everybody[0], theirs, fillvalue="no more parameters"):
                if a != b:
                    raise OptionError(f"the processes do not train the same: rank 0 has {a}, rank {rank} has {b}")
