"""memory_budget in a run: when it chooses, when it takes what a saved run has chosen, and what exceeds it.

A state dict of ours names the options that it was made with. One that torch.distributed.checkpoint has gathered does not, but
its tensors tell: the window size is that of the Gram matrix, and the rest is the choice whose state has their shapes and dtypes.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Spec
from ..distributed.placement import Placement
from ..options import OptionError, as_text
from .choices import candidates, choose, described, free_options, shown

_log = logging.getLogger("hf_efcp")

# Name of a state entry, shape on one process, dtype.
Known = tuple[str, tuple[int, ...], torch.dtype]
# Options -> the specs of all parameters' state.
SpecsWith = Callable[[Any], Iterable[Spec]]


class Budget:
    """What memory_budget leaves open, and whether that is chosen.

    Args:
        name: of the optimizer's class.
        options: of the optimizer, with the defaults of its class where they are not given.
        given: the options that the user gave.

    Attributes:
        free: names of the options that the budget chooses; none without a budget.
        chosen: whether it has, or a checkpoint in its place.
    """

    def __init__(self, name: str, options: Any, given: Mapping[str, Any]):
        self.name = name
        self.size: int | None = getattr(options, "memory_budget", None)
        self.free = free_options(options, given) if self.size is not None else ()
        self.chosen = False

    def keep(
        self, options: Any, bytes_with: Callable[[Any], int], placement: Placement, fixed: Iterable[str], new_parameters: bool
    ) -> Any:
        """Choose the options that the budget leaves open, once; afterwards see that the budget is kept.

        Args:
            options: of the optimizer.
            bytes_with: options -> bytes of state.
            placement: of the process.
            fixed: names that are not left to the budget here.
            new_parameters: whether parameters joined a running optimizer.

        Returns:
            The options.

        Raises:
            OptionError: the state is too large.
        """
        if self.size is None:
            return options
        if self.free and not self.chosen:
            options, size = self.choice(options, bytes_with, fixed)
            self.chosen = True
            if placement.rank == 0:
                # A warning's level, because that is shown where nobody has set one.
                message = f"{self.name}: memory_budget={shown(self.size)}: {described(options)}: {shown(size)} of state"
                more = "" if placement.size == 1 and not placement.follows else " for each process"
                if placement.follows:
                    more += "; to load by torch.distributed.checkpoint what other processes saved, call choose_as(folder) first"
                _log.warning("%s%s", message, more)
            return options
        size = bytes_with(options)
        if size > self.size:
            if not self.free and not new_parameters:
                raise self.too_large(size, options)
            reason = "with the new parameters" if new_parameters else f"with {described(options)}, as it was saved,"
            warnings.warn(f"memory_budget={shown(self.size)}: {reason} the state takes {shown(size)}", stacklevel=2)
        return options

    def choice(self, options: Any, bytes_with: Callable[[Any], int], fixed: Iterable[str] = ()) -> tuple[Any, int]:
        """Give the options that the budget chooses, and the bytes of their state; raise OptionError where nothing fits."""
        return choose(options, tuple(n for n in self.free if n not in set(fixed)), bytes_with)

    def too_large(self, size: int, options: Any) -> OptionError:
        """Make the error for a state that exceeds the budget."""
        return OptionError(f"memory_budget={shown(self.size or 0)}: with {described(options)} the state takes {shown(size)}")

    def taken(self, options: Any, values: Mapping[str, Any]) -> Any:
        """Give the options with what was chosen in the run that was saved: that wins."""
        self.chosen = True
        return dataclasses.replace(options, **{name: values[name] for name in self.free if name in values})

    def matching(self, entries: Iterable[Known], options: Any, specs_with: SpecsWith) -> Any | None:
        """Give the options under which the state has these entries; None: there are none."""
        there = collections.Counter(map(_widened, entries))
        sizes = sorted({shape[-1] for name, shape, _ in there if name == "gram" and shape})
        for m in sizes if "window_size" in self.free else set(sizes) & {options.window_size}:
            # First what is chosen already: of two choices with the same state it is as good as the other.
            for candidate in (options, *candidates(self._unchosen(options), self.free)):
                candidate = dataclasses.replace(candidate, window_size=m)
                here = collections.Counter(_widened((s.name, s.shape, s.dtype)) for s in specs_with(candidate))
                if here <= there:
                    return candidate
        return None

    def misfit(self, entries: Iterable[Known], remedy: str = "") -> str:
        """Say of a checkpoint that does not fit which options to give."""
        given = {name: value for name, value in options_of(entries).items() if name in self.free}
        return (
            f"no choice of memory_budget={shown(self.size or 0)} has this state. If it is of these parameters, "
            f"{remedy}give the options of the run that saved it: {as_given(given) or 'window_size=..., window_format=...'} "
            "(and rank or density, unless it had the default)"
        )

    def _unchosen(self, options: Any) -> Any:
        """Give the options with the defaults of their class where they are free."""
        defaults = type(options)()
        return dataclasses.replace(options, **{name: getattr(defaults, name) for name in self.free})


def entries_of(state_dict: Mapping[Any, Any]) -> Iterator[Known]:
    """Give what a state dict has, by parameters (as torch's) or flat (`state.layer.weight.error`)."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            yield from entries_of(value)
        elif isinstance(value, Tensor):
            yield str(key).rpartition(".")[2], tuple(value.shape), value.dtype


def options_of(entries: Iterable[Known]) -> dict[str, Any]:
    """Give window size, formats and dtypes as far as the state shows them."""
    options: dict[str, Any] = {}
    shapes = {name: (shape, dtype) for name, shape, dtype in entries}
    if "gram" in shapes and shapes["gram"][0]:
        options["window_size"] = shapes["gram"][0][-1]
    numbers = [shapes[name][1] for name in ("window_rows", "window_q", "window_values", "window_entries") if name in shapes]
    if numbers:
        options |= _format("window", numbers[0], "low_bit")
    if "error" in shapes:
        dtype = shapes["error"][1]
        options |= _format("error", dtype, "int8" if dtype == torch.int8 else "int4")
    return options


def _format(kind: str, dtype: torch.dtype, otherwise: str) -> dict[str, Any]:
    """Give a plain format with its dtype, where that is a floating one."""
    plain = {f"{kind}_format": "plain", f"{kind}_dtype": dtype}
    return plain if dtype.is_floating_point else {f"{kind}_format": otherwise}


def as_given(options: Mapping[str, Any]) -> str:
    """Write options as one would type them."""
    return ", ".join(f"{name}={as_text(value)}" for name, value in options.items())


def saved_choice(saved: Mapping[str, Any] | str | Path, placement: Placement) -> tuple[list[Known], Mapping[str, Any] | None]:
    """Read the entries of a saved state, and its options where they are named.

    Args:
        saved: a folder of `torch.distributed.checkpoint.save`, a file of `torch.save`, or a state dict.
        placement: processes that have none (an empty dict, no such file) take it from the others.

    Raises:
        OptionError: nothing can be read on any process.
    """
    mine: tuple[list[Known] | None, Any] = None, None
    problem = "choose_as: no state was saved"
    try:
        mine = _read(saved)
    except OptionError as error:
        problem = str(error)
    entries, options = next((theirs for theirs in placement.gather(mine) if theirs[0]), (None, None))
    if entries is None:
        raise OptionError(problem)
    return entries, options


def _widened(entry: Known) -> Known:
    """Give an entry as it is saved under FSDP2."""
    name, shape, dtype = entry
    return name, shape, torch.int32 if dtype == torch.int16 else dtype


def _read(saved: Mapping[str, Any] | str | Path) -> tuple[list[Known], Mapping[str, Any] | None]:
    """Read the entries, and the options where they are named."""
    if not isinstance(saved, Mapping):
        path = Path(saved)
        if path.is_dir():
            from ..distributed import folder  # takes most of a second

            try:
                return folder.entries(path), None
            except folder.CheckpointError as error:
                raise OptionError(str(error)) from None
        try:
            saved = torch.load(str(path), map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # whatever unpickling a damaged file ends in
            raise OptionError(f"choose_as: {path} cannot be read: {error}") from None
        if not isinstance(saved, Mapping):
            raise OptionError(f"choose_as: {path} holds no state dict, but {type(saved).__name__}")
    named = saved.get("efcp")
    return list(entries_of(saved)), named.get("options") if isinstance(named, Mapping) else None
