"""load_state_dict: a checkpoint is read into a fresh state and checked. Then the fresh state takes over, or nothing changes."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Spec
from ..distributed.placement import Specs
from ..options import GroupOptions, OptionError, build
from .asked import say
from .builder import Builder
from .entries import State, keep_only, own
from .matching import check_numbers, give_to_first, labels, matched
from .method import of_all
from .parameters import ORDER, levels_to_caller
from .saving import SHARD_FOLDER, Saving, check, check_origin, expected
from .setup import RATE, Setup
from .traces import Known, entries_of
from .validate import agreed, check_container, check_keys, check_strangers

# The remedy in a message, for a state in which torch.distributed.checkpoint mixed loaded and present tensors.
_BEFORE = "call choose_as with what was saved before torch.distributed.checkpoint loads it, or "


def load(
    state_dict: Any, builder: Builder, groups: list[dict[str, Any]], state: State, folder: str | Path | None, own_stub: Any
) -> bool:
    """Load a state dict into an optimizer's groups and state.

    Args:
        state_dict: as `state_dict()` or torch.distributed.checkpoint gives it.
        builder: of the optimizer.
        groups: its parameter groups, changed in place.
        state: its state, changed in place.
        folder: where the tensors of a stub are; None: there is no folder.
        own_stub: the stub of the present state; None: the present state's tensors are not saved in a folder.

    Returns:
        Whether a state was loaded, so that `folder` is used up.

    Raises:
        OptionError: not a checkpoint, or a checkpoint of another optimizer, of other options or of other parameters. Nothing has
            changed.
    """
    check_container(state_dict)
    before = builder.options, builder.asked.chosen, builder.setup, builder.copied, builder.sync.places
    held = {key: dict(entry) if isinstance(entry, Mapping) else entry for key, entry in state.items()}
    try:
        return _load(state_dict, builder, groups, state, folder, own_stub)
    except BaseException:  # Ctrl-C too
        builder.options, builder.asked.chosen, builder.setup, builder.copied, builder.sync.places = before
        state.clear()
        state.update(held)
        raise
    finally:
        builder.thawed, builder.newcomers = set(), set()


def take(
    builder: Builder, groups: Sequence[dict[str, Any]], state: State, entries: Iterable[Known], saved: Mapping[str, Any] | None
) -> None:
    """Take the open options of a saved run, and log them.

    Args:
        builder, groups, state: as in `load`.
        entries: of the saved state.
        saved: its options; None: only its tensors tell its options.

    Raises:
        OptionError: a given option differs from the saved one, or no choice of memory_budget gives the state.
    """
    entries = list(entries)
    line = take_told(builder, groups, state, entries) if saved is None else take_named(builder, state, saved)
    if line is None:
        builder.asked.refuse(entries, builder.options)
    say(line or "")


def take_named(builder: Builder, state: State, saved: Any) -> str:
    """Take the open options from the options that a checkpoint names; give the line to log.

    Raises:
        OptionError: see Asked.taken.
    """
    options, line = builder.asked.taken(builder.options, saved)
    builder.take_options(options, state)
    return line


def take_told(builder: Builder, groups: Sequence[dict[str, Any]], state: State, entries: Iterable[Known]) -> str | None:
    """Take the open options under which the state has these entries; give the line to log. None: there are no such options."""
    shared = {spec.name for spec in builder.method.shared_specs(0, builder.options)}

    def specs_with(options: Any) -> Iterable[Spec]:
        specs = builder.specs(groups, state, options)
        of_each = {spec.name for spec in builder.method.shared_specs(1, options)}
        entries = enumerate(specs.values())
        return [s for i, entry in entries for s in entry.values() if s.name not in shared or (i and s.name in of_each)]

    options = builder.asked.matching(entries, builder.options, specs_with)
    return None if options is None else take_named(builder, state, dataclasses.asdict(options))


def _load(
    state_dict: Mapping[str, Any],
    builder: Builder,
    groups: list[dict[str, Any]],
    state: State,
    folder: str | Path | None,
    own_stub: Any,
) -> bool:
    section, saved, saved_groups = state_dict.get("efcp"), state_dict["state"], state_dict["param_groups"]
    known = {spec.name for i in (0, 1) for spec in builder.method.shared_specs(i, builder.options)} | {"error"}
    check_origin(section, saved, builder.name, known - {"step"})
    line = None
    if section is None:
        line = take_told(builder, groups, state, list(entries_of(saved)))
    elif (
        any(own(entry, builder.kinds) for entry in saved.values()) or "sharded" in section
    ):  # else no step was taken, and a budget may not have chosen
        line = take_named(builder, state, section["options"])
    taken = matched(saved_groups, groups)
    check_strangers(saved, saved_groups, builder.kinds)
    settings = [_settings(*pair) for pair in zip(groups, taken, _group_values(taken), strict=True)]
    params = [p for g in groups for p in g["params"]]
    positions = dict(zip([i for g in taken for i in g["params"]], params, strict=True))
    not_ours = {positions.get(key): names for key, names in (section or {}).get("not_ours", {}).items()}
    entries, others = _divided({positions.get(key, key): entry for key, entry in saved.items()}, set(params), builder, not_ours)
    stub = (section or {}).get("sharded")
    if section is not None:
        with_window = section["options"].get("save_window", True)
    else:  # torch.distributed.checkpoint keeps state and groups only
        with_window = any("step" in entry for entry in entries.values() if isinstance(entry, Mapping))
    builder.newcomers = {positions[i] for i in (section or {}).get("newcomers", ()) if i in positions}
    target = _Target(builder, groups, state, dict(zip(params, labels(groups), strict=True)), with_window)
    loaded = None
    if stub is None and entries:
        sums = {positions.get(key): known for key, known in (section or {}).get("checksums", {}).items()}
        loaded = _load_entries(target, entries, sums, section is not None)
    elif stub is not None and folder is not None:
        check_numbers(saved_groups, (section or {}).get("numbered", range(len(taken))), taken, groups)
        trained = [p for i, p in positions.items() if i in stub.get("trained", [])]
        loaded = _load_folder(target, Path(folder), trained, stub.get("errors", 0))
    elif stub is not None and (own_stub is None or stub != own_stub):
        # `Accelerator.prepare` loads the optimizer's own stub, which is skipped. If there is a folder, every process reads it:
        # only the first process could tell that a stub from a file is its own.
        raise OptionError(
            "this state_dict is the stub of a sharded optimizer; its tensors are in a folder beside it "
            f"({SHARD_FOLDER} in a checkpoint): set shard_folder to it before load_state_dict"
        )
    # Nothing fails from here on.
    if loaded is not None:
        _replace(builder, state, *loaded)
    elif stub is None:  # the checkpoint of a fresh optimizer
        state.clear()
        builder.forget()
    else:
        keep_only(own, state, builder.ours)
    for key, entry in others.items():
        state[key] = {**state.get(key, {}), **entry} if isinstance(key, Tensor) else entry
    if builder.setup is not None:
        builder.setup.last = None
        builder.setup.listen_anew()
    for group, values in zip(groups, settings, strict=True):
        group |= values
    say(line or "")
    return loaded is not None


def _replace(builder: Builder, state: State, setup: Setup, loaded: State) -> None:
    """Let a setup and its state take the place of the present ones."""
    if builder.setup is not None:
        builder.setup.watch = None  # its entries go, and nothing has to follow from that
    builder.setup = setup
    state.clear()
    state.update(loaded)


def _settings(group: Mapping[str, Any], saved: Mapping[str, Any], checked: GroupOptions) -> dict[str, Any]:
    """Give what a group takes from a checkpoint's group. Its parameters, and how their state is made, stay as they are."""
    kept = {"params", "compress", "kind", RATE} | ({"param_names", ORDER} & group.keys())
    return {**copy.deepcopy({k: v for k, v in saved.items() if k not in kept}), **dataclasses.asdict(checked)}


def _group_values(saved_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Check and give lr and weight_decay of the checkpoint's groups."""
    for number, group in enumerate(saved_groups):
        check_keys(group, ("lr", "weight_decay"), f"its parameter group {number}")
    return [build(GroupOptions, {k: g[k] for k in ("lr", "weight_decay")}, "a group of the checkpoint") for g in saved_groups]


@dataclasses.dataclass(frozen=True)
class _Target:
    """The optimizer that a checkpoint is read into.

    Attributes:
        builder, groups, state: of the optimizer.
        labels: names of the parameters, for messages.
        with_window: whether the checkpoint has the window.
    """

    builder: Builder
    groups: Sequence[dict[str, Any]]
    state: State
    labels: Mapping[Tensor, str]
    with_window: bool

    def specs(self) -> Mapping[Tensor, Specs]:
        """Declare the state that is expected."""
        return self.builder.specs(self.groups, self.state, self.builder.options)

    def fresh(self) -> tuple[Setup, State]:
        """Build the setup and the state that the checkpoint is read into."""
        return self.builder.fresh(self.groups, self.state)

    def finish(self, saving: Saving) -> None:
        """Check the state that was read as a whole; start without a window where the checkpoint has none."""
        builder = self.builder
        if problem := builder.method.problem(saving.setup, builder.options):
            raise OptionError(problem)
        if not self.with_window:
            saving.start_without_window()
            fed_back = getattr(builder.options, "residual", "feedback") == "feedback"
            error = "the compression error is restored" if fed_back else "the mean of the compression error starts at zero"
            warnings.warn(
                f"{builder.name}: the checkpoint was saved without its window (save_window=False): the window starts empty, "
                f"and {error}",
                stacklevel=levels_to_caller(),
            )


def _load_entries(
    target: _Target, entries: dict[Tensor, Any], sums: Mapping[Any, Mapping[str, Any]], named: bool
) -> tuple[Setup, State]:
    builder, params = target.builder, [(label, p) for p, label in target.labels.items()]
    try:
        _thaw(entries, builder, target.state)
        specs = target.specs()
        give_to_first(entries, [*specs], of_all(builder.method, builder.options))
        if known := not builder.asked.budgeted or builder.asked.chosen:  # check before memory is taken for the state
            check(params, specs, entries, target.with_window)
        setup, state = target.fresh()
        if not known:  # the options were not known before
            check(params, setup.specs, entries, target.with_window)
        saving = Saving(setup, state)
        saving.load(entries, sums, target.labels)
    except OptionError as error:
        if named or not builder.asked.budgeted:
            raise
        remedy = builder.asked.misfit(entries_of(dict(enumerate(entries.values()))), _BEFORE)
        raise OptionError(f"{error}: {remedy}") from None
    target.finish(saving)
    return setup, state


def _load_folder(target: _Target, folder: Path, trained: Iterable[Tensor], errors: int) -> tuple[Setup, State]:
    from ..distributed import folder as folders  # takes most of a second

    _thaw(trained, target.builder, target.state)
    placement, problem, index = target.builder.placement([*target.labels]), None, None
    try:
        index = folders.opened(folder)
        folders.check(index, expected(target.specs(), target.with_window, errors))
    except folders.CheckpointError as error:
        problem = str(error)
    agreed(placement, problem)
    assert index is not None
    setup, state = target.fresh()
    saving = Saving(setup, state)
    saving.load_folder(index, target.with_window, errors, target.labels)
    target.finish(saving)
    return setup, state


def _thaw(trained: Iterable[Tensor], builder: Builder, state: State) -> None:
    """Count parameters as trained that were frozen after some training: they have state too."""
    builder.thawed = {p for p in trained if not p.requires_grad}
    for p in builder.thawed:
        state.setdefault(p, {})


def _divided(
    saved: Mapping[Any, Any], params: Container[Any], builder: Builder, not_ours: Mapping[Any, Container[str]]
) -> tuple[dict[Tensor, Any], dict[Any, Any]]:
    """Divide a saved state into our entries, by parameter, and the values of wrappers, moved to the parameters' devices.

    Args:
        saved: the state.
        params: of the optimizer.
        builder: its builder.
        not_ours: by parameter, the names of entries that are a wrapper's although entries of ours may have these names.
    """
    entries, others, kinds = {}, {}, builder.kinds
    for key, entry in saved.items():
        if key not in params:
            if not isinstance(key, int):
                others[key] = entry
        elif not isinstance(entry, Mapping):
            entries[key] = entry
        else:
            known = {name for name in entry if name in kinds and name not in not_ours.get(key, ())}
            if known or not entry:
                entries[key] = {name: entry[name] for name in known}
            if len(known) < len(entry):
                others[key] = {name: _on(value, key.device) for name, value in entry.items() if name not in known}
    return entries, others


def _on(value: Any, device: torch.device) -> Any:
    """Put the tensors of a wrapper's entry on a device, as torch does; their dtypes stay."""
    if isinstance(value, Tensor):
        if value.is_meta:
            raise OptionError("checkpoint has a meta tensor, without numbers, among the values that are not this optimizer's")
        return value.to(device)
    if type(value) is dict:
        return {key: _on(part, device) for key, part in value.items()}
    return type(value)(_on(part, device) for part in value) if type(value) in (list, tuple) else value
