"""load_state_dict: everything is checked before anything is changed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.cells import Spec
from ..options import GroupOptions, OptionError, build
from .budget import entries_of
from .builder import Builder, State
from .choices import BUDGETED
from .parameters import levels_to_caller
from .saving import SHARD_FOLDER, Saving, check_container, check_keys, check_options

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
    before = builder.options, builder.budget.chosen, builder.setup, builder.copied, dict(state)
    try:
        return _load(state_dict, builder, groups, state, folder, own_stub)
    except OptionError:
        builder.options, builder.budget.chosen, builder.setup, builder.copied = before[:4]
        state.clear()
        state.update(before[4])
        raise


def take_choice(builder: Builder, groups: Sequence[dict[str, Any]], state: State, entries: Any) -> bool:
    """Take the choice of memory_budget whose state has these entries; tell whether there is one."""
    shared = {spec.name for spec in builder.method.shared_specs(0, builder.options)}

    def specs_with(options: Any) -> Iterable[Spec]:
        specs = builder.specs(groups, state, options)
        return [spec for entry in specs.values() for spec in entry.values() if spec.name not in shared]

    options = builder.budget.matching(entries, builder.options, specs_with)
    if options is not None:
        values = {name: getattr(options, name) for name in builder.budget.free}
        builder.replace_options(builder.budget.taken(builder.options, values), state)
    return options is not None


def _load(
    state_dict: Mapping[str, Any],
    builder: Builder,
    groups: list[dict[str, Any]],
    state: State,
    folder: str | Path | None,
    own_stub: Any,
) -> bool:
    section, saved, saved_groups = state_dict.get("efcp"), state_dict["state"], state_dict["param_groups"]
    budget = builder.budget
    if budget.free and isinstance(section, Mapping) and (saved or "sharded" in section):
        builder.replace_options(budget.taken(builder.options, section.get("options", {})), state)
    elif budget.free and section is None:
        take_choice(builder, groups, state, list(entries_of(saved)))
    expected = {spec.name for i in (0, 1) for spec in builder.method.shared_specs(i, builder.options)} | {"error"}
    unchosen = BUDGETED if budget.size is not None else ()
    check_options(section, saved, builder.name, builder.options, expected - {"step"}, unchosen)
    values = _group_values(saved_groups, groups)
    params = [p for g in groups for p in g["params"]]
    index = [i for g in saved_groups for i in g["params"]]
    entries = {p: saved[i] for i, p in zip(index, params, strict=True) if i in saved}
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
            trained = [p for i, p in enumerate(params) if i in stub.get("trained", [])]
            _thaw(trained, state)
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
    if builder.setup is not None:
        builder.setup.last = None
        builder.setup.listen_anew()
    for group, saved_group, checked in zip(groups, saved_groups, values, strict=True):
        kept = {k: group[k] for k in ("params", "param_names") if k in group}
        group |= {**copy.deepcopy({k: v for k, v in saved_group.items() if k not in kept}), **dataclasses.asdict(checked)}
    return used


def _group_values(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Give lr and weight_decay of the checkpoint's groups, checked."""
    sizes = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups]
    if sizes[0] != sizes[1]:
        raise OptionError(f"checkpoint has parameter groups of {sizes[0]} tensors, this optimizer of {sizes[1]}")
    for number, group in enumerate(saved_groups):
        check_keys(group, ("lr", "weight_decay"), f"its parameter group {number}")
    return [build(GroupOptions, {k: g[k] for k in ("lr", "weight_decay")}, "a group of the checkpoint") for g in saved_groups]


def _load_entries(
    builder: Builder,
    groups: Sequence[dict[str, Any]],
    state: State,
    params: Sequence[Tensor],
    entries: Mapping[Tensor, Any],
    with_window: bool,
    named: bool,
) -> None:
    try:
        _thaw(entries, state)
        saving = Saving(builder.prepare(groups, state), state)
        saving.check(list(enumerate(params)), entries, with_window)
        saving.load(entries)
    except OptionError as error:
        if named or not builder.budget.free:
            raise
        remedy = builder.budget.misfit(entries_of(dict(enumerate(entries.values()))), _BEFORE)
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


def _thaw(trained: Iterable[Tensor], state: State) -> None:
    """Let parameters that were frozen after they had been trained count as trained: they have state too."""
    state.update({p: {} for p in trained if p not in state and not p.requires_grad})
