"""Builds what an optimizer needs for its present parameters: placement, plan, specs, and stacks with the state in them."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.cells import Layout, Spec
from ..distributed.ddp import DDPShards
from ..distributed.fsdp2 import FSDP2Mesh, check_cuts, is_sharded
from ..distributed.placement import Alone, Placement, Specs
from ..distributed.plan import Owners
from ..distributed.zero import ZeroPieces
from ..options import OptionError
from .asked import Asked, say
from .entries import Kinds, State, Watch, adopt, fill, foreign, keep_count, keep_only, move, own
from .factor_sync import FactorSync
from .footprint import check_room, estimated
from .graph import StepGraph
from .method import Group, Method, entry_names, of_all
from .parameters import agree, counted, refuse_in_step
from .setup import Setup
from .stacks import batches_of, key_of, treatments_of, unfilled
from .torn import Torn

# Index of a group, and the parameters of the group that have state.
Trained = list[tuple[int, list[Tensor]]]
# See Builder.copied.
Copied = tuple[dict[Tensor, Owners], int, dict[Tensor, tuple[str, ...]] | None]


class Builder:
    """What an optimizer was asked for, and what is built from it.

    Args:
        name: of the optimizer's class.
        method: of the optimizer.
        options: all options, checked.
        asked: which options are given, and which a budget or a checkpoint sets.
        process_group: its processes share the state; None: the option `shard` decides.

    Attributes:
        setup: what is built; None: nothing is built for the present state yet.
        pieces: the placement of flat pieces, under DeepSpeed's ZeRO.
        sync: DDP's hook for comm="factors".
        graph: of a step, on a GPU.
        takes_tensors: whether the parameters may include tensors that are no nn.Parameter.
        copied: of a copied optimizer, the owners of the state, the number of processes, and the names of its entries (None: the
            names are unknown).
        thawed: frozen parameters that have state in a checkpoint that is being loaded.
        newcomers: parameters that had no state yet when this checkpoint was saved.
        torn: whether a step has ended half-way.
    """

    def __init__(self, name: str, method: Method, options: Any, asked: Asked, process_group: Any = None):
        self.name, self.method, self.options, self.asked = name, method, options, asked
        asked.name = name
        if process_group is not None and not hasattr(process_group, "size"):
            raise OptionError(f"process_group={process_group!r}: expected one of torch.distributed (dist.group.WORLD), or none")
        self.process_group = process_group
        self.pieces: ZeroPieces | None = None
        self.sync = FactorSync(options)
        self.takes_tensors = False
        self.graph = StepGraph()
        self.torn = Torn(name)
        self._remarked: Setup | None = None
        self._said: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Forget what is built: the next `prepare` builds it from the state."""
        self.setup: Setup | None = None
        self.thawed: set[Tensor] = set()
        self.newcomers: set[Tensor] = set()
        self.copied: Copied = {}, 1, {}

    @torch.no_grad()
    def prepare(self, groups: Sequence[Group], state: State, stepping: bool = False) -> Setup:
        """Give the setup of the current parameters, built at the first step and again when the parameters changed.

        Args:
            groups: the optimizer's parameter groups.
            state: of the optimizer; its entries become views of what is built.
            stepping: whether a step follows. Then the log says what was chosen.
        """
        if stepping:
            self.torn.refuse()
        trained = self.trained(groups, state)
        key = key_of(groups, trained)
        if self.setup is None or key != self.setup.key:
            self.setup = self._build(groups, trained, key, state, state)
        else:
            self._take(self.setup, state)
        if stepping and self.setup is not self._remarked:
            self._remark(self.setup)
        return self.setup

    @torch.no_grad()
    def fresh(self, groups: Sequence[Group], state: State) -> tuple[Setup, State]:
        """Build a setup and a state beside the present ones, to load a checkpoint into. The stacks are not initialized."""
        new: State = {}
        trained = self.trained(groups, state)
        with unfilled():
            return self._build(groups, trained, key_of(groups, trained), state, new), new

    @torch.no_grad()
    def settle(self, state: State) -> None:
        """Take over what others have put into the state, before it is read. A state that is kept elsewhere stays there."""
        self.torn.refuse()
        if self.setup is not None and self.setup.released:
            fill(state, self.setup, of_all(self.method, self.options))
        elif self.setup is not None:
            self._take(self.setup, state)

    def move(self, state: State, device: torch.device) -> None:
        """See EngineOptimizer.to."""
        if self.setup is None:
            return
        here = all(p.device == device for p in self.setup.params)
        self._take(self.setup, state) if here else move(state, self.setup, device)

    def _take(self, setup: Setup, state: State) -> None:
        """Take over what others have put into the state."""
        if setup.released or setup.watch is None or not setup.watch.holds(state):
            if setup.released:
                setup.renew()
            self._adopt(setup, state, built=False)
        elif setup.watch.written(setup):
            keep_count(setup)
            self.method.mend(setup, self.options)
            setup.listen_anew()
            setup.watch.note(setup)

    def _adopt(self, setup: Setup, state: State, built: bool) -> None:
        """Make the setup's buffers the state; they take over the entries that the state has."""
        setup.watch = None
        if built and self.setup is not None:
            setup.counters.go_on(self.setup.counters)
        if adopt(state, setup, of_all(self.method, self.options), built, self.ours):
            keep_count(setup)
            self.method.mend(setup, self.options)
        elif not built:
            setup.started, setup.last = False, None
        setup.listen_anew()
        setup.watch = Watch(state, setup, partial(_release, weakref.ref(self), weakref.ref(setup)))

    def _remark(self, setup: Setup) -> None:
        """Log what the method has chosen by shapes and devices, each line once."""
        for line in self.method.remarks(setup, self.options, self.asked.given):
            if line not in self._said:
                say(f"{self.name}: {line}")
                self._said.add(line)
        self._remarked = setup

    def ours(self, key: Any) -> Container[str]:
        """Give the names of this optimizer's entries that the state has under a key."""
        if self.setup is not None:
            return self.setup.specs.get(key, ())
        return self.kinds if (names := self.copied[2]) is None else names.get(key, ())

    @property
    def kinds(self) -> Kinds:
        """All names that the method's entries may have."""
        return Kinds(entry_names(self.method, self.options).union(*(() if self.setup is None else self.setup.specs.values())))

    def trained(self, groups: Sequence[Group], state: State) -> Trained:
        """Give the index of each group and its parameters with state, in the order in which parameters are numbered.

        A parameter that is frozen later keeps its entries, because K counts them. A parameter with a gradient is trained, even if
        it is frozen.
        """
        known = self.copied[0] if self.setup is None else self.setup.owners  # perhaps without entries on this process

        def counts(p: Tensor) -> bool:
            if p in self.newcomers or p.requires_grad or p.grad is not None:
                return p not in self.newcomers
            return p in state and (p in known or p in self.thawed or bool(own(state[p], self.ours(p))))

        return [(i, [p for p in groups[i]["params"] if counts(p)]) for i in counted(groups)]

    def keep_state_together(self) -> bool:
        """Let every process hold the whole state from now on (shard="off", no process_group); tell whether that is a change."""
        shared = self.options.shard == "auto" or self.process_group is not None
        self.options, self.process_group = dataclasses.replace(self.options, shard="off"), None
        return shared

    def take_options(self, options: Any, state: State) -> None:
        """Take the options of a saved run; a budget does not choose any more. A state made with other options is dropped."""
        self.asked.chosen = True
        if options != self.options:
            self.options = options
            keep_only(foreign, state, self.ours)
            self.forget()

    def specs(self, groups: Sequence[Group], state: State, options: Any, processes: int = 1) -> dict[Tensor, Specs]:
        """Declare the state of every parameter under some options, including what it holds for all parameters."""
        specs: dict[Tensor, Specs] = {}
        flat = None if self.pieces is None else self.pieces.parts
        known: dict[Any, tuple[Spec, ...]] = {}
        for index, params in self.trained(groups, state):
            for p in params:
                key = index, Layout.of(p)
                if key not in known:
                    known[key] = self.sync.held(self.method.specs(key[1], groups[index], options, flat), processes)
                shared = self.method.shared_specs(len(specs), options)
                specs[p] = {spec.name: spec for spec in (*known[key], *shared)}
        return specs

    def estimate(self, groups: Sequence[Group], state: State, processes: int, fsdp: bool) -> tuple[Any, dict[str, int]]:
        """Give the options, as a memory_budget chooses them, and the bytes by kind for EngineOptimizer.estimate_footprint."""
        options, asked = self.options, self.asked
        params = [p for _, params in self.trained(groups, state) for p in params]
        if asked.budgeted and not asked.chosen:
            fixed = _not_budgeted(self.sync, params, fsdp)
            options, _ = asked.choice(options, _bytes_with(self, groups, state, processes, fsdp), fixed)
        specs = self.specs(groups, state, options, processes)
        if fsdp:
            if self.sync.wanted:
                raise OptionError("comm='factors' is for DDP: under FSDP2 gradients are sharded, take comm='gradients'")
            scalars = sum(p.ndim == 0 for p in params)
            if scalars:
                raise OptionError(f"FSDP2 divides no 0-D parameters, and the model has {scalars}: make them 1-D")
            _named(options, lambda: check_cuts(specs, processes))
        kinds = estimated(specs, processes, fsdp)
        if asked.size is not None and not asked.budgeted and sum(kinds.values()) > asked.size:
            raise asked.too_large(sum(kinds.values()), options)
        return options, kinds

    def _build(self, groups: Sequence[Group], trained: Trained, key: list[Any], state: State, into: State) -> Setup:
        """Build the setup, and make its buffers the state `into`, the present or a new one. Parameters keep their owners."""
        params, old = [p for _, params in trained for p in params], self.setup
        for p in params:
            refuse_in_step(p, self.name, self.takes_tensors or self.pieces is not None)
        placement = self.placement(params)
        self.sync.check(params, placement, self.options)
        known, shards = self.copied[:2] if old is None else (old.owners if old.placement.shards > 1 else {}, old.placement.shards)
        if known and not placement.follows and placement.shards != shards:
            raise OptionError(
                f"this is a copy of an optimizer whose state was divided among {shards} processes, and holds one "
                "process's part only (a copy has no process_group): use save_shards, state_dict and load_state_dict"
            )
        if placement.apart or placement.follows:
            agree(self.name, self.options, placement, trained)
        bytes_with = _bytes_with(self, groups, state, placement.shards, placement.follows)
        fixed, known_to = _not_budgeted(self.sync, params, placement.follows), any(own(e, self.ours(p)) for p, e in into.items())
        self.options = self.asked.keep(self.options, bytes_with, placement, fixed, known_to)
        specs = self.specs(groups, state, self.options)
        _named(self.options, lambda: placement.check(specs))
        owners, numbers = placement.owners(specs, known), {p: i for i, p in enumerate(params)}
        check_room(specs, owners, placement.rank, self.options)
        method, options, sync = self.method, self.options, self.sync  # `self` in the closure would make a cycle
        device, treatments = params[0].device if params else torch.device("cpu"), treatments_of(groups)

        def make() -> tuple[list[Any], list[Any], Any]:
            stacks = [
                method.make_stack(pieces, groups[pieces[0].group], options, placement.parts, sync, total)
                for pieces, total in batches_of(trained, treatments, numbers, owners, placement)
            ]
            return stacks, sync.stacks(trained, treatments, specs, options), method.make_counters(len(params), options, device)

        setup = Setup(key, params, placement, owners, specs, make)
        self._adopt(setup, into, built=True)
        if old is not None and into is state:
            setup.started = old.started
            setup.last = old.last if getattr(self.options, "scope", "model") == "model" else None  # else numbered by tensor
        return setup

    def placement(self, params: Sequence[Tensor]) -> Placement:
        """Say which processes train these parameters together."""
        if any(map(is_sharded, params)):
            if self.process_group is not None:
                raise OptionError(
                    f"{self.name}: process_group has no meaning where parameters are DTensors: state follows their mesh"
                )
            return FSDP2Mesh.of(params, self.name)
        if self.pieces is not None:
            return self.pieces
        running = self.options.shard == "auto" and dist.is_available() and dist.is_initialized()
        if (self.process_group is not None or running) and dist.get_world_size(self.process_group) > 1:
            return DDPShards(self.process_group)
        return self.sync.replicas or Alone()


def _bytes_with(builder: Builder, groups: Sequence[Group], state: State, shards: int, follows: bool) -> Callable[[Any], int]:
    def bytes_with(options: Any) -> int:
        return sum(estimated(builder.specs(groups, state, options, shards), shards, follows).values())

    return bytes_with


def check_budget(builder: Builder, groups: Sequence[Group], state: State) -> None:
    """Raise OptionError where no state keeps the budget, for the number of processes and either way of dividing the state."""
    if builder.asked.size is None:
        return
    here = dist.is_available() and dist.is_initialized()
    processes = dist.get_world_size() if here else int(os.environ.get("WORLD_SIZE", "1"))
    errors = []
    for fsdp in (False, True):
        try:
            builder.estimate(groups, state, processes if fsdp or builder.options.shard == "auto" else 1, fsdp)
            return
        except OptionError as error:
            errors.append(error)
    raise errors[0]


def _not_budgeted(sync: FactorSync, params: Iterable[Tensor], follows: bool) -> list[str]:
    """Name the options that the budget must not choose: factors' errors, and vectors that FSDP2 cuts, cannot be codes."""
    return ["window_format", "error_format"] if sync.wanted or (follows and any(p.ndim == 1 for p in params)) else []


def _release(builder: weakref.ref[Builder], setup: weakref.ref[Setup]) -> None:
    """Free the memory of a setup whose entries are not in the state any more."""
    maker, made = builder(), setup()
    if maker is not None and made is not None:
        made.release()
        maker.sync.release()
        maker.graph = StepGraph()


def _named(options: Any, check: Callable[[], None]) -> None:
    """Run a check of a placement; if it raises, name the options in the error."""
    try:
        check()
    except OptionError as error:
        names = [name for name in ("window_format", "window_dtype", "error_format") if hasattr(options, name)] or ["block_size"]
        raise OptionError(f"{', '.join(f'{name}={getattr(options, name)!r}' for name in names)}: {error}") from None
