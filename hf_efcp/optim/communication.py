"""comm="factors": under DDP the processes all-reduce the rank-r factors of the mean gradient instead of the gradients.

The factors are made during backward, by a hook that DDP calls for each of its buckets. Of a compressed matrix `p.grad` stays
this process's own gradient g_i; whatever is not compressed gets its mean, as ever. In `step()` the rows of the windows are the
factors that are there already, and

    e_i <- e_i + g_i - P Q^T

Error and warm start of every compressed matrix are on every process. The errors differ: their mean is the error of a run that
compresses the mean gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..core.compressors import PowerIteration
from ..core.deferred import DelayedFlag
from ..core.error_feedback import ErrorFeedback
from ..core.linalg import ieee_matmul
from ..core.windows import LowRankWindow
from ..distributed.ddp import Shards
from ..distributed.factors import factors_of_mean, mean_
from ..distributed.fsdp2 import MeshShards, is_sharded
from ..options import OptionError
from .stacks import Piece, Stack, batches, compute_dtype, matrix_shape

if TYPE_CHECKING:
    from ..distributed.folder import Part

# How many entries of a gradient are kept from backward to step, to see that it is still the same.
_SAMPLE = 16


@dataclasses.dataclass(eq=False)
class FactorStack(Stack):
    """Whole matrices whose factors the processes make together. `window` has no slots: it only rounds the new row.

    Attributes:
        start: the Q that this backward starts from, (n, cols, r).
        p, q: the factors, (n, rows, r) and (n, cols, r); zeros until the hook has seen their bucket.
        samples: entries of the gradients that the hook has seen, by position in the stack.
    """

    start: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    samples: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def begin(self, step: Tensor) -> None:
        """A backward begins: what an earlier one has left, without a step, is void."""
        n, (rows, _) = len(self.pieces), self.pieces[0].shape
        self.start = self.compressor.start(step)
        self.p, self.q = self.start.new_zeros(n, rows, self.start.shape[2]), torch.zeros_like(self.start)
        self.samples = {}

    def accumulated(self, members: dict[int, Tensor], l2: float) -> Tensor:
        """a = e + g + l2 * p of the members, given by position -> g; a copy."""
        shape, dtype = self.pieces[0].shape, compute_dtype(self.pieces[0].param)
        a = torch.stack([g.reshape(shape).to(dtype) for g in members.values()])
        for x, i in zip(a, members, strict=True):
            if l2:
                x.add_(self.pieces[i].data.reshape(shape), alpha=l2)
            x.add_(self.feedback.error[i])
        return a

    def put(self, members: dict[int, Tensor], p: Tensor, q: Tensor) -> None:
        """Take the members' factors."""
        index = torch.tensor(list(members), device=self.device)
        self.p.index_copy_(0, index, p)
        self.q.index_copy_(0, index, q)
        self.samples |= {i: _sample(g).clone() for i, g in members.items()}

    def stage(self, step: Tensor, l2: float = 0.0) -> None:
        """The row as the window stores it; zero for a parameter without a gradient, which DDP leaves so on all processes."""
        if self.p is None:
            self.begin(step)
        for i, piece in enumerate(self.pieces):
            if piece.grad is None:
                self.p[i], self.q[i] = 0, 0
        self.window.stage((self.p, self.q))
        self.compressor.prepare(self.q)

    def commit(self, j: Tensor, step: Tensor, l2: float, accepted: bool | Tensor) -> None:
        """e <- e + g - P Q^T, and Q becomes the next warm start, where `accepted`."""
        self.feedback.keep(self.gradients(l2), self.window, step, accepted)
        self.compressor.commit(accepted)
        self.void()

    def void(self) -> None:
        """The factors are used up."""
        self.window.release()
        self.start = self.p = self.q = None
        self.samples = {}

    def buffers(self) -> dict[str, Tensor]:
        """See Stack."""
        return {"error": self.feedback.error, "warm_start": self.compressor.q}


class ReadyFactors:
    """Compressor of a window whose rows were made during backward.

    Args:
        pieces: of the window's stack.
        places: parameter -> its stack of factors and position there.
    """

    def __init__(self, pieces: list[Piece], places: dict[Tensor, tuple[FactorStack, int]]):
        self.places = [(*places[piece.param], piece.rows) for piece in pieces]

    def ready(self) -> tuple[Tensor, Tensor]:
        """P (n, rows, r), of the rows that are held here, and Q (n, cols, r)."""
        p = [s.p[i] if rows is None else s.p[i, rows] for s, i, rows in self.places]
        return torch.stack(p), torch.stack([s.q[i] for s, i, _ in self.places])

    def commit(self, accepted: bool | Tensor = True) -> None:
        """Nothing to keep: see FactorStack."""


class CommunicationMixin:
    """The part of a WindowedOptimizer that knows of DDP's communication hook."""

    _comm: Shards | None = None  # the processes of the DDP whose hook is ours

    @property
    def _by_factors(self) -> bool:
        return getattr(self.options, "comm", "gradients") == "factors"

    @property
    def _together(self) -> Shards | None:
        """The processes that save and load together: they share the state, or have errors of their own.

        Where the state follows DTensors they need not: it is in `state_dict`.
        """
        shards = self._shards or self._comm
        return None if shards is not None and shards.follows else shards

    @property
    def _several(self) -> Shards | MeshShards | None:
        """The processes that train together."""
        return self._meeting or self._comm

    def _everywhere(self, state: Iterable[str], processes: int = 1) -> tuple[str, ...]:
        """Of a parameter's state, what is whole on every process beside the shared entries."""
        factors = self._comm is not None or (self._by_factors and processes > 1)
        return ("error", "warm_start") if factors and "warm_start" in state else ()

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Make DDP all-reduce factors (comm="factors"); before the first backward, and before `load_state_dict`.

        From then on, after backward, the gradients of compressed matrices are each process's own, and must reach `step()`
        as they are. Under Trainer and Accelerate this is called for you. On one process there is nothing to do.

        Args:
            model: holds all parameters that are trained; its process group makes the factors.

        Raises:
            OptionError: the option comm is not "factors", `model` is no DDP or lacks a parameter, or the state is already that
                of a run without the hook.
        """
        name = type(self).__name__
        if not self._by_factors:
            has = f"comm={self.options.comm!r}" if hasattr(self.options, "comm") else "no option comm"
            raise OptionError(f"register_comm_hook is for comm='factors', and this {name} has {has}")
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(f"comm='factors' needs a DistributedDataParallel, got {type(model).__name__}")
        known = {p for n, p in model.module.named_parameters() if n not in model.parameters_to_ignore}
        strangers = sum(p.requires_grad and p not in known for group in self.param_groups for p in group["params"])
        if strangers:
            raise OptionError(f"comm='factors': {strangers} of the parameters are not in the model, or DDP ignores them")
        if dist.get_world_size(model.process_group) == 1:
            return
        if self._stacks is not None and self._comm is None:
            raise OptionError("comm='factors': register_comm_hook has to come before the first step and before load_state_dict")
        model.register_comm_hook(None, self._comm_hook)
        # Torch's own group is not held, see Shards.
        self._comm = Shards(None if model.process_group is dist.group.WORLD else model.process_group)

    # No annotations: torch compares them with its types, and here they would be text.
    @torch.no_grad()
    def _comm_hook(self, _, bucket):
        """Called in backward for each bucket, in the same order on all processes."""
        if bucket.index() == 0:
            self._prepare()
            for s in self._factor_stacks:
                s.begin(self._gram.step)
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise OptionError("comm='factors': no sparse gradients (nn.Embedding(sparse=True))")
        members: dict[FactorStack, dict[int, Tensor]] = {}
        plain = []
        for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True):
            s, i = self._places.get(p, (None, None))
            if s is None:
                plain.append(g)
            else:
                members.setdefault(s, {})[i] = g
        l2 = self._l2()
        with ieee_matmul(buffer.device):
            a = [s.accumulated(which, l2[s.group]) for s, which in members.items()]
            starts = [s.start[list(which)] for s, which in members.items()]
            for (s, which), factors in zip(members.items(), self._factors(a, starts, plain), strict=True):
                s.put(which, *factors)
        future = torch.futures.Future() if buffer.device.type == "cpu" else torch.futures.Future(devices=[buffer.device])
        future.set_result(buffer)
        return future

    def _factors(self, a: list[Tensor], q: list[Tensor], plain: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        group, size = self._comm.group, self._comm.size
        return factors_of_mean(a, q, self.options.power_iterations, lambda tensors: mean_(tensors, group, size), plain)

    def _check_comm(self, groups: list[list[Tensor]]) -> None:
        """Raise where factors are asked for and cannot be made: several processes and no hook, or sharded parameters."""
        if not self._by_factors:
            return
        if any(is_sharded(p) for params in groups for p in params):
            raise OptionError("comm='factors' is for DDP: under FSDP2 gradients are sharded, take comm='gradients'")
        for name in ("window_format", "error_format"):
            if getattr(self.options, name) != "plain":
                raise OptionError(f"comm='factors' takes {name}='plain', got {getattr(self.options, name)!r}")
        if self._comm is None:
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            if several or self._shards is not None:
                raise OptionError(
                    "comm='factors' needs its hook on several processes: call optimizer.register_comm_hook(model), with the "
                    "DistributedDataParallel, before the first backward and load_state_dict"
                )
        elif self._shards is not None and self._shards.size != self._comm.size:
            raise OptionError(
                f"comm='factors': DDP has {self._comm.size} processes, and {self._shards.size} share the optimizer's state"
            )
        elif self._shards is None:
            self._agree(self._comm)

    def _with_factors(self, groups: list[list[Tensor]], stacks: list[Stack]) -> list[Stack]:
        """`stacks`, of the windows, without error and warm start; those are in stacks of all compressed matrices, whole."""
        self._factor_stacks, self._places = [], {}
        if self._comm is None:
            return stacks
        number, whole = {p: i for i, p in enumerate(self._params)}, self._whole_state()
        for index, params in enumerate(groups):
            alike: dict[tuple, list[Piece]] = {}
            for p in filter(lambda p: "warm_start" in whole[p], params):
                alike.setdefault((matrix_shape(p), p.dtype, p.device), []).append(Piece(p, number[p]))
            for members in alike.values():
                self._factor_stacks += [self._factor_stack(part, index, whole) for part in batches(members)]
        self._places = {p: (s, i) for s in self._factor_stacks for i, p in enumerate(s.params)}
        for s in stacks:
            if isinstance(s.compressor, PowerIteration):
                s.compressor, s.feedback = ReadyFactors(s.pieces, self._places), ErrorFeedback(None)
        return stacks

    def _factor_stack(self, pieces: list[Piece], index: int, whole: dict) -> FactorStack:
        first, n = pieces[0].param, len(pieces)
        numbers = torch.tensor([piece.number for piece in pieces], device=first.device)

        def zeros(name: str) -> Tensor:
            shape, dtype = whole[first][name]
            return torch.zeros(n, *shape, dtype=dtype, device=first.device)

        q = zeros("warm_start")
        window_dtype = whole[first]["window_p"][1]
        rounding = {"dtype": window_dtype, "compute_dtype": q.dtype, "device": first.device}
        window = LowRankWindow(n, 0, *matrix_shape(first), q.shape[2], **rounding)
        compressor = PowerIteration(q, numbers, self.options.power_iterations)
        return FactorStack(pieces, numbers, index, compressor, ErrorFeedback(zeros("error"), numbers), window)

    def _errors_of_others(self, errors: int, parts: dict[str, Part]) -> dict[str, Part]:
        """Adapt `parts`, of this process, to a checkpoint with errors of `errors` processes (0: one of all, as without factors).

        Returns:
            What becomes the mean of those errors: only that matters to the run.
        """
        from ..distributed.folder import Part

        means = {}
        if errors == (0 if self._comm is None else self._comm.size):
            return means
        for number, p in enumerate(self._params):
            key = f"{number}.error"
            if key in parts and "warm_start" in self.state[p]:
                part = parts.pop(key)
                error = self.state[p]["error"]
                whole = part if self._comm is None else Part(error, tuple(error.shape))
                (means if errors else parts)[key] = whole
        return means

    def _check_factors(self) -> None:
        """Raise where the gradients in `step()` are not those that the hook has seen; on a GPU known one step late."""
        differ = []
        for s in self._factor_stacks:
            for i, p in enumerate(s.params):
                if p.grad is None:
                    continue
                if i not in s.samples:
                    raise OptionError(
                        "comm='factors': a gradient did not come from a backward through the DistributedDataParallel that "
                        "synchronizes (the last one before step() has to be outside no_sync)"
                    )
                seen, there = s.samples[i], _sample(p.grad)
                differ.append(((seen != there) & ~(seen.isnan() & there.isnan())).any())
        if differ and self._changed.exchange(torch.stack(differ).any()):
            raise OptionError(
                "comm='factors': gradients were changed between backward() and step() (clipping, a GradScaler), which would have "
                "no effect on the factors: take max_grad_norm=0 and no fp16, or comm='gradients'"
            )

    def _forget_factors(self) -> None:
        self._factor_stacks: list[FactorStack] = []
        self._places: dict[Tensor, tuple[FactorStack, int]] = {}
        self._changed = DelayedFlag()


def _sample(g: Tensor) -> Tensor:
    """A few entries of a gradient."""
    flat = g.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
