"""comm="factors": under DDP the processes all-reduce the rank-r factors of the mean gradient instead of the gradients.

The factors are made during backward, by a hook that DDP calls for each of its buckets. `p.grad` of a compressed matrix stays this
process's own gradient g_i. A parameter that is not compressed gets the mean gradient, as usual. `step()` takes the factors as the
windows' entries, and

    e_i <- e_i + g_i - P Q^T

Every process has the error and the warm start of every compressed matrix. The errors differ between processes. Their mean is the
error of a run that compresses the mean gradient. With a metric, g_i is whitened first by the D of the step before, which all
processes have. D takes the mean over processes of the squares of the g_i, which is sent along with the last factors.

On a GPU, the hook's work is queued on a stream of its own, so that backward goes on meanwhile. DDP waits, on the device, for the
future that the hook returns. The host waits for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..core.accumulated import Accumulated, LowRankEntry
from ..core.cells import ALL, Layout, Spec, matrix_shape
from ..core.compressors import Compressor
from ..core.lagged import Borrowed, Lagged
from ..core.linalg import ieee_matmul
from ..core.metric import Metric
from ..distributed.ddp import Replicas
from ..distributed.factors import factors_of_mean, mean_
from ..distributed.fsdp2 import is_sharded
from ..distributed.placement import Placement, Specs
from ..options import OptionError
from .factor_stacks import FactorStack, in_factors, places_of
from .formats import EntryFormat, LowRankFormat
from .setup import Setup, l2_of
from .stacks import Piece, Stack, batches


class ReadyFactors(Compressor):
    """The compressor of a window whose entries were made during backward.

    Args:
        pieces: of the window's stack.
        places: parameter -> its stack of factors, and its position there.
    """

    def __init__(self, pieces: Sequence[Piece], places: Mapping[Tensor, tuple[FactorStack, int]]):
        self.pieces, self.places = pieces, places

    def compress(self, a: Accumulated, step: Tensor) -> LowRankEntry:
        """Give the entry of P (n, rows, r), for the rows that this process holds, and Q (n, cols, r)."""
        stacks = [(*self.places[piece.param], piece.rows) for piece in self.pieces]
        p = [s.p[i] if rows is None else s.p[i, rows] for s, i, rows in stacks]
        return LowRankEntry.of(torch.stack(p), torch.stack([s.q[i] for s, i, _ in stacks]))


class ReadyFormat(LowRankFormat):
    """Low-rank entries without error, warm start and metric of their own.

    Args:
        layout, options: as in EntryFormat.
        places: see ReadyFactors; it is filled later.
    """

    def __init__(self, layout: Layout, options: Any, places: Mapping[Tensor, tuple[FactorStack, int]]):
        super().__init__(layout, options)
        self.places = places

    def specs(self) -> tuple[Spec, ...]:
        """See EntryFormat."""
        return tuple(s for s in super().specs() if not in_factors(s.name))

    def compressor(self, stack: Stack) -> Compressor:
        """See EntryFormat."""
        return ReadyFactors(stack.pieces, self.places)

    def metric(self, stack: Stack) -> Metric | None:
        """See EntryFormat."""
        if self.options.metric == "none":
            return None

        def sources() -> list[tuple[Lagged, int, slice]]:
            places = [(*self.places[piece.param], piece.rows or ALL) for piece in stack.pieces]
            return [(s.metric, i, rows) for s, i, rows in places if s.metric is not None]

        return Borrowed(stack.turn, self.layout, sources)


class FactorSync:
    """DDP's communication hook and what it needs.

    Args:
        options: of the optimizer, which need not be a low-rank one.

    Attributes:
        replicas: the processes of the DDP that has our hook; None: there is no hook.
        wanted: whether comm="factors" is asked for.
        places: parameter -> its stack of factors, and its position there.
    """

    def __init__(self, options: Any):
        self.wanted = getattr(options, "comm", "gradients") == "factors"
        self.replicas: Replicas | None = None
        self.places: dict[Tensor, tuple[FactorStack, int]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def register(self, model: DistributedDataParallel, hook: Any, params: Sequence[Tensor], fresh: bool) -> None:
        """Make DDP call `hook`.

        Args:
            model: holds all parameters.
            hook: as `DistributedDataParallel.register_comm_hook` takes it.
            params: the trained parameters.
            fresh: whether the optimizer has no state yet.

        Raises:
            OptionError: `model` is no DDP or lacks a parameter, or the optimizer has the state of a run without the hook.
        """
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(f"comm='factors' needs a DistributedDataParallel, got {type(model).__name__}")
        known = {p for n, p in model.module.named_parameters() if n not in model.parameters_to_ignore}
        strangers = sum(p.requires_grad and p not in known for p in params)
        if strangers:
            raise OptionError(f"comm='factors': {strangers} of the parameters are not in the model, or DDP ignores them")
        if dist.get_world_size(model.process_group) == 1:
            return
        if not fresh and self.replicas is None:
            raise OptionError("comm='factors': register_comm_hook has to come before the first step and before load_state_dict")
        model.register_comm_hook(None, hook)
        self.replicas = Replicas(model.process_group)

    def check_wanted(self, options: Any, name: str) -> None:
        """Raise OptionError if the hook is registered for an optimizer of class `name` without comm="factors"."""
        if not self.wanted:
            has = f"comm={options.comm!r}" if hasattr(options, "comm") else "no option comm"
            raise OptionError(f"register_comm_hook is for comm='factors', and this {name} has {has}")

    def check(self, params: Sequence[Tensor], placement: Placement, options: Any) -> None:
        """Raise OptionError where factors are asked for but cannot be made: no hook, sharded parameters, or codes as state."""
        self.places = {}  # of the stacks that are about to be built
        if not self.wanted:
            return
        if any(map(is_sharded, params)):
            raise OptionError("comm='factors' is for DDP: under FSDP2 gradients are sharded, take comm='gradients'")
        for name in ("window_format", "error_format"):
            if getattr(options, name) != "plain":
                raise OptionError(f"comm='factors' takes {name}='plain', got {getattr(options, name)!r}")
        if self.replicas is None:
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            if several or not placement.alone:
                raise OptionError(
                    "comm='factors' needs its hook on several processes: call optimizer.register_comm_hook(model), with the "
                    "DistributedDataParallel, before the first backward and load_state_dict"
                )
        elif placement.size != self.replicas.size:
            raise OptionError(
                f"comm='factors': DDP has {self.replicas.size} processes, and {placement.size} share the optimizer's state"
            )

    def release(self) -> None:
        """Let go of the stacks of factors."""
        self.places.clear()

    def held(self, specs: Sequence[Spec], processes: int = 1) -> tuple[Spec, ...]:
        """Say who holds each entry of a parameter's state: with factors, every process has errors, warm starts and metrics."""
        factors = self.replicas is not None or (self.wanted and processes > 1)
        if not factors or "warm_start" not in {spec.name for spec in specs}:
            return tuple(specs)

        def held(s: Spec) -> Spec:
            return dataclasses.replace(s, held="each" if s.name == "error" else "everywhere") if in_factors(s.name) else s

        return tuple(map(held, specs))

    def in_window(self, format: EntryFormat) -> EntryFormat:
        """Give the format of the windows' stacks, without the entries that the stacks of factors hold."""
        if self.replicas is None or not isinstance(format, LowRankFormat):
            return format
        return ReadyFormat(format.layout, format.options, self.places)

    def stacks(
        self,
        groups: Iterable[tuple[int, Sequence[Tensor]]],
        treatments: Sequence[Hashable],
        specs: Mapping[Tensor, Specs],
        options: Any,
    ) -> list[FactorStack]:
        """Make the stacks of factors; none without a hook. `treatments`: see `batches_of`."""
        if self.replicas is None:
            return []
        numbers, alike = {p: i for i, p in enumerate(specs)}, dict[tuple, list[Piece]]()
        for index, params in groups:
            for p in params:
                if "warm_start" in specs[p]:
                    key = treatments[index], matrix_shape(p), p.dtype, p.device
                    alike.setdefault(key, []).append(Piece(p, numbers[p], group=index))
        stacks = [FactorStack(batch, specs[batch[0].param], options) for members in alike.values() for batch in batches(members)]
        self.places |= places_of(stacks)
        return stacks

    def reduce(self, bucket: Any, setup: Setup, groups: Sequence[Mapping[str, Any]], options: Any) -> Any:
        """Make the factors of one of DDP's buckets. DDP calls this in backward, in the same order on all processes."""
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise OptionError("comm='factors': no sparse gradients (nn.Embedding(sparse=True))")
        future: Any = torch.futures.Future() if buffer.device.type == "cpu" else torch.futures.Future(devices=[buffer.device])
        with self._beside(buffer.device), ieee_matmul(buffer.device):
            if bucket.index() == 0:
                for s in setup.factors:
                    s.begin(setup.counters.step)
            self._reduce(bucket, groups, options)
            future.set_result(buffer)  # complete when the work that is now queued on this stream is done
        return future

    def _reduce(self, bucket: Any, groups: Sequence[Mapping[str, Any]], options: Any) -> None:
        members: dict[FactorStack, dict[int, Tensor]] = {}
        plain: list[Tensor] = []
        for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if p in self.places:
                s, i = self.places[p]
                members.setdefault(s, {})[i] = g
            else:
                plain.append(g)
        indices = [s.index(bucket.index(), list(gradients)) for s, gradients in members.items()]
        operands = [
            s.operand(gradients, index, s.each(lambda group: l2_of(groups[group], options)))
            for (s, gradients), index in zip(members.items(), indices, strict=True)
        ]
        starts = [s.start[index] for s, index in zip(members, indices, strict=True)]
        plain += [t for _, means in operands for t in means]
        factors = factors_of_mean([a for a, _ in operands], starts, options.power_iterations, self._mean, plain)
        for s, index, (p, q), (_, means) in zip(members, indices, factors, operands, strict=True):
            s.put(index, p, q, means)

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """On a GPU, queue the work inside on this hook's stream, after the work that the present stream has now.

        Memory that is allocated inside is freed for this stream only. The stream begins each time by waiting for the present one.
        """
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield

    def _mean(self, tensors: Sequence[Tensor]) -> None:
        assert self.replicas is not None
        mean_(tensors, self.replicas.group, self.replicas.size)
