"""The options that a user gives, and where the values of all other options come from.

An option that is not given is open. It has the default of the class, or the measured value (`preset`). A memory_budget may choose
it at the first step. A checkpoint that is loaded sets it: the run goes on with the options that it had.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist

from ..core.cells import Spec
from ..distributed.placement import Placement
from ..options import OptionError, as_text, build, decided
from .choices import BUDGETED, candidates, choose, described, free_options, shown
from .options import LOW_RANK
from .parameters import levels_to_caller
from .traces import Known, as_given, options_of, scopes_of, widened

_log = logging.getLogger("hf_efcp")

# Options that shape a state's tensors.
MADE_WITH: tuple[str, ...] = ("window_size", "rank", "max_rank_fraction", "density", "block_size", "scope")
MADE_WITH += ("residual", "metric", "window_dtype", "error_dtype", "window_format", "error_format")
# Options of where and how a run starts. They say nothing of the state, so a checkpoint does not set them.
OF_THE_START = ("preset", "shard", "memory_budget", "verify")
# DDP's hook is registered before a checkpoint is loaded. So this option is always this run's, whether it is given or not.
_ALWAYS_THIS_RUNS = ("comm",)

# Options -> the specs of all parameters' state.
SpecsWith = Callable[[Any], Iterable[Spec]]


def merged(options_type: type, measured: Mapping[str, Any], given: Mapping[str, Any], owner: str) -> Any:
    """Make all options: given values come before the preset's values, and these before the class defaults.

    Args:
        options_type: the dataclass of the options.
        measured: the values of preset="measured", where they differ from the class defaults. Values that a memory_budget chooses
            are left out.
        given: option name -> value, from Python or as text.
        owner: whose options they are, for messages.

    Raises:
        OptionError: unknown name, wrong type, value out of range, or a value that would have no effect.
    """
    if given.get("error_dtype") not in (None, "none") and "error_format" not in given:
        given = {**given, "error_format": "plain"}  # for a class with another default
    options = build(options_type, given, owner)
    if getattr(options, "preset", "paper") != "paper":
        left_out = decided(options_type, given) | set(BUDGETED if getattr(options, "memory_budget", None) is not None else ())
        # Where the given options allow no running mean of the residuals, residuals are fed back, which is the class default.
        if getattr(options, "comm", "gradients") == "factors" or ("metric" in given and options.metric == "none"):
            left_out |= {"residual"}
        if "rank" in given:
            left_out |= {"max_rank_fraction"}
        # Entries in bf16 lose something of vectors too, and FSDP2 cannot cut a vector's error that is stored as codes.
        if getattr(options, "error_format", "plain") != "plain":
            left_out |= {"window_dtype"}
        options = build(options_type, {**{n: v for n, v in measured.items() if n not in left_out}, **given}, owner)
    if getattr(options, "residual", "feedback") == "momentum" and options.rms_mode == "adam" and options.metric == "none":
        raise OptionError("residual='momentum' with rms_mode='adam' needs a metric, got metric='none'")
    if "rms_mode" in given and options.rms_mode == "adam" and options.update_rms is None:
        raise OptionError(
            "rms_mode='adam' with update_rms=None: the raw update is not rescaled; give update_rms too, 1.0 for Adam's size"
        )
    return options


class Asked:
    """Which options are given, which are open, and whether the open ones have been chosen.

    Args:
        name: of the optimizer's class.
        options: all options of the optimizer.
        given: the options that the user gave.

    Attributes:
        given: the names of the options that the user gave.
        size: memory_budget in bytes; None: there is no budget.
        open: names of the options that a checkpoint sets.
        budgeted: names of the open options that a budget chooses; empty without a budget.
        chosen: whether the budget, or a checkpoint in its place, has chosen.
    """

    def __init__(self, name: str, options: Any, given: Mapping[str, Any]):
        self.name = name
        self.given = frozenset(given)
        self.size: int | None = getattr(options, "memory_budget", None)
        closed = decided(type(options), given) | {*OF_THE_START, *_ALWAYS_THIS_RUNS}
        self.open = tuple(f.name for f in dataclasses.fields(options) if f.name not in closed)
        self.budgeted = free_options(options, given) if self.size is not None else ()
        self.chosen = False

    # A budget -------------------------------------------------------------------------------------------------------------

    def keep(
        self, options: Any, bytes_with: Callable[[Any], int], placement: Placement, fixed: Iterable[str], new_parameters: bool
    ) -> Any:
        """Choose the options that are left to the budget, once; afterwards check that the state keeps the budget.

        Args:
            options: of the optimizer.
            bytes_with: options -> bytes of state.
            placement: of the process.
            fixed: names of options that the budget must not choose here.
            new_parameters: whether parameters joined a running optimizer.

        Returns:
            The options.

        Raises:
            OptionError: the state is too large.
        """
        if self.size is None:
            return options
        if self.budgeted and not self.chosen:
            options, size = self.choice(options, bytes_with, fixed)
            self.chosen = True
            if placement.rank == 0:
                # At the level of warnings: it is shown where nobody has set a level.
                message = f"{self.name}: memory_budget={shown(self.size)}: {described(options)}: {shown(size)} of state"
                more = "" if placement.size == 1 and not placement.follows else " for each process"
                if placement.follows:
                    more += "; to load by torch.distributed.checkpoint what other processes saved, call choose_as(folder) first"
                _log.warning("%s%s", message, more)
            return options
        size = bytes_with(options)
        if size > self.size:
            if not self.budgeted and not new_parameters:
                raise self.too_large(size, options)
            reason = "with the new parameters" if new_parameters else f"with {described(options)}, as it was saved,"
            message = f"memory_budget={shown(self.size)}: {reason} the state takes {shown(size)}"
            warnings.warn(message, stacklevel=levels_to_caller())
        return options

    def choice(self, options: Any, bytes_with: Callable[[Any], int], fixed: Iterable[str] = ()) -> tuple[Any, int]:
        """Give the options that the budget chooses, and the bytes of their state; raise OptionError where nothing fits."""
        return choose(options, tuple(n for n in self.budgeted if n not in set(fixed)), bytes_with)

    def too_large(self, size: int, options: Any) -> OptionError:
        """Make the error for a state that exceeds the budget."""
        return OptionError(f"memory_budget={shown(self.size or 0)}: with {described(options)} the state takes {shown(size)}")

    # A checkpoint ---------------------------------------------------------------------------------------------------------

    def taken(self, options: Any, saved: Mapping[str, Any]) -> tuple[Any, str]:
        """Take the open options from a checkpoint.

        Args:
            options: of the optimizer.
            saved: the options in the checkpoint. An option that did not exist when the checkpoint was written gets the class
                default, which does what that version did.

        Returns:
            The options, and a line on the options that differ. The line is empty where none differs.

        Raises:
            OptionError: an option that shapes the state is given and differs, or the checkpoint's options are damaged.
        """
        fields = [f.name for f in dataclasses.fields(options)]
        try:
            there = build(type(options), {name: value for name, value in saved.items() if name in fields}, self.name)
        except OptionError as error:
            raise OptionError(f"checkpoint is damaged: its options: {error}") from None
        differing = [n for n in fields if getattr(options, n) != getattr(there, n) and n not in OF_THE_START]
        for name in differing:
            if name in MADE_WITH and name not in self.open:
                raise _made_otherwise(name, getattr(there, name), getattr(options, name))
        result = dataclasses.replace(options, **{name: getattr(there, name) for name in self.open})
        return result, _compared(self.name, result, there, [n for n in differing if n in self.open], differing)

    def matching(self, entries: Iterable[Known], options: Any, specs_with: SpecsWith) -> Any | None:
        """Give options under which the state has these entries; None: there are no such options.

        Args:
            entries: of a state that does not name its options.
            options: of the optimizer.
            specs_with: options -> the specs that the tensors must have.
        """
        entries = list(entries)
        there = collections.Counter(map(widened, entries))
        told = {name: value for name, value in options_of(entries).items() if name in self.open}
        window = "gram" in {name for name, _, _ in entries}
        if self.budgeted and not window:
            return None
        for likely in self._likely(options, told, entries):
            here = collections.Counter(widened((s.name, s.shape, s.dtype)) for s in specs_with(likely) if window or not s.window)
            if here <= there:
                return likely
        return None

    def refuse(self, entries: Iterable[Known], options: Any) -> None:
        """Raise OptionError for a state that no options fit: with a budget always, else if a given window size differs."""
        entries = list(entries)
        if self.budgeted:
            raise OptionError(f"choose_as: {self.misfit(entries)}")
        there, here = options_of(entries).get("window_size"), getattr(options, "window_size", None)
        if there is not None and here is not None and there != here and "window_size" not in self.open:
            raise _made_otherwise("window_size", there, here)

    def misfit(self, entries: Iterable[Known], remedy: str = "") -> str:
        """Say which options to give for a checkpoint that does not fit."""
        given = {name: value for name, value in options_of(entries).items() if name in self.budgeted}
        return (
            f"no choice of memory_budget={shown(self.size or 0)} has this state. If it is of these parameters, "
            f"{remedy}give the options of the run that saved it: {as_given(given) or 'window_size=..., window_format=...'} "
            "(and density, unless it had the default)"
        )

    def _likely(self, options: Any, told: dict[str, Any], entries: list[Known]) -> Iterator[Any]:
        """Give options that a state may have been made with, the most likely first."""
        changes: list[dict[str, Any]] = [{}, told]
        dtypes = [name for name in told if name.endswith("_dtype")]
        # None stands for a dtype. Most runs have None, so it is tried before the dtype itself.
        changes[1:1] = [told | dict.fromkeys(cleared) for cleared in (dtypes, dtypes[:1], dtypes[1:]) if cleared]
        starts = [_replaced(options, change) for change in changes]
        if self.budgeted:  # the present choice first: another choice with the same state would be no better
            starts[1:1] = candidates(self._unchosen(options), self.budgeted)
        if "max_rank_fraction" in self.open:  # tensors do not tell it: try 1, as in earlier versions, and the preset's
            fractions = (1.0, LOW_RANK["max_rank_fraction"])
            starts += [start and _replaced(start, {"max_rank_fraction": x}) for x in fractions for start in starts]
        metric = {"metric": told["metric"]} if "metric" in told else {}
        sizes = sorted({shape[-1] for name, shape, _ in entries if name == "gram" and shape})
        if "window_size" not in self.open or not sizes:
            sizes = [getattr(options, "window_size", 0)]
        for m in sizes:
            for scope in scopes_of(entries, options) if "scope" in self.open else [getattr(options, "scope", "")]:
                for start in starts:
                    likely = start and _replaced(start, {"window_size": m, "scope": scope, **metric})
                    if likely is not None:
                        yield likely

    def _unchosen(self, options: Any) -> Any:
        """Give the options, with the class defaults for those that the budget chooses."""
        defaults = type(options)()
        return dataclasses.replace(options, **{name: getattr(defaults, name) for name in self.budgeted})


def say(line: str) -> None:
    """Log a line on the first process; an empty one nowhere."""
    if line and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        _log.warning("%s", line)  # a warning's level, because that is shown where nobody has set one


def _replaced(options: Any, values: Mapping[str, Any]) -> Any | None:
    """Give the options with other values, of those that exist; None where they exclude each other."""
    try:
        return dataclasses.replace(options, **{name: value for name, value in values.items() if hasattr(options, name)})
    except OptionError:
        return None


def _made_otherwise(name: str, there: Any, here: Any) -> OptionError:
    return OptionError(f"checkpoint was made with {name}={there!r}, this optimizer has {name}={here!r}")


def _compared(owner: str, options: Any, there: Any, taken: Iterable[str], differing: Iterable[str]) -> str:
    """Say which options are taken from the checkpoint, and which stay this run's although they differ from the checkpoint's."""
    parts = []
    if values := as_given({name: getattr(options, name) for name in taken}):
        parts.append(f"from the checkpoint: {values}")
    other = [n for n in differing if n not in taken]
    if kept := ", ".join(f"{n}={as_text(getattr(options, n))} (not {as_text(getattr(there, n))})" for n in other):
        parts.append(f"this run's and not the checkpoint's: {kept}")
    return f"{owner}: options {'; '.join(parts)}" if parts else ""
