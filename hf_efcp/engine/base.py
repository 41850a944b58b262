"""The interface of every optimizer: parameter groups, the closure, and state, as torch.optim has them."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.linalg import cpu_by_default, ieee_matmul
from ..distributed.fsdp2 import FSDP2Mesh, is_sharded
from ..distributed.placement import Alone
from ..distributed.zero import ZeroPieces
from ..options import GroupOptions, build
from .asked import Asked, merged
from .builder import Builder, Copied, check_budget
from .constructor import Defaults, constructor
from .entries import unstacked
from .figures import Figures
from .loading import load, take
from .method import Method
from .parameters import check_rate, checked_group, checked_params
from .probe import Probe
from .saving import Saving, complete
from .setup import Setup, check_numbers
from .traces import saved_choice


class EngineOptimizer(Figures, torch.optim.Optimizer):
    """A method with everything around it: placements, formats, a memory budget, checkpoints.

    Subclasses give `options_type` and `method`, and `measured`: the values of preset="measured", where they differ from the
    defaults of `options_type`.

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. Groups may set `lr`, `weight_decay`, and `compress`
            (false: the group's tensors are not compressed).
        lr: learning rate; None: every group has its own.
        weight_decay: decoupled, p <- (1 - lr*wd) p.
        process_group: a process group of torch.distributed. Its processes hold the same parameters and gradients, and share the
            state. None: `shard` decides.
        **options: the fields of `options_type`.

    Attributes:
        builder: what the user asked for, and what is built from it.
        shard_folder: the folder where the next `load_state_dict` finds the tensors of a state that `save_shards` wrote; None
            afterwards.

    Raises:
        OptionError: unknown option, wrong type, value out of range, or a parameter that cannot be optimized.
    """

    options_type: ClassVar[type]
    method: ClassVar[Method]
    measured: ClassVar[Mapping[str, Any]] = {}
    shard_folder: str | Path | None = None

    def __init__(
        self, params: Any, lr: float | None = None, *, weight_decay: float = 0.0, process_group: Any = None, **options: Any
    ):
        name = type(self).__name__
        group = build(GroupOptions, {"weight_decay": weight_decay} | ({} if lr is None else {"lr": lr}), name)
        checked = merged(self.options_type, self.measured, options, name)
        self.builder = Builder(name, self.method, checked, Asked(name, checked, options), process_group)
        super().__init__(checked_params(params, name), Defaults(lr=lr and group.lr, weight_decay=group.weight_decay))
        check_budget(self.builder, self.param_groups, self.state)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "options_type" in vars(cls) and "__init__" not in vars(cls):
            setattr(cls, "__init__", constructor(EngineOptimizer.__init__, cls, cls.options_type))  # noqa: B010

    @property
    def options(self) -> Any:
        """The options, an instance of `options_type`; a memory_budget chooses some of them at the first step."""
        return self.builder.options

    @torch._disable_dynamo  # as torch's own methods: a compiled training step calls this one as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. A non-finite gradient refuses it: nothing changes, and the refusal is counted and warned about.

        On a GPU the host does not wait for the device: the warning comes one step later.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: an earlier step raised half-way (out of memory, Ctrl-C), which `load_state_dict` mends; or the step is
                inside torch.inference_mode().
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with cpu_by_default():
            self._step()
        return loss

    def _step(self) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.builder.name}: step() does not work inside torch.inference_mode(): call it outside")
        check_numbers(self.param_groups, self.builder.name)
        setup = self.builder.prepare(self.param_groups, self.state, stepping=True)
        if setup.params and setup.has_work():
            setup.probe, self._probed = Probe(setup, self.param_groups, self.options) if self._probed else None, False
            with ieee_matmul(setup.counters.step.device), self.builder.torn.watch(setup):
                self.builder.graph.step(self.method, setup, self.param_groups, self.builder.options)
            setup.note()
            setup.warn_of_skips(self.builder.name)
        elif not setup.has_gradients():
            setup.warn_of_idleness(self.builder.name)

    @cpu_by_default()
    def setup(self) -> Setup:
        """Give what is built for the present parameters: stacks, specs, placement. Before the first step, it is built now."""
        return self.builder.prepare(self.param_groups, self.state)

    # Parameters -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its tensors join the run with fresh state.

        Raises:
            OptionError: no lr, a bad one or a bad weight_decay, an option of the whole optimizer, or a parameter of a kind that
                cannot be optimized (complex; a flat FSDP1 shard; a DTensor that is not divided by rows).
        """
        super().add_param_group(checked_group(param_group, self.options_type, type(self).__name__))
        check_rate(self.param_groups, type(self).__name__)
        self.builder.takes_tensors |= any(type(p) is Tensor for p in self.param_groups[-1]["params"])

    def take_flat_pieces(self, coordinates: int, parts: Sequence[slice] | None = None) -> None:
        """Prepare for ZeRO-1 and 2, which replace the parameters of the one group by this process's flat piece of them.

        K is then summed over all processes, and nothing else is sent. Each process's state_dict has its own state.

        Args:
            coordinates: the number of coordinates of all pieces, without padding.
            parts: the place of each parameter's part in this process's piece. metric="tensor" needs it.
        """
        self.builder.pieces = ZeroPieces(coordinates, None if parts is None else tuple(parts))

    def register_comm_hook(self, model: Any) -> None:
        """Make DDP all-reduce factors (comm="factors"). Call it before the first backward, and before `load_state_dict`.

        After backward, each process then has its own gradients of compressed matrices. They must reach `step()` unchanged.
        Trainer and Accelerate call this for you. On one process there is nothing to do.

        Args:
            model: a DistributedDataParallel that holds all parameters. Its process group makes the factors.

        Raises:
            OptionError: the option comm is not "factors", `model` is no DDP or lacks a parameter, or the optimizer already has
                the state of a run without the hook.
        """
        sync = self.builder.sync
        sync.check_wanted(self.options, type(self).__name__)

        # No annotations: torch compares them with its types, and here they would be text.
        @torch.no_grad()
        @cpu_by_default()
        def hook(_, bucket):
            return sync.reduce(bucket, self.setup(), self.param_groups, self.options)

        sync.register(model, hook, _params(self), fresh=self.builder.setup is None)

    # State ----------------------------------------------------------------------------------------------------------------

    @cpu_by_default()
    def state_dict(self) -> dict[str, Any]:
        """Give the state in torch's form, with the optimizer's options under "efcp"; without the window if `save_window` is off.

        Tensors are copies, or DTensors where parameters are DTensors (FSDP2). A state that is divided in another way is left out,
        see `save_shards`: processes do not communicate here, since Trainer calls this on the first process only.
        """
        with _hooks(self) as (before, after):
            for hook in before:
                hook(self)
            self.builder.settle(self.state)
            saved = super().state_dict()
            complete(saved, self.builder, self.param_groups, self.state, id(self))
            for hook in after:
                saved = saved if (changed := hook(self, saved)) is None else changed
        return saved

    @torch.no_grad()
    @cpu_by_default()
    def load_state_dict(self, state_dict: Any) -> None:
        """Restore a state. Everything is checked before anything is changed.

        Raises:
            OptionError: not a checkpoint, or a checkpoint of another optimizer, of other options or of other parameters.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saving = Saving.of(self.builder, self.state)
        own_stub = saving.stub(id(self), _params(self)) if saving is not None and saving.placement.apart else None
        if load(state_dict, self.builder, self.param_groups, self.state, self.shard_folder, own_stub):
            self.shard_folder = None
        self.builder.torn.mended()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: tensors are copied out of the stacks. The copy builds its stacks from them."""
        made, state = _made(self.builder), unstacked(self.state, self.builder.ours)
        return {**super().__getstate__(), "state": state, "made": made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. A copy has no process group, since a process group belongs to its process."""
        options, asked, copied = state.pop("made", None) or _made_by_0_1(state)
        super().__setstate__(state)
        self.builder = Builder(type(self).__name__, self.method, options, asked)
        self.builder.takes_tensors, self.builder.copied = True, (*copied, None)[:3]

    @torch.no_grad()
    @cpu_by_default()
    def to(self, device: torch.device | str) -> EngineOptimizer:
        """Move the state to a device, free its old memory, and give the optimizer. The next step brings the state back."""
        self.builder.move(self.state, torch.device(device))
        return self

    @cpu_by_default()
    def save_shards(self, folder: str | Path) -> None:
        """Write this process's part of a divided state to a folder. Call it on every process.

        If the state is not divided, or consists of DTensors (FSDP2), `state_dict` has it, and nothing is written here. Otherwise
        `state_dict()` is a stub. `load_state_dict(stub)` reads the folder that `shard_folder` names, on any number of processes.
        """
        saving = Saving.of(self.builder, self.state)
        if saving is not None and saving.placement.apart:
            self.builder.settle(self.state)
            saving.save_folder(Path(folder), getattr(self.options, "save_window", True))

    @cpu_by_default()
    def choose_as(self, saved: Mapping[str, Any] | str | Path) -> None:
        """Take the options of a saved run that are not given here. Call it on every process, before loading.

        It is for torch.distributed.checkpoint, which loads tensors of the sizes that the optimizer has. `load_state_dict`,
        Trainer and Accelerate do not need it. If the saved state does not name its options, its tensors tell the options that
        shape them; with a memory_budget they have to tell. A present state of other options is dropped.

        Args:
            saved: a folder of `torch.distributed.checkpoint.save`, a file of `torch.save`, or a state dict. Where parameters are
                DTensors, a process that has none (an empty dict, no such file) takes it from the others.

        Raises:
            OptionError: nothing can be read, a given option differs from the saved one, or no choice of memory_budget gives
                the state that was saved.
        """
        sharded = [p for p in _params(self) if is_sharded(p)]
        entries, options = saved_choice(saved, FSDP2Mesh(sharded) if sharded else Alone())
        take(self.builder, self.param_groups, self.state, entries, options)


@contextlib.contextmanager
def _hooks(optimizer: torch.optim.Optimizer) -> Iterator[tuple[list[Any], list[Any]]]:
    """Give the hooks that belong before and after `state_dict`. torch calls none of them inside: its dict is not complete yet."""
    names = "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"
    hooks = [getattr(optimizer, name) for name in names]
    for name in names:
        setattr(optimizer, name, collections.OrderedDict())
    try:
        yield list(hooks[0].values()), list(hooks[1].values())
    finally:
        for name, there in zip(names, hooks, strict=True):
            setattr(optimizer, name, there)


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _made(builder: Builder) -> tuple[Any, Asked, Copied]:
    """Give what a copy of the optimizer needs: all options, which of them were asked for, and `Builder.copied`."""
    builder.torn.refuse()
    copied = builder.copied
    if (setup := builder.setup) is not None:
        owners = copied[:2] if setup.placement.follows else (setup.owners, setup.placement.shards)
        copied = *owners, {p: tuple(specs) for p, specs in setup.specs.items()}
    return builder.options, copy.copy(builder.asked), copied


def _made_by_0_1(state: dict[str, Any]) -> tuple[Any, Asked, Copied]:
    """Take options, budget and owners out of `state`, a pickle of the first 0.1; give them as `_made` does."""
    options, owners = state.pop("options"), state.pop("owners", None)
    asked = Asked("", options, dataclasses.asdict(options))
    asked.open = asked.budgeted = state.pop("_free")
    asked.chosen = state.pop("_chosen")
    return options, asked, ({}, 1, None) if owners is None else (owners[1], owners[0], None)
