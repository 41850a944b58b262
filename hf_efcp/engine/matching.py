"""Matches the parameters and groups of a checkpoint to an optimizer's: by name where both have names, else by position."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..options import OptionError
from .asked import say
from .parameters import ORDER, canonical_name, counted

# The most names in a message.
_NAMES = 5

# A group of a state dict or of an optimizer.
Group = Mapping[str, Any]


def matched(saved: Sequence[Group], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Give the groups of a checkpoint in the order of an optimizer's groups, with `params` in the order of the optimizer's.

    So the checkpoint's groups may have another order: `parameter_groups` gave another order, before group 0 was a group that
    decays.

    Args:
        saved: of the checkpoint; `params` are keys of its state.
        groups: of the optimizer.

    Raises:
        OptionError: the checkpoint has other parameters, or the same parameters in other groups.
    """
    there, here = names_of(saved), names_of(groups)
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if there is None or here is None:
        if sizes[0] != sizes[1]:
            raise OptionError(f"checkpoint has parameter groups of {sizes[0]} tensors, this optimizer of {sizes[1]}")
        return [dict(group) for group in saved]
    mine, theirs = [name for names in here for name in names], [name for names in there for name in names]
    if set(mine) != set(theirs):
        moved = any(a != b and b in set(theirs) for a, b in zip(theirs, mine, strict=False))  # by position it gets another's
        if moved or sizes[0] != sizes[1]:
            refuse_others(theirs, mine, f" (groups of {sizes[0]} tensors, here of {sizes[1]})")
        pairs = [f"{b} (there {a})" for a, b in zip(theirs, mine, strict=True) if a != b]
        say(f"checkpoint: parameters have other names there, and are taken by their position: {_listed(pairs)}")
        return [dict(group) for group in saved]
    left = [(names, group) for names, group in zip(there, saved, strict=True)]
    result = []
    for names in here:
        alike = next((entry for entry in left if set(entry[0]) == set(names)), None)
        if alike is None:
            raise OptionError(
                f"checkpoint has these parameters in other groups, of {sizes[0]} tensors, and this optimizer of {sizes[1]}: no "
                f"group there has just {_listed(names)}"
            )
        left.remove(alike)
        keys = dict(zip(alike[0], alike[1]["params"], strict=True))
        result.append({**alike[1], "params": [keys[name] for name in names]})
    return result


def refuse_others(there: Collection[str], here: Collection[str], more: str = "") -> None:
    """Raise OptionError, with the names that are missing or new, where a checkpoint is of other parameters.

    Args:
        there: names of the checkpoint's parameters.
        here: names of the optimizer's parameters.
        more: what else to say of the names.
    """
    known, own = set(there), set(here)
    new, missing = [n for n in here if n not in known], [n for n in there if n not in own]
    if not new and not missing:
        return
    parts = [f"trained here and not there: {_listed(new)}"] if new else []
    parts += [f"trained there and not here: {_listed(missing)}"] if missing else []
    raise OptionError(
        f"checkpoint is of other parameters; {'; '.join(parts)}{more}: train the same ones (requires_grad, adapters), or start "
        "from the model alone"
    )


def names_of(groups: Sequence[Group]) -> list[list[str]] | None:
    """Give the names of the parameters in each group, as in the bare model; None: a name is missing or there twice."""
    names = [[canonical_name(str(name)) for name in group.get("param_names") or ()] for group in groups]
    if any(len(own) != len(group["params"]) for own, group in zip(names, groups, strict=True)):
        return None
    every = [name for own in names for name in own]
    return names if len(set(every)) == len(every) else None


def labels(groups: Sequence[Group]) -> list[str]:
    """Give a label for each parameter of all groups: its position, and its name if the parameters have names."""
    names = names_of(groups)
    if names is None:
        return [f"parameter {i}" for i in range(sum(len(g["params"]) for g in groups))]
    return [f"parameter {i} ({name})" for i, name in enumerate(name for own in names for name in own)]


def take_order_out(groups: Sequence[MutableMapping[str, Any]]) -> list[int]:
    """Remove the key ORDER from the groups of a state dict; give the groups' indices in the order in which they are numbered.

    torch.distributed.checkpoint asks for every key that groups have, and older checkpoints lack this key.
    """
    order = counted(groups)
    for group in groups:
        group.pop(ORDER, None)
    return order


def check_numbers(saved: Sequence[Group], order: Iterable[int], taken: Sequence[Group], groups: Sequence[Group]) -> None:
    """Raise OptionError where a checkpoint numbers parameters in another order than an optimizer does.

    Args:
        saved: the checkpoint's groups.
        order: the groups' indices in the order in which they were numbered.
        taken: the same groups in the order of the optimizer's groups, see `matched`.
        groups: the optimizer's groups.
    """
    order = list(order)
    if sorted(order) != list(range(len(saved))):
        raise OptionError(f"checkpoint is damaged: numbered has to be the numbers of its {len(saved)} groups in some order")
    there = [key for i in order for key in saved[i]["params"]]
    here = [key for i in counted(groups) for key in taken[i]["params"]]
    if there != here:
        names = {key: name for group in saved for key, name in zip(group["params"], group.get("param_names", ()), strict=False)}
        number, *keys = next((i, a, b) for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        one, other = (names.get(key, f"parameter {key} of the checkpoint") for key in keys)
        raise OptionError(
            f"checkpoint counts its tensors, and counts them in another order: number {number} is {one} there and {other} here; "
            "give the parameter groups in the order that they had"
        )


def give_to_first(entries: dict[Tensor, Any], params: Sequence[Tensor], names: Collection[str]) -> None:
    """Move the entries that one parameter holds for all parameters to the first one: the groups' order may have changed.

    Args:
        entries: of a checkpoint, by parameter, changed in place.
        params: of the optimizer, in its order.
        names: of the entries that the first parameter holds for all.
    """
    held = [p for p, entry in entries.items() if isinstance(entry, Mapping) and any(name in entry for name in names)]
    if params and len(held) == 1 and held[0] is not params[0] and isinstance(entries.get(params[0], {}), Mapping):
        entry = entries[held[0]]
        moved = {name: entry[name] for name in names if name in entry}
        entries[held[0]] = {name: t for name, t in entry.items() if name not in names}
        entries[params[0]] = {**entries.get(params[0], {}), **moved}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
