"""Checkpoints: makes the state that one process would have from the parts that processes hold, and the parts from the state.

Nothing is cast. torch's own `load_state_dict` would cast state to the parameter's dtype, and so destroy int16 indices and the
fp64 K of a bf16 model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..distributed.placement import Specs
from ..options import OptionError
from .entries import State as OptimizerState
from .entries import foreign, keep_only
from .matching import take_order_out
from .reading import Found, Reading, checksums_of
from .setup import Setup
from .validate import agreed, check_entries, check_keys

if TYPE_CHECKING:
    from ..distributed.folder import Expected, Index, Part
    from .builder import Builder
    from .method import Group

FORMAT = 1
# Name of the folder of the shards in a checkpoint of Trainer or Accelerate.
SHARD_FOLDER = "efcp_optim"

# The state of a parameter, by name.
State = Mapping[str, Any]


class Saving:
    """The state of a setup, to save it and to load it.

    Args:
        setup: the parameters, their specs and who holds what.
        state: parameter -> name -> what this process holds.
    """

    def __init__(self, setup: Setup, state: Mapping[Tensor, State]):
        self.setup, self.placement = setup, setup.placement
        self.state = state

    @classmethod
    def of(cls, builder: Builder, state: Mapping[Tensor, State]) -> Saving | None:
        """Give the state of an optimizer; None: nothing is built of it yet."""
        return None if builder.setup is None else cls(builder.setup, state)

    def outer(self, p: Any, with_window: bool) -> Any:
        """Copy the state of p for `state_dict`, without the window if `with_window` is false. If p is a DTensor, so is its state.

        Values that are not ours are given as they are.
        """
        specs = self.setup.specs.get(p, {})
        entry = copies(self.state[p], specs, with_window)
        if not specs:
            return entry
        return {name: self.placement.outer(t, specs[name], p) if name in specs else t for name, t in entry.items()}

    def stub(self, optimizer_id: int, params: Sequence[Tensor]) -> dict[str, Any]:
        """Give the stub that `state_dict` has in place of a state that is saved in a folder.

        Args:
            optimizer_id: a number that tells the optimizers of a process apart.
            params: of all groups.

        Returns:
            `processes`: how many there are; `origin`: the process, optimizer and step of the state; `trained`: positions of the
            parameters with state; `errors`: with comm="factors", the number of processes whose errors the folder has.
        """
        trained = [i for i, p in enumerate(params) if p in self.setup.specs]
        origin = f"{os.getpid()}/{optimizer_id}/{int(self.setup.counters.step)}"
        stub: dict[str, Any] = {"processes": self.placement.size, "origin": origin, "trained": trained}
        return {**stub, "errors": self.placement.size} if self._has_own_errors else stub

    def save_folder(self, folder: Path, with_window: bool) -> None:
        """Write this process's part. Call it on every process."""
        from ..distributed import folder as folders  # takes most of a second

        folders.save(self._folder_parts(with_window), folder, self.placement.group)

    def load_folder(self, index: Index, with_window: bool, errors: int, labels: Mapping[Tensor, str]) -> None:
        """Read this process's part of a folder into the state, which has to be fresh. The folder has to fit the state.

        Args:
            index: of the folder; any number of processes wrote it.
            with_window: whether the folder has the window.
            errors: the number of processes whose errors the folder has (comm="factors"); 0: it has one error for all.
            labels: names of the parameters, for messages.

        Raises:
            OptionError: on every process, where a file is damaged or a number is not allowed.
        """
        from ..distributed import folder as folders

        parts = self._folder_parts(with_window)
        means = self._errors_of_others(errors, parts)
        numbers = {p: number for number, p in enumerate(self.setup.params)}

        def source_of(p: Tensor) -> Callable[[str], Found | None]:
            def source(name: str) -> Found | None:
                key = f"{numbers[p]}.{name}"
                if key not in parts and key not in means:
                    return None
                t = folders.read(index, key, parts[key]) if key in parts else folders.read_mean(index, key, means[key])
                return t, t, None

            return source

        try:
            problem = Reading(self.setup, self.state, labels).fill(source_of)
        except folders.CheckpointError as error:
            problem = str(error)
        agreed(self.placement, problem)

    def load(self, entries: Mapping[Tensor, State], sums: Mapping[Tensor, Any], labels: Mapping[Tensor, str]) -> None:
        """Copy this process's part of a checkpoint's entries into the state, which has to be fresh. The entries have to fit.

        Args:
            entries: of the checkpoint.
            sums: the entries' checksums by name, where the checkpoint has checksums.
            labels: names of the parameters, for messages.

        Raises:
            OptionError: on every process, where a checksum differs or a number is not allowed.
        """
        setup, rank = self.setup, self.placement.rank

        def source_of(p: Tensor) -> Callable[[str], Found | None]:
            entry, known, specs, rows = entries.get(p, {}), sums.get(p, {}), setup.specs[p], setup.owners[p].get(rank)

            def source(name: str) -> Found | None:
                t = entry.get(name)
                return None if t is None else (t, self.placement.inner(t, specs[name], p, rows), known.get(name))

            return source

        agreed(self.placement, Reading(setup, self.state, labels).fill(source_of))

    def start_without_window(self) -> None:
        """Empty the window after a load without a window, and the residuals' running means, which count the window's steps."""
        for p, specs in self.setup.specs.items():
            for name, spec in specs.items():
                if (spec.window or spec.kind == "residual") and name in self.state[p]:
                    self.state[p][name].zero_()

    @property
    def _has_own_errors(self) -> bool:
        """Whether each process has errors of its own."""
        return bool(self.setup.factors) or any(s.held == "each" for specs in self.setup.specs.values() for s in specs.values())

    def _folder_parts(self, with_window: bool) -> dict[str, Part]:
        """Give the parts that this process holds, by their names in a folder."""
        from ..distributed.folder import Part

        parts = {}
        for number, p in enumerate(self.setup.params):
            rows = self.setup.owners[p].get(self.placement.rank)
            for name, spec in self.setup.specs[p].items():
                t = self.state[p].get(name)
                if t is None or (spec.window and not with_window):
                    continue
                key, dim = f"{number}.{name}", spec.divided(p)
                if spec.held == "each":  # the processes' entries side by side
                    parts[key] = Part(t[None], (self.placement.size, *t.shape), 0, self.placement.rank)
                elif dim is None or rows is None:
                    parts[key] = Part(t, tuple(t.shape))
                elif t.numel():
                    parts[key] = Part(t, spec.shape, dim, rows.start // spec.per)
        return parts

    def _errors_of_others(self, errors: int, parts: dict[str, Part]) -> dict[str, Part]:
        """Adapt `parts` to a folder that has the errors of another number of processes.

        Returns:
            The parts that get the mean of the folder's errors: only the mean matters to the run.
        """
        from ..distributed.folder import Part

        means: dict[str, Part] = {}
        if errors == (self.placement.size if self._has_own_errors else 0):
            return means
        for number, p in enumerate(self.setup.params):
            key, specs = f"{number}.error", self.setup.specs[p]
            if key in parts and "warm_start" in specs:
                part = parts.pop(key)
                if specs["error"].held == "each":
                    error = self.state[p]["error"]
                    part = Part(error, tuple(error.shape))
                (means if errors else parts)[key] = part
        return means


def check(
    params: Sequence[tuple[str, Tensor]], specs: Mapping[Tensor, Specs], entries: Mapping[Tensor, State], with_window: bool
) -> None:
    """Raise OptionError if a checkpoint's entries do not belong to these parameters and options.

    Args:
        params: pairs of a label, for messages, and a parameter.
        specs: of the parameters' state.
        entries: of the checkpoint.
        with_window: whether the checkpoint has the window.
    """
    for label, p in params:
        known = specs.get(p, {}).values()
        check_entries(label, {s.name: s for s in known if with_window or not s.window}, entries.get(p, {}))


def expected(specs: Mapping[Tensor, Specs], with_window: bool, errors: int) -> Expected:
    """Give the shape and dtype of each entry of a folder with the errors of `errors` processes; 0: with one error for all."""
    found = {}
    for number, entries in enumerate(specs.values()):
        for name, spec in entries.items():
            if with_window or not spec.window:
                several = errors and name == "error" and "warm_start" in entries
                shape = (errors, *spec.shape) if several else spec.shape
                found[f"{number}.{name}"] = shape, spec.dtype
    return found


def complete(saved: dict[str, Any], builder: Builder, groups: Sequence[Group], state: OptimizerState, number: int) -> None:
    """Complete torch's state dict: copies in place of the entries, and the section with class and options.

    Args:
        saved: as torch gives it, changed in place.
        builder: of the optimizer.
        groups: its parameter groups.
        state: its state.
        number: tells the optimizers of a process apart.
    """
    saved["efcp"] = section(builder.name, builder.options) | {"numbered": take_order_out(saved["param_groups"])}
    with_window, saving = getattr(builder.options, "save_window", True), Saving.of(builder, state)
    if saving is not None and (newcomers := _newcomers(builder, groups, state)):
        saved["efcp"]["newcomers"] = newcomers
    keys = dict(zip(saved["state"], state, strict=True))
    if saving is None:
        specs = builder.specs(groups, state, builder.options)
        saved["state"] = {i: copies(state[key], specs.get(key, {}), with_window) for i, key in keys.items()}
    elif saving.placement.apart:
        kept = dict(state)
        keep_only(foreign, kept, builder.ours)
        saved["state"] = {i: kept[key] for i, key in keys.items() if key in kept}
        saved["efcp"]["sharded"] = saving.stub(number, [p for g in groups for p in g["params"]])
    else:
        saved["state"] = {i: saving.outer(key, with_window) for i, key in keys.items()}
        if not saving.placement.follows and not saving.setup.released:
            numbers = {key: i for i, key in keys.items() if isinstance(key, Tensor)}
            saved["efcp"]["checksums"] = checksums_of(saving.setup, numbers, with_window)
    # A value that is not ours but has a name of our kinds would be taken for ours: such names are listed.
    strangers = {
        i: [name for name in foreign(state[key], builder.ours(key)) if name in builder.kinds]
        for i, key in keys.items()
        if isinstance(key, Tensor)
    }
    if any(strangers.values()):
        saved["efcp"]["not_ours"] = {i: names for i, names in strangers.items() if names}


def _newcomers(builder: Builder, groups: Sequence[Group], state: OptimizerState) -> list[int]:
    """Give the positions of the parameters that were added or unfrozen after the last step: the next step makes their state."""
    assert builder.setup is not None
    new = {p for _, params in builder.trained(groups, state) for p in params} - builder.setup.specs.keys()
    return [i for i, p in enumerate(p for g in groups for p in g["params"]) if p in new]


def copies(entry: Any, specs: Specs, with_window: bool) -> Any:
    """Copy an entry's tensors, because a view would keep its whole stack. The window's are copied only with `with_window`."""
    if not isinstance(entry, Mapping):  # not ours
        return entry
    kept = {name: t for name, t in entry.items() if name not in specs or with_window or not specs[name].window}
    return {name: t.clone() if name in specs else t for name, t in kept.items()}


def section(name: str, options: Any) -> dict[str, Any]:
    """Give the section `efcp` of a state dict, which says whose state it is: class and options."""
    return {"format": FORMAT, "class": name, "options": dataclasses.asdict(options)}


def check_origin(saved: Any, state: Mapping[Any, Any], name: str, expected: set[str]) -> None:
    """Raise OptionError where a checkpoint is of another optimizer.

    Args:
        saved: the checkpoint's section with class and options. None: the checkpoint is another optimizer's, or
            torch.distributed.checkpoint wrote it, which keeps state and groups only.
        state: of the checkpoint.
        name: of this optimizer's class.
        expected: names of entries; a state of this package has at least one of them.
    """
    if saved is None:
        names = {str(key) for entry in state.values() if isinstance(entry, Mapping) for key in entry}
        if names and not names & expected:
            raise OptionError(f"checkpoint is of another optimizer, with the state {', '.join(sorted(names))}; this is {name}")
        return
    check_keys(saved, ("format", "class", "options"), "its efcp section")
    if saved["format"] > FORMAT:
        raise OptionError(f"checkpoint has format {saved['format']}, this version of hf_efcp reads up to {FORMAT}: upgrade")
    if saved["class"] != name:
        raise OptionError(f"checkpoint is of {saved['class']}, this optimizer is {name}")
