"""Saving, loading, counting: `state[p]` are views of the stacks' buffers; checkpoints hold copies, loading copies in place.

Nothing is ever cast: torch's own `load_state_dict` would cast state to the parameter's dtype, which turns int16 indices and an
fp64 K into nonsense on a bf16 model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..core.gram import GramMatrix
from .options import OptionError
from .stacks import Stack

# What one parameter's entry says for the whole optimizer (the first parameter's, or with scope="layer" every one's own K).
GRAM, STEP = "gram", "step"
FORMAT = 1


class StateDictMixin:
    """State of a WindowedOptimizer in `torch.optim` terms."""

    def _adopt(self, stacks: list[Stack]) -> None:
        """Make `stacks` the optimizer's state, with what the current state knows of their parameters."""
        params = [p for s in stacks for p in s.params]
        device = params[0].device if params else torch.device("cpu")
        if device.type == "mps":  # has no fp64
            device = torch.device("cpu")
        layered = self.options.scope == "layer"
        gram = GramMatrix(len(params) if layered else 1, self.options.window_size, device)
        old = {p: dict(self.state[p]) for p in params if p in self.state}
        if not layered:
            shared = next((entry for entry in self.state.values() if GRAM in entry), None)
            if shared is not None and params:
                old.setdefault(params[0], {})
                for entry in old.values():
                    entry.pop(GRAM, None)
                    entry.pop(STEP, None)
                old[params[0]] |= {GRAM: shared[GRAM], STEP: shared[STEP]}
        self.state.clear()
        views = self._views(stacks, gram)
        for p, entry in views.items():
            for name, view in entry.items():
                if name in old.get(p, ()):
                    view.copy_(old[p][name])
            self.state[p] = entry
        self._stacks, self._gram = stacks, gram

    def _views(self, stacks: list[Stack], gram: GramMatrix) -> dict[Tensor, dict[str, Tensor]]:
        """parameter -> name -> view of its state."""
        views: dict[Tensor, dict[str, Tensor]] = {}
        for s in stacks:
            for i, p in enumerate(s.params):
                views[p] = {name: buffer[i] for name, buffer in s.buffers().items()}
        for i, p in enumerate(views):
            if i == 0 or self.options.scope == "layer":
                views[p][GRAM] = gram.matrix[i]
            if i == 0:
                views[p][STEP] = gram.step
        return views

    def memory_footprint(self) -> dict[str, int]:
        """Bytes of state by kind, measured on the tensors that are held (allocated now if no step was taken yet)."""
        self._prepare()
        kinds: dict[str, int] = {}
        for entry in self.state.values():
            for name, tensor in entry.items():
                kind = "window" if name.startswith("window_") else name
                kinds[kind] = kinds.get(kind, 0) + tensor.numel() * tensor.element_size()
        return kinds

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the optimizer's options under "efcp". Tensors are copies: a view would drag its whole stack along."""
        saved = super().state_dict()
        saved["state"] = {
            i: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for i, entry in saved["state"].items()
        }
        saved["efcp"] = {"format": FORMAT, "class": type(self).__name__, "options": dataclasses.asdict(self.options)}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; everything is checked before anything is changed.

        Raises:
            OptionError: the checkpoint is of another optimizer, of other options or of other parameters.
        """
        self._check_options(state_dict.get("efcp"))
        groups, saved = state_dict["param_groups"], state_dict["state"]
        sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if sizes[0] != sizes[1]:
            raise OptionError(f"checkpoint has parameter groups of {sizes[0]} tensors, this optimizer of {sizes[1]}")
        params = [p for g in self.param_groups for p in g["params"]]
        index = [i for g in groups for i in g["params"]]
        entries = {p: saved[i] for i, p in zip(index, params, strict=True) if i in saved}
        if not entries:  # a fresh optimizer's
            super().load_state_dict({"state": {}, "param_groups": groups})
            return
        self._prepare()
        for number, (p, entry) in enumerate(entries.items()):
            self._check_entry(number, self.state.get(p, {}), entry)
        missing = [n for n, p in enumerate(params) if p in self.state and p not in entries]
        if missing:
            raise OptionError(f"checkpoint has no state for the trainable parameters number {missing}")
        state = dict(self.state)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(state)
        for p, entry in entries.items():
            for name, view in self.state[p].items():
                view.copy_(entry[name])

    def _check_options(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            return
        if saved["class"] != type(self).__name__:
            raise OptionError(f"checkpoint is of {saved['class']}, this optimizer is {type(self).__name__}")
        fixed = ("window_size", "rank", "density", "block_size", "scope")
        for name in fixed:
            ours, theirs = getattr(self.options, name, None), saved["options"].get(name)
            if ours != theirs:
                raise OptionError(f"checkpoint was made with {name}={theirs!r}, this optimizer has {name}={ours!r}")

    @staticmethod
    def _check_entry(number: int, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        if ours.keys() != theirs.keys():
            raise OptionError(f"parameter {number}: checkpoint holds {sorted(theirs)}, this optimizer {sorted(ours)}")
        for name, tensor in ours.items():
            if theirs[name].shape != tensor.shape or theirs[name].dtype != tensor.dtype:
                raise OptionError(
                    f"parameter {number}: {name} is {tuple(theirs[name].shape)} {theirs[name].dtype} in the checkpoint, "
                    f"{tuple(tensor.shape)} {tensor.dtype} here"
                )
