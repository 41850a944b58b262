"""Saving, loading, counting: `state[p]` are views of the stacks' buffers; checkpoints hold copies, loading copies in place.

Nothing is ever cast: torch's own `load_state_dict` would cast state to the parameter's dtype, which turns int16 indices and an
fp64 K into nonsense on a bf16 model.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.gram import GramMatrix
from ..options import GroupOptions, OptionError, build
from .budget import BUDGETED
from .choice import entries_of
from .sharding import SHARED, of_window
from .stacks import Stack

FORMAT = 1
# Options that a checkpoint has to agree in.
MADE_WITH = ("window_size", "rank", "density", "block_size", "scope")
MADE_WITH += ("window_dtype", "error_dtype", "window_format", "error_format")
# Where torch.distributed.checkpoint has mixed the state that it loads with the one that was there.
_BEFORE = "call choose_as with what was saved before torch.distributed.checkpoint loads it, or "


class StateDictMixin:
    """State of a WindowedOptimizer in `torch.optim` terms."""

    def _adopt(self, stacks: list[Stack], params: list[Tensor]) -> None:
        """Make `stacks` the optimizer's state, with what the current state knows of the parameters, numbered as in `params`."""
        device = params[0].device if params else torch.device("cpu")
        gram = GramMatrix(len(params) if self.options.scope == "layer" else 1, self.options.window_size, device)
        old = {p: dict(self.state[p]) for p in params if p in self.state}
        shared = next((entry for entry in old.values() if "step" in entry), None)
        if shared is not None:
            names = SHARED if self.options.scope == "model" else SHARED[1:]
            shared = {name: shared[name] for name in names}
            old = {p: {k: v for k, v in entry.items() if k not in shared} for p, entry in old.items()}
            old[params[0]] = old.get(params[0], {}) | shared
        views = self._views([*stacks, *self._factor_stacks], gram, params)
        for p, entry in old.items():
            kept = {name: value for name, value in entry.items() if name in views[p]}
            if len(kept) < len(entry) or any(value.shape != views[p][name].shape for name, value in kept.items()):
                raise OptionError(
                    f"a parameter is now {tuple(p.shape)} {p.dtype}, and its state of {sorted(entry)} does not fit it any more: "
                    "make a new optimizer"
                )
            for name, value in kept.items():
                views[p][name].copy_(value)
        self.state.clear()
        self.state.update(views)
        first = self._gram is None
        self._stacks, self._gram = stacks, gram
        if first:
            self._listen_anew()
        if self.options.scope == "layer":  # the last coefficients are numbered by tensor
            self._last = None

    def _views(self, stacks: list[Stack], gram: GramMatrix, params: list[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """parameter -> name -> view of its state; of what other processes hold, K only."""
        views: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params}
        for s in stacks:
            for i, p in enumerate(s.params):
                views[p] |= {name: b[i] for name, b in s.buffers().items()}
        for i, (p, k) in enumerate(zip(params, gram.matrix.expand(len(params), -1, -1), strict=True)):
            if i == 0 or self.options.scope == "layer":
                views[p]["gram"] = k
            if i == 0:
                views[p] |= {"step": gram.step, "skipped": gram.skipped}
        return views

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: tensors are copied out of the stacks, which are built again from them."""
        state = super().__getstate__()
        copies = {p: {name: t.clone() for name, t in entry.items()} for p, entry in self.state.items()}
        owners = None if self._shards is None or self._shards.follows else (self._shards.size, self._owners)
        found = {"options": self.options, "_free": self._free, "_chosen": self._chosen, "owners": owners}
        return {**state, "state": collections.defaultdict(dict, copies), **found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        owners = state.pop("owners", None)
        super().__setstate__(state)
        self._process_group = self._comm = None  # belong to the process
        self._forget()
        if owners is not None:
            self._copied_from, self._owners = owners

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the optimizer's options under "efcp"; without the window if `save_window` is off.

        Tensors are copies: a view would drag its whole stack along. Where parameters are DTensors (FSDP2), so is the state that
        goes with their rows. Where it is sharded otherwise there are none, see `save_shards`: processes do not meet here, since
        Trainer calls this on the first one only.
        """
        saved = super().state_dict()
        saved["efcp"] = {"format": FORMAT, "class": type(self).__name__, "options": dataclasses.asdict(self.options)}
        if self._together is not None:
            saved["state"] = {}
            saved["efcp"]["sharded"] = self._stub()
            return saved
        saved["state"] = {
            i: {name: value.clone() for name, value in entry.items() if self.options.save_window or not of_window(name)}
            for i, entry in saved["state"].items()
        }
        params = self._all_params()
        saved["state"] = {i: self._global_entry(params[i], entry) for i, entry in saved["state"].items()}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; everything is checked before anything is changed.

        Raises:
            OptionError: not a checkpoint, or one of another optimizer, of other options or of other parameters.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        _check_container(state_dict)
        before = {**vars(self), "state": copy.copy(self.state)}
        try:
            self._load(state_dict)
        except OptionError:
            if (self.options, self._chosen) != (before["options"], before["_chosen"]):
                vars(self).update(before)
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        named = state_dict.get("efcp")
        self._take_saved_choice(named, state_dict["state"])
        self._check_options(named, state_dict["state"])
        groups, saved = state_dict["param_groups"], state_dict["state"]
        sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if sizes[0] != sizes[1]:
            raise OptionError(f"checkpoint has parameter groups of {sizes[0]} tensors, this optimizer of {sizes[1]}")
        for number, group in enumerate(groups):
            _check_keys(group, ("lr", "weight_decay"), f"its parameter group {number}")
        checked = [build(GroupOptions, {k: g[k] for k in ("lr", "weight_decay")}, "a group of the checkpoint") for g in groups]
        params = [p for g in self.param_groups for p in g["params"]]
        index = [i for g in groups for i in g["params"]]
        entries = {p: saved[i] for i, p in zip(index, params, strict=True) if i in saved}
        stub = (named or {}).get("sharded")
        if named is not None:
            with_window = named["options"].get("save_window", True)
        else:  # torch.distributed.checkpoint keeps state and groups only
            with_window = any("step" in entry for entry in entries.values() if isinstance(entry, Mapping))
        if stub is not None:
            self._load_shards(stub, with_window)
        elif entries:
            self._load_entries(params, entries, with_window, named is not None)
            self.shard_folder = None
        else:  # a fresh optimizer's
            self.state.clear()
            self._forget()
        self._last = None
        if self._gram is not None:
            self._listen_anew()
        for ours, theirs, values in zip(self.param_groups, groups, checked, strict=True):
            kept = {k: ours[k] for k in ("params", "param_names") if k in ours}
            ours |= {**copy.deepcopy({k: v for k, v in theirs.items() if k not in kept}), **dataclasses.asdict(values)}

    def _take_saved_choice(self, saved: dict[str, Any] | None, state: dict) -> None:
        """What memory_budget chose in the run that was saved, it chooses in this one."""
        if not self._free:
            return
        if isinstance(saved, Mapping) and (state or "sharded" in saved):
            theirs = saved.get("options", {})
            self._take_choice({name: theirs[name] for name in self._free if name in theirs})
        elif saved is None:
            self._take_choice_of(entries_of(state))

    def _load_entries(
        self, params: list[Tensor], entries: dict[Tensor, dict[str, Tensor]], with_window: bool, named: bool
    ) -> None:
        # A parameter that was frozen after it had been trained has state too.
        frozen = [p for p in entries if p not in self.state and not p.requires_grad]
        self.state.update({p: {} for p in frozen})
        try:
            self._prepare()
            whole = self._whole_entries()
            for number, p in enumerate(params):
                ours = {k: v for k, v in whole.get(p, {}).items() if with_window or not of_window(k)}
                _check_entry(number, ours, entries.get(p, {}))
            entries = {p: self._own_part(p, entry) for p, entry in entries.items()}
        except OptionError as error:
            for p in frozen:
                del self.state[p]
            if named or not self._free:
                raise
            raise OptionError(f"{error}: {self._misfit(entries_of(dict(enumerate(entries.values()))), _BEFORE)}") from None
        for p, entry in entries.items():
            for name, view in self.state[p].items():
                if name in entry:
                    view.copy_(entry[name])
        if not with_window:
            self._start_without_window()

    def _whole_entries(self) -> dict[Tensor, dict[str, Tensor]]:
        """State as one process has it, which all compare with a checkpoint: of what others hold, tensors without memory."""
        if self._shards is None and self._comm is None:
            return self.state
        whole = {
            p: {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in state.items()}
            for p, state in self._whole_state().items()
        }
        return {p: state | {k: v for k, v in self.state[p].items() if k in SHARED} for p, state in whole.items()}

    def _start_without_window(self) -> None:
        for entry in self.state.values():
            for name in filter(of_window, entry):
                entry[name].zero_()
        warnings.warn(
            f"{type(self).__name__}: the checkpoint was saved without its window (save_window=False): error feedback is "
            "restored, the window starts empty",
            stacklevel=5,
        )

    def _check_options(self, saved: dict[str, Any] | None, state: dict[int, dict[str, Tensor]]) -> None:
        if saved is None:  # another optimizer's, or through torch.distributed.checkpoint, which keeps state and groups only
            names = {name for entry in state.values() if isinstance(entry, Mapping) for name in entry}
            if names and not names & {"gram", "error", "skipped"}:
                raise OptionError(
                    f"checkpoint is of another optimizer, with the state {', '.join(sorted(names))}; "
                    f"this is {type(self).__name__}"
                )
            return
        _check_keys(saved, ("format", "class", "options"), "its efcp section")
        if saved["format"] > FORMAT:
            raise OptionError(f"checkpoint has format {saved['format']}, this version of hf_efcp reads up to {FORMAT}: upgrade")
        if saved["class"] != type(self).__name__:
            raise OptionError(f"checkpoint is of {saved['class']}, this optimizer is {type(self).__name__}")
        without_state = not state and "sharded" not in saved  # nothing was chosen yet
        for name in MADE_WITH:
            if without_state and self.options.memory_budget is not None and name in BUDGETED:
                continue
            missing = "plain" if name.endswith("_format") else None
            ours, theirs = getattr(self.options, name, missing), saved["options"].get(name, missing)
            if ours != theirs:
                raise OptionError(f"checkpoint was made with {name}={theirs!r}, this optimizer has {name}={ours!r}")


def _check_container(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise OptionError(f"not the checkpoint of an optimizer: expected a dict, got {type(state_dict).__name__}")
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise OptionError(f"not the checkpoint of an optimizer: {' and '.join(missing)} missing; it has {list(state_dict)}")
    for number, group in enumerate(state_dict["param_groups"]):
        _check_keys(group, ("params",), f"its parameter group {number}")


def _check_keys(part: Mapping, keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if key not in part]
    if missing:
        raise OptionError(f"checkpoint is damaged: {what} lacks {', '.join(missing)}")


def _check_entry(number: int, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if not isinstance(theirs, Mapping):
        raise OptionError(f"parameter {number}: the checkpoint has {type(theirs).__name__} in place of its state")
    if ours.keys() != theirs.keys():
        missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        raise OptionError(
            f"parameter {number}: the checkpoint's state does not fit this optimizer's parameters and options"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unexpected: {', '.join(extra)}" if extra else "")
        )
    for name, tensor in ours.items():
        if not isinstance(theirs[name], Tensor):
            raise OptionError(
                f"parameter {number}: {name} is of type {type(theirs[name]).__name__} in the checkpoint, not a tensor"
            )
        widened = (tensor.dtype, theirs[name].dtype) == (torch.int16, torch.int32)  # as it is saved under FSDP2
        if theirs[name].shape != tensor.shape or not (widened or theirs[name].dtype == tensor.dtype):
            raise OptionError(
                f"parameter {number}: {name} is {tuple(theirs[name].shape)} {theirs[name].dtype} in the checkpoint, "
                f"{tuple(tensor.shape)} {tensor.dtype} here"
            )
