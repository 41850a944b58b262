"""memory_budget in a run: when it chooses, when it takes what a saved run has chosen, and what exceeds it.

A state dict of ours names the options that it was made with. One that torch.distributed.checkpoint has gathered does not, but
its tensors tell: the window size is that of the Gram matrix, and the rest is the choice whose state has their shapes and dtypes.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp2 import MeshShards, is_sharded
from ..options import OptionError, as_text
from .budget import candidates, choose, described, shown

_log = logging.getLogger("hf_efcp")

# Name of a state entry, shape on one process, dtype.
Entry = tuple[str, tuple[int, ...], torch.dtype]


def entries_of(state_dict: Mapping) -> Iterator[Entry]:
    """What a state dict has, by parameters (as torch's) or flat (`state.layer.weight.error`)."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            yield from entries_of(value)
        elif isinstance(value, Tensor):
            yield str(key).rpartition(".")[2], tuple(value.shape), value.dtype


def options_of(entries: Iterable[Entry]) -> dict[str, Any]:
    """Window size, formats and dtypes as far as the state shows them."""
    found: dict[str, Any] = {}
    shapes = {name: (shape, dtype) for name, shape, dtype in entries}
    if "gram" in shapes and shapes["gram"][0]:
        found["window_size"] = shapes["gram"][0][-1]
    numbers = [shapes[name][1] for name in ("window_rows", "window_q", "window_values", "window_entries") if name in shapes]
    if numbers:
        found |= _format("window", numbers[0], "low_bit")
    if "error" in shapes:
        dtype = shapes["error"][1]
        found |= _format("error", dtype, "int8" if dtype == torch.int8 else "int4")
    return found


def _format(kind: str, dtype: torch.dtype, otherwise: str) -> dict[str, Any]:
    """A plain format with its dtype, where that is a floating one."""
    plain = {f"{kind}_format": "plain", f"{kind}_dtype": dtype}
    return plain if dtype.is_floating_point else {f"{kind}_format": otherwise}


def as_given(options: Mapping[str, Any]) -> str:
    """Options as one would type them."""
    return ", ".join(f"{name}={as_text(value)}" for name, value in options.items())


class ChoiceMixin:
    """The part of a WindowedOptimizer that keeps to memory_budget.

    Attributes:
        _free: names of the options that the budget chooses; none without a budget.
        _chosen: whether it has, or a checkpoint in its place.
    """

    _free: tuple[str, ...]
    _chosen: bool

    def choose_as(self, saved: Mapping[str, Any] | str | Path) -> None:
        """Let memory_budget choose what it chose in the run that was saved; to be called on every process, before loading.

        For torch.distributed.checkpoint, which loads into the sizes that `get_optimizer_state_dict` of a new optimizer has: they
        are its own choice, and on another number of processes that may be another one. `load_state_dict`, and Trainer and
        Accelerate, need no such call. A state of other sizes is dropped. Without a memory_budget nothing happens.

        Args:
            saved: a folder of `torch.distributed.checkpoint.save`, a file of `torch.save`, or a state dict; processes that have
                none (an empty dict, no such file) take it from the others where parameters are DTensors.

        Raises:
            OptionError: nothing can be read, or no choice gives the state that was saved.
        """
        if not self._free:
            return
        entries, options, problem = None, None, "choose_as: no state was saved"
        try:
            entries, options = _read(saved)
        except OptionError as error:
            problem = str(error)
        sharded = [p for group in self.param_groups for p in group["params"] if is_sharded(p)]
        everybody = MeshShards(sharded).gather((entries, options)) if sharded else [(entries, options)]
        entries, options = next((found for found in everybody if found[0]), (None, None))
        if entries is None:
            raise OptionError(problem)
        if options is not None:
            self._take_choice({name: options[name] for name in self._free if name in options})
        elif not self._take_choice_of(entries):
            raise OptionError(f"choose_as: {self._misfit(entries)}")

    def _take_choice_of(self, entries: Iterable[Entry]) -> bool:
        """Take the choice whose state has these entries; False: there is none."""
        there = collections.Counter(map(_widened, entries))
        sizes = sorted({shape[-1] for name, shape, _ in there if name == "gram" and shape})
        for m in sizes if "window_size" in self._free else set(sizes) & {self.options.window_size}:
            # First what is chosen already: of two choices with the same state it is as good as the other.
            for options in (self.options, *candidates(self._unchosen(), self._free)):
                options = dataclasses.replace(options, window_size=m)
                if self._entries_with(options) <= there:
                    self._take_choice({name: getattr(options, name) for name in self._free})
                    return True
        return False

    def _unchosen(self) -> Any:
        """The options with the defaults of their class where they are free."""
        defaults = self.options_type()
        return dataclasses.replace(self.options, **{name: getattr(defaults, name) for name in self._free})

    def _entries_with(self, options: Any) -> collections.Counter:
        before, self.options = self.options, options
        try:
            whole = self._whole_state()
        finally:
            self.options = before
        return collections.Counter(_widened((name, *what)) for state in whole.values() for name, what in state.items())

    def _take_choice(self, values: dict[str, Any]) -> None:
        """What was saved wins: a state of other sizes is dropped."""
        options = dataclasses.replace(self.options, **values)
        if options != self.options:
            self.options, self.state = options, collections.defaultdict(dict)
            self._forget()
        self._chosen = True

    def _misfit(self, entries: Iterable[Entry], remedy: str = "") -> str:
        """Of a checkpoint that does not fit, which options to give."""
        given = {name: value for name, value in options_of(entries).items() if name in self._free}
        return (
            f"no choice of memory_budget={shown(self.options.memory_budget)} has this state. If it is of these parameters, "
            f"{remedy}give the options of the run that saved it: {as_given(given) or 'window_size=..., window_format=...'} "
            "(and rank or density, unless it had the default)"
        )

    def _keep_to_budget(self) -> None:
        """Choose the options that `memory_budget` leaves open, once; afterwards see that it is kept."""
        budget = self.options.memory_budget
        if budget is None:
            return
        processes, follows = (1, False) if self._shards is None else (self._shards.size, self._shards.follows)
        if self._free and not self._chosen:
            self.options, size = self._choice(processes, follows)
            self._chosen = True
            if self._shards is None or self._shards.rank == 0:
                # A warning's level, because that is shown where nobody has set one.
                what = f"{type(self).__name__}: memory_budget={shown(budget)}: {described(self.options)}: {shown(size)} of state"
                more = " for each process" if self._shards is not None else ""
                if follows:
                    more += "; to load by torch.distributed.checkpoint what other processes saved, call choose_as(folder) first"
                _log.warning("%s%s", what, more)
            return
        size = self._bytes_with(self.options, processes, follows)
        if size <= budget:
            return
        new = any(self.state.values())
        if not self._free and not new:
            raise self._too_large(size)
        with_what = "with the new parameters" if new else f"with {described(self.options)}, as it was saved,"
        warnings.warn(f"memory_budget={shown(budget)}: {with_what} the state takes {shown(size)}", stacklevel=2)

    def _choice(self, processes: int, follows: bool) -> tuple[Any, int]:
        """What the budget chooses for so many processes, and the bytes of its state."""
        options = self.options
        try:
            return choose(options, self._choosable(follows), lambda o: self._bytes_with(o, processes, follows))
        finally:
            self.options = options

    def _choosable(self, follows: bool) -> tuple[str, ...]:
        """What is left to the budget: no codes for factors' errors, nor where FSDP2 cuts 1-D tensors inside a block."""
        cut = follows and any(p.ndim == 1 for params in self._trainable() for p in params)
        return tuple(n for n in self._free if not (n.endswith("_format") and (cut or self._by_factors)))

    def _too_large(self, size: int) -> OptionError:
        given = f"memory_budget={shown(self.options.memory_budget)}: with {described(self.options)}"
        return OptionError(f"{given} the state takes {shown(size)}")

    def _bytes_with(self, options: Any, processes: int, follows: bool) -> int:
        self.options = options
        return sum(self._footprint(processes, follows).values())


def _widened(entry: Entry) -> Entry:
    """As it is saved under FSDP2."""
    name, shape, dtype = entry
    return name, shape, torch.int32 if dtype == torch.int16 else dtype


def _read(saved: Mapping[str, Any] | str | Path) -> tuple[list[Entry], Mapping[str, Any] | None]:
    """The entries, and the options where they are named."""
    if not isinstance(saved, Mapping):
        path = Path(saved)
        if path.is_dir():
            from ..distributed import folder as checkpoint  # takes most of a second

            try:
                return checkpoint.entries(path), None
            except checkpoint.CheckpointError as error:
                raise OptionError(str(error)) from None
        try:
            saved = torch.load(str(path), map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # whatever unpickling a damaged file ends in
            raise OptionError(f"choose_as: {path} cannot be read: {error}") from None
        if not isinstance(saved, Mapping):
            raise OptionError(f"choose_as: {path} holds no state dict, but {type(saved).__name__}")
    named = saved.get("efcp")
    return list(entries_of(saved)), named.get("options") if isinstance(named, Mapping) else None
