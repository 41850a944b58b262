"""load_state_dict: everything is checked before anything is changed."""

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
from ..options import GroupOptions, OptionError, build
from .asked import say
from .builder import Builder, of_all
from .entries import State, keep_only, own
from .matching import check_numbers, give_to_first, labels, matched
from .parameters import ORDER, levels_to_caller
from .saving import SHARD_FOLDER, Saving, check_container, check_keys, check_origin
from .traces import Known, entries_of

# Where torch.distributed.checkpoint has mixed the state that it loads with the one that was there.
_BEFORE = "call choose_as with what was saved before torch.distributed.checkpoint loads it, or "


def load(
    state_dict: Any, builder: Builder, groups: list[dict[str, Any]], state: State, folder: str | Path | None, own_stub: Any
) -> bool:
    """Load a state dict into an optimizer's groups and state.

    Args:
        state_dict: as `state_dict()` gives it, or torch.distributed.checkpoint.
        builder: of the optimizer.
        groups: its parameter groups, changed in place.
        state: its state, changed in place.
        folder: where the tensors of a stub are; None: nowhere.
        own_stub: the stub of the present state; None: its tensors are not saved apart.

    Returns:
        Whether `folder` is used up.

    Raises:
        OptionError: not a checkpoint, or one of another optimizer, of other options or of other parameters. Nothing has changed.
    """
    check_container(state_dict)
    before = builder.options, builder.asked.chosen, builder.setup, builder.copied
    held = {key: dict(entry) if isinstance(entry, Mapping) else entry for key, entry in state.items()}
    try:
        return _load(state_dict, builder, groups, state, folder, own_stub)
    except OptionError:
        builder.options, builder.asked.chosen, builder.setup, builder.copied = before
        state.clear()
        state.update(held)
        raise


def take(
    builder: Builder, groups: Sequence[dict[str, Any]], state: State, entries: Iterable[Known], saved: Mapping[str, Any] | None
) -> None:
    """Take the open options of a saved run, and log them.

    Args:
        builder, groups, state: as in `load`.
        entries: of the saved state.
        saved: its options; None: only its tensors tell.

    Raises:
        OptionError: an option that is given is another one there, or no choice of memory_budget gives the state.
    """
    entries = list(entries)
    line = take_told(builder, groups, state, entries) if saved is None else take_named(builder, state, saved)
    if line is None:
        builder.asked.refuse(entries, builder.options)
    say(line or "")


def take_named(builder: Builder, state: State, saved: Any) -> str:
    """Take the open options from those that a checkpoint names; give the line to log.

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
    expected = {spec.name for i in (0, 1) for spec in builder.method.shared_specs(i, builder.options)} | {"error"}
    check_origin(section, saved, builder.name, expected - {"step"})
    line = None
    if section is None:
        line = take_told(builder, groups, state, list(entries_of(saved)))
    elif (
        any(own(entry, builder.kinds) for entry in saved.values()) or "sharded" in section
    ):  # else no step was taken, and a budget may not have chosen
        line = take_named(builder, state, section["options"])
    taken = matched(saved_groups, groups)
    values = _group_values(taken)
    params = [p for g in groups for p in g["params"]]
    index = [i for g in taken for i in g["params"]]
    positions = dict(zip(index, params, strict=True))
    not_ours = {positions.get(key): names for key, names in (section or {}).get("not_ours", {}).items()}
    entries, others = _divided({positions.get(key, key): entry for key, entry in saved.items()}, set(params), builder, not_ours)
    stub = (section or {}).get("sharded")
    if section is not None:
        with_window = section["options"].get("save_window", True)
    else:  # torch.distributed.checkpoint keeps state and groups only
        with_window = any("step" in entry for entry in entries.values() if isinstance(entry, Mapping))
    used = False
    if stub is not None:
        if folder is None:
            # As `Accelerator.prepare` does: out and in again. With a folder every process has to read it: of a stub in a file
            # the first process alone could say that it is its own.
            if own_stub is None or stub != own_stub:
                raise OptionError(
                    "this state_dict is the stub of a sharded optimizer; its tensors are in a folder beside it "
                    f"({SHARD_FOLDER} in a checkpoint): set shard_folder to it before load_state_dict"
                )
        else:
            check_numbers(saved_groups, (section or {}).get("numbered", range(len(taken))), taken, groups)
            trained = [p for i, p in zip(index, params, strict=True) if i in stub.get("trained", [])]
            _thaw(trained, builder, state)
            saving = Saving(builder.prepare(groups, state), state)
            saving.load_folder(Path(folder), with_window, stub.get("errors", 0))
            _warn_without_window(saving, with_window, builder.name)
            used = True
    elif entries:
        _load_entries(builder, groups, state, params, entries, with_window, section is not None)
        used = True
    else:  # a fresh optimizer's
        state.clear()
        builder.forget()
    keep_only(own, state, builder.ours)
    for key, entry in others.items():
        state[key] = {**state.get(key, {}), **entry} if isinstance(key, Tensor) else entry
    if builder.setup is not None:
        builder.setup.last = None
        builder.setup.listen_anew()
    for group, saved_group, checked in zip(groups, taken, values, strict=True):
        kept = {k: group[k] for k in ("params", "param_names", ORDER) if k in group}
        group |= {**copy.deepcopy({k: v for k, v in saved_group.items() if k not in kept}), **dataclasses.asdict(checked)}
    say(line or "")
    return used


def _group_values(saved_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Give lr and weight_decay of the checkpoint's groups, checked."""
    for number, group in enumerate(saved_groups):
        check_keys(group, ("lr", "weight_decay"), f"its parameter group {number}")
    return [build(GroupOptions, {k: g[k] for k in ("lr", "weight_decay")}, "a group of the checkpoint") for g in saved_groups]


def _load_entries(
    builder: Builder,
    groups: Sequence[dict[str, Any]],
    state: State,
    params: Sequence[Tensor],
    entries: dict[Tensor, Any],
    with_window: bool,
    named: bool,
) -> None:
    try:
        _thaw(entries, builder, state)
        saving = Saving(builder.prepare(groups, state), state)
        give_to_first(entries, saving.setup.params, of_all(builder.method, builder.options))
        saving.check(list(zip(labels(groups), params, strict=True)), entries, with_window)
        saving.load(entries)
    except OptionError as error:
        if named or not builder.asked.budgeted:
            raise
        remedy = builder.asked.misfit(entries_of(dict(enumerate(entries.values()))), _BEFORE)
        raise OptionError(f"{error}: {remedy}") from None
    _warn_without_window(saving, with_window, builder.name)


def _warn_without_window(saving: Saving, with_window: bool, name: str) -> None:
    if with_window:
        return
    saving.start_without_window()
    warnings.warn(
        f"{name}: the checkpoint was saved without its window (save_window=False): error feedback is "
        "restored, the window starts empty",
        stacklevel=levels_to_caller(),
    )


def _thaw(trained: Iterable[Tensor], builder: Builder, state: State) -> None:
    """Let parameters that were frozen after they had been trained count as trained: they have state too."""
    builder.thawed = {p for p in trained if not p.requires_grad}
    for p in builder.thawed:
        state.setdefault(p, {})


def _divided(
    saved: Mapping[Any, Any], params: Container[Any], builder: Builder, not_ours: Mapping[Any, Container[str]]
) -> tuple[dict[Tensor, Any], dict[Any, Any]]:
    """Divide a saved state into entries of ours, by parameter, and what wrappers keep there, on the parameters' devices.

    Args:
        saved: the state.
        params: of the optimizer.
        builder: its builder.
        not_ours: names of our kinds that a wrapper has given, by parameter.
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
        return value.to(device)
    if type(value) is dict:
        return {key: _on(part, device) for key, part in value.items()}
    return type(value)(_on(part, device) for part in value) if type(value) in (list, tuple) else value
