"""Local updates: workers train alone for some steps, and then take the mean of what they have learned.

DiLoCo (arXiv 2311.08105), DES-LOC (arXiv 2505.22549) and LoRDO (arXiv 2602.04396) are one loop. After `sync_every` steps, theta
of worker j has moved by Delta_j from theta_sync, where all began:

    Delta = mean_j Delta_j,   buffer <- momentum buffer + Delta,   theta_sync <- theta_sync + lr (Delta + momentum buffer)

With lr 1 and momentum 0, theta is the workers' mean. DiLoCo has 0.7 and 0.9. DES-LOC averages Adam's moments too, less often.
LoRDO takes its projections from Delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.linalg import cpu_by_default
from ..options import OptionError, build, unknown_name
from .asked import LocalOptions, periods, refuse_divided, refuse_newcomers, unwrapped
from .lordo import LoRDO
from .saving import load_worker, save_worker
from .workers import WorkerError, Workers


class LocalUpdates:
    """Lets every process train alone on its own data, and averages the models after each `sync_every` steps.

    The loop stays as it is. DDP's all-reduce is off from here on, data stays divided by rank, and each call of `optimizer.step()`
    counts. Weights are equal on all workers just after a synchronisation: call `synchronize()` before an evaluation and at the
    end. `accelerator.save_state` does so itself.

    Args:
        accelerator: Accelerate's; None: plain torch.
        model: what `accelerator.prepare` gave; without an accelerator, the model or its DistributedDataParallel.
        optimizer: what trains it: LoRDO, any other one of this package (with shard=off), or one of torch.
        sync_every, outer_lr, outer_momentum, offload, min_workers, worker_timeout: see `LocalOptions`.
        average_state: name of a state entry -> every how many synchronisations its mean over the workers is taken, such as
            {"exp_avg": 3, "exp_avg_sq": 6}; for LoRDO's matrices and torch's optimizers. None: these numbers for LoRDO, which
            are DES-LOC's example, and none for others.

    Attributes:
        options: an instance of `LocalOptions`.
        rounds: synchronisations so far.
        bytes_sent: bytes that this worker has given to collectives since it was made, see `Workers`.

    Raises:
        OptionError: a bad option; a model or optimizer that is divided among the processes; fp16, whose workers would skip
            different steps.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        sync_every: int = 32,
        *,
        average_state: Mapping[str, int] | None = None,
        **options: Any,
    ):
        self.options = self.check({"sync_every": sync_every, **options})
        self.model, self.optimizer = model, unwrapped(optimizer)
        self._lordo = self.optimizer if isinstance(self.optimizer, LoRDO) else None
        refuse_divided(accelerator, model, self.optimizer)
        self.average_state = periods(self.optimizer, average_state)
        self.workers = Workers(self.options.min_workers, self.options.worker_timeout)
        self.rounds = self._steps = 0
        _all_reduce(model, False)
        self._restart()
        self._handles: list[Any] = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self._folder: Path | None = None
        if accelerator is not None:
            self._handles += [
                accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(folder)),
                accelerator.register_load_state_pre_hook(lambda models, folder: self._remember(folder)),
                self.optimizer.register_load_state_dict_post_hook(self._after_load),
            ]

    @staticmethod
    def check(options: Mapping[str, Any]) -> LocalOptions:
        """Give the options, checked; `average_state` is left out, since it depends on the optimizer.

        Raises:
            OptionError: an unknown option, a wrong type or a value out of range.
        """
        return build(LocalOptions, {k: v for k, v in options.items() if k != "average_state"}, "LocalUpdates")

    # Training -------------------------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        """See the class."""
        return self.workers.bytes_sent

    @property
    def steps(self) -> int:
        """Steps since the last synchronisation."""
        return self._steps

    @cpu_by_default()
    def _before_step(self, *_: Any) -> None:
        """Make LoRDO's first projections of the workers' mean gradient: as large a message as one of DDP."""
        lordo = self._lordo
        if lordo is None or self._steps or self.workers.size == 1:
            return
        params = [p for p in self._projected() if not lordo.state[p]["projector"].any()]
        if not params:
            return

        def exchange() -> dict[Tensor, Tensor]:
            gradients = [torch.zeros_like(_full(p)) if p.grad is None else _full(p.grad) for p in params]
            if lordo.options.first_projector == "gradient":
                gradients = self.workers.mean(gradients)
            if not _finite(gradients):
                gradients = [torch.zeros_like(g) for g in gradients]  # drawn, the same everywhere
            return self._bases(lordo, params, gradients, first=True)

        lordo.turn(self.workers.together(exchange))

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        if self._steps >= self.options.sync_every:
            self.synchronize()

    @torch.no_grad()
    @cpu_by_default()
    def synchronize(self) -> None:
        """Bring the next synchronisation forward to now; after one, without a step since, there is nothing to do.

        To be called on every worker.

        Raises:
            WorkerError: a worker has died, and fewer than `min_workers` are left; the weights of one are not finite.
        """
        if not self._steps:
            return
        refuse_newcomers(self.optimizer, self._master)
        deltas, buffers, states, bases = self.workers.together(self._exchange)
        if self._alone:
            for p in self._params:
                self._master[p].copy_(p)
        else:
            for p, delta in zip(self._params, self._outer(deltas), strict=True):
                p.copy_(self._master[p].add_(delta))
        for b, mean in zip(self._buffers, buffers, strict=True):
            b.copy_(mean)
        for (p, name), mean in zip(self._averaged(), states, strict=True):
            if name in (entry := self.optimizer.state.get(p, {})):
                entry[name].copy_(mean)
        if self._lordo is not None:
            self._lordo.setup().note()
            self._lordo.turn(bases)
        self.rounds, self._steps = self.rounds + 1, 0

    @property
    def _alone(self) -> bool:
        """Whether the outer step changes nothing: one worker, and no outer learning rate or momentum."""
        return self.workers.size == 1 and self.options.outer_lr == 1 and self.options.outer_momentum == 0

    def _exchange(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict[Tensor, Tensor]]:
        """Give the mean pseudo-gradients, buffers, entries of the state that are due, and LoRDO's bases; change nothing."""
        own = [_full(p) - _full(self._master[p].to(p.device, p.dtype)) for p in self._params]
        deltas = self.workers.mean(own)
        if not _finite(deltas):
            raise _not_finite(self.workers, own, self._steps)
        buffers = self.workers.mean([b.detach() for b in self._buffers])
        states = self.workers.mean([_own(self.optimizer, p, name) for p, name in self._averaged()])
        bases: dict[Tensor, Tensor] = {}
        if self._lordo is not None:
            params = self._projected()
            of = dict(zip(self._params, deltas, strict=True))
            bases = self._bases(self._lordo, params, [of[p] for p in params], first=False)
        return deltas, buffers, states, bases

    def _bases(self, lordo: LoRDO, params: list[Tensor], matrices: list[Tensor], first: bool) -> dict[Tensor, Tensor]:
        """Give every worker the same bases: each computes some, and sends them to the others."""
        owners = [i % self.workers.size for i in range(len(params))]
        mine = {p: m for p, m, owner in zip(params, matrices, owners, strict=True) if owner == self.workers.position}
        computed = lordo.bases(mine, first)
        empty = {p: torch.empty_like(lordo.state[p]["projector"]) for p in params}
        return dict(zip(params, self.workers.shared([computed.get(p, empty[p]) for p in params], owners), strict=True))

    def _outer(self, deltas: list[Tensor]) -> list[Tensor]:
        """Give what is added to theta_sync: Delta by the outer learning rate, with Nesterov momentum."""
        lr, mu, found = self.options.outer_lr, self.options.outer_momentum, []
        for p, delta in zip(self._params, deltas, strict=True):
            delta = delta.to(self._master[p].device)
            if mu:
                buffer = self._momentum.setdefault(p, torch.zeros_like(delta)).mul_(mu).add_(delta)
                delta = delta + mu * buffer
            found.append(lr * delta)
        return found

    # State ----------------------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """Begin at the model's present weights."""
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        self._params: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad and p in trained]
        if not self._params:
            raise OptionError("local updates: the optimizer trains no parameter of the model")
        self._buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        with torch.no_grad():
            self._master = {p: self._kept(p) for p in self._params}
        self._momentum: dict[Tensor, Tensor] = {}
        self._steps = 0

    def _kept(self, t: Tensor) -> Tensor:
        return _full(t).to("cpu" if self.options.offload else t.device, copy=True)

    def _averaged(self) -> list[tuple[Tensor, str]]:
        """Give the entries of the state, (parameter, name), whose mean is due at the present synchronisation."""
        due = [name for name, period in self.average_state.items() if (self.rounds + 1) % period == 0]
        params = self._params if self._lordo is None else self._projected()
        return [(p, name) for p in params for name in due]

    def _projected(self) -> list[Tensor]:
        """Give those of the trained parameters that have a Q which changes."""
        return [] if self._lordo is None else [p for p in self._lordo.projected() if p in self._master]

    def save(self, folder: str | Path) -> None:
        """Synchronize, and write what the model's and the first worker's files lack; to be called on every worker.

        Args:
            folder: of the checkpoint; `local_updates` is made in it.
        """
        self.synchronize()
        names = {p: str(i) for i, p in enumerate(self._params)}
        low = {names[p]: t for p, t in self._master.items() if t.dtype != p.dtype}
        common = {
            "workers": self.workers.size,
            "rounds": self.rounds,
            "momentum": {names[p]: t for p, t in self._momentum.items()},
            "master": low,
        }
        save_worker(Path(folder), self.workers.position, self.optimizer, common)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote, once model and optimizer have been loaded; to be called on every worker.

        As many workers take their own states again. Of another number, worker j takes the state of worker j modulo the saved
        number, and the means of the entries in `average_state`.

        Raises:
            OptionError: the folder has no such files, or those of another optimizer.
        """
        self._folder = None
        common = load_worker(Path(folder), self.workers.position, self.workers.size, self.optimizer, tuple(self.average_state))
        self._restart()
        self.rounds = common["rounds"]
        with torch.no_grad():
            for i, p in enumerate(self._params):
                if (t := common["master"].get(str(i))) is not None:
                    self._master[p].copy_(t)
                if (t := common["momentum"].get(str(i))) is not None:
                    self._momentum[p] = t.to(self._master[p])

    def _remember(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def _after_load(self, *_: Any) -> None:
        """Accelerate has loaded the first worker's state everywhere; the model came before."""
        if self._folder is not None:
            self.load(self._folder)

    def detach(self) -> None:
        """Leave the model and the optimizer as they were: DDP's all-reduce is on again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _all_reduce(self.model, True)


def _own(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> Tensor:
    """Give an entry of the state; a parameter that has had no gradient here, but maybe elsewhere, has zeros."""
    entry = optimizer.state.get(p, {})
    if entry and name not in entry:
        raise OptionError(f"average_state: {unknown_name('state entry', name, [k for k in entry if k != 'step'])}")
    return entry[name] if entry else torch.zeros_like(p)


def _not_finite(workers: Workers, own: list[Tensor], steps: int) -> WorkerError:
    """Make the error that says whose weights are not finite; to be called on every worker."""
    here, n = _finite(own), workers.size
    good = float(workers.mean([torch.tensor([float(here)], device=own[0].device)])[0])
    return WorkerError(
        f"worker {workers.rank}: the weights of {round((1 - good) * n)} of {n} workers are not finite after "
        f"{steps} steps alone ({'not ' if here else ''}this one's): a smaller learning rate?"
    )


def _all_reduce(model: nn.Module, on: bool) -> None:
    """Let DDP reduce gradients and send buffers, or not: for good, what its `no_sync` does for a while."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = model.require_forward_param_sync = on


def _full(t: Tensor) -> Tensor:
    """Give numbers that keep small differences: fp32, or fp64 for fp64."""
    return t.detach() if t.dtype in (torch.float32, torch.float64) else t.detach().float()


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)
