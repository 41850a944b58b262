"""Checks a checkpoint's state before it becomes the state: kinds, shapes, numbers, checksums, and K.

check_container   how the dict is built
check_entries     kinds, shapes and dtypes of the tensors, before memory is taken for them
gram_problem      whether K fits the window

The numbers are checked while they are copied into fresh memory: reading.py.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Spec
from ..core.gram import GramMatrix
from ..distributed.placement import Placement
from ..options import OptionError
from .entries import own

# Bytes of the window that can be read in less than a second, to form the rows of K anew.
_BYTES_IN_A_SECOND = 2**28
# Names of ours that wrappers use too.
_COMMON = ("step", "skipped", "momentum", "exp_avg", "exp_avg_sq")
# More processes than this do not train together.
_MOST_PROCESSES = 2**20
# By how much an inner product may exceed the norms' product, where products are in fp32.
_ROUNDING = 1e-3


def check_container(state_dict: Any) -> None:
    """Raise OptionError for an object that is not built as an optimizer's state dict is."""
    if not isinstance(state_dict, Mapping):
        raise OptionError(f"not the checkpoint of an optimizer: expected a dict, got {type(state_dict).__name__}")
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise OptionError(f"not the checkpoint of an optimizer: {' and '.join(missing)} missing; it has {list(state_dict)}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    _expect("state", state, Mapping, "a dict")
    _expect("param_groups", groups, (list, tuple), "a list")
    keys: list[Any] = []
    for number, group in enumerate(groups):
        place = f"its parameter group {number}"
        _expect(place, group, Mapping, "a dict")
        check_keys(group, ("params",), place)
        keys += _list_of(f"params of {place}", group["params"], (int, str))
        _list_of(f"param_names of {place}", group.get("param_names") or (), str)
    if len(set(keys)) < len(keys):
        raise OptionError("checkpoint is damaged: a parameter is in its groups twice")
    section = state_dict.get("efcp")
    if section is not None:
        _check_section(section)


def check_strangers(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], kinds: Container[str]) -> None:
    """Raise OptionError where a checkpoint has entries of ours under a key that is no parameter of its groups.

    Args:
        state: of the checkpoint.
        groups: of the checkpoint.
        kinds: all names that entries of ours may have.
    """
    known = {key for group in groups for key in group["params"]}
    names = {name for group in groups for name in group.get("param_names") or ()}
    for key in state.keys() - known:
        if key in names or str(key).isdecimal() or any(name not in _COMMON for name in own(state[key], kinds)):
            raise OptionError(f"checkpoint is damaged: it has state under {key!r}, which is no parameter of its groups")


def _check_section(section: Any) -> None:
    _expect("its efcp section", section, Mapping, "a dict")
    check_keys(section, ("format", "class", "options"), "its efcp section")
    _expect("its format", section["format"], int, "a number")
    if section["format"] < 1:
        raise OptionError(f"checkpoint is damaged: its format has to be at least 1, got {section['format']}")
    _expect("its class", section["class"], str, "a name")
    _expect("its options", section["options"], Mapping, "a dict")
    for name in section["options"]:
        _expect("an option's name", name, str, "text")
    _list_of("numbered", section.get("numbered", ()), int)
    sums = section.get("checksums", {})
    _expect("checksums", sums, Mapping, "a dict")
    for entry in sums.values():
        _expect("checksums", entry, Mapping, "dicts")
    strangers = section.get("not_ours", {})
    _expect("not_ours", strangers, Mapping, "a dict")
    for names in strangers.values():
        _list_of("not_ours", names, str)
    if "sharded" in section:
        stub = section["sharded"]
        _expect("sharded", stub, Mapping, "a dict")
        _list_of("trained", stub.get("trained", ()), int)
        _expect("errors", stub.get("errors", 0), int, "a number")
        if not 0 <= stub.get("errors", 0) <= _MOST_PROCESSES:
            raise OptionError(f"checkpoint is damaged: errors={stub['errors']} has to be a number of processes")


def check_keys(part: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    """Raise OptionError where a part of a checkpoint lacks a key."""
    missing = [key for key in keys if key not in part]
    if missing:
        raise OptionError(f"checkpoint is damaged: {place} lacks {', '.join(missing)}")


def _expect(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise OptionError(f"checkpoint is damaged: {name} has to be {words}, got {type(value).__name__}")


def _list_of(name: str, values: Any, kind: type | tuple[type, ...]) -> list[Any]:
    _expect(name, values, (list, tuple, range), "a list")
    for value in values:
        _expect(f"each of {name}", value, kind, "a number or a name")
    return list(values)


def check_entries(label: str, here: Mapping[str, Spec], there: Any) -> None:
    """Raise OptionError where a checkpoint's entries of a parameter are not the tensors that are expected.

    Args:
        label: name of the parameter, for messages.
        here: specs of the expected entries.
        there: the checkpoint's entries.
    """
    if not isinstance(there, Mapping):
        raise OptionError(f"{label}: the checkpoint has {type(there).__name__} in place of its state")
    if here.keys() != there.keys():
        missing, extra = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
        raise OptionError(
            f"{label}: the checkpoint's state does not fit this optimizer's parameters and options"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unexpected: {', '.join(extra)}" if extra else "")
        )
    for name, spec in here.items():
        t = there[name]
        if not isinstance(t, Tensor):
            raise OptionError(f"{label}: {name} is of type {type(t).__name__} in the checkpoint, not a tensor")
        if kind := _strange(t):
            raise OptionError(f"{label}: {name} is a {kind} tensor in the checkpoint, but has to be a plain tensor with numbers")
        if t.dtype == spec.dtype and t.shape == spec.shape:
            continue
        widened = (spec.dtype, t.dtype) == (torch.int16, torch.int32)  # as it is saved under FSDP2
        if t.shape != spec.shape or not widened:
            raise OptionError(f"{label}: {name} is {tuple(t.shape)} {t.dtype} in the checkpoint, {spec.shape} {spec.dtype} here")


def _strange(t: Tensor) -> str | None:
    """Say what kind of tensor this is, if its numbers are not in plain memory; else None."""
    if t.is_nested:
        return "nested"
    if t.layout != torch.strided:
        return str(t.layout).removeprefix("torch.")
    if t.is_quantized:
        return "quantized"
    if t.device.type == "meta":
        return "meta"
    end = t.numel() if t.is_contiguous() else 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    if t.numel() and t.untyped_storage().nbytes() < (t.storage_offset() + end) * t.itemsize:  # its memory was released
        return "released"
    return None


def agreed(placement: Placement, problem: str | None) -> None:
    """Raise OptionError on every process, if one process has a problem."""
    for rank, text in enumerate(placement.gather(problem)):
        if text is not None:
            raise OptionError(text if text == problem else f"rank {rank}: {text}")


def gram_problem(gram: GramMatrix, row: Callable[[int], Tensor], placement: Placement, size: int, verify: bool) -> str | None:
    """Say what is wrong with K; None: the checks found nothing.

    Args:
        gram: K and the count of steps.
        row: slot -> the row of K, (groups, m) fp64, formed from the entries of this process.
        placement: of the process.
        size: bytes of the window, on all processes.
        verify: whether K is formed anew from the window and compared, even if that takes more than a second.
    """
    k, filled = gram.matrix, int(gram.filled)
    squares = k.diagonal(dim1=-2, dim2=-1)
    norms = squares.clamp_min(0).sqrt()
    right = torch.stack(
        [
            (k == k.mT).all(),
            (squares >= 0).all() & (k.abs() <= norms[:, :, None] * norms[:, None] * (1 + _ROUNDING)).all(),
            ~k[:, filled:].any() & ~k[:, :, filled:].any(),
        ]
    ).tolist()
    for ok, what in zip(right, ("a symmetric matrix", "inner products", f"zeros outside of {filled} entries"), strict=True):
        if not ok:
            return f"gram is damaged in the checkpoint: expected {what}"
    if placement.flat or not (verify or filled * size <= _BYTES_IN_A_SECOND):
        return None
    for slot in range(filled):
        if not gram.agrees(slot, placement.sum(row(slot))).all():
            return f"gram is damaged in the checkpoint: slot {slot} is not made of the window's entries"
    return None
