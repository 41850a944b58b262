"""Tells from saved tensors the options that they were made with, if the state does not name its options.

A state dict of ours names its options. A state that torch.distributed.checkpoint has gathered does not, but its tensors tell some
options: the Gram matrix tells the window size, the warm starts tell the rank, and the tensors' dtypes tell dtypes and formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.placement import Placement
from ..options import OptionError, as_text

# Name of a state entry, shape on one process, dtype.
Known = tuple[str, tuple[int, ...], torch.dtype]


def entries_of(state_dict: Mapping[Any, Any]) -> Iterator[Known]:
    """Give the entries of a state dict, by parameters (as torch's) or flat (`state.layer.weight.error`)."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            yield from entries_of(value)
        elif isinstance(value, Tensor):
            yield str(key).rpartition(".")[2], tuple(value.shape), value.dtype


def options_of(entries: Iterable[Known]) -> dict[str, Any]:
    """Give window size, rank, metric, residual, formats and dtypes, as far as the state shows them."""
    options: dict[str, Any] = {}
    entries = list(entries)
    shapes = {name: (shape, dtype) for name, shape, dtype in entries}
    if "gram" in shapes and shapes["gram"][0]:
        options["window_size"] = shapes["gram"][0][-1]
    elif "window_values" in shapes:
        options["window_size"] = shapes["window_values"][0][-2]
    if ranks := [shape[-1] for name, shape, _ in entries if name == "warm_start"]:
        options["rank"] = max(ranks)  # small tensors clamp the rank
    kinds = {"metric_rows": "factored", "metric_values": "diagonal", "metric_mean": "tensor"}  # vectors: diagonal
    options["residual"] = "momentum" if "residual" in shapes else "feedback"
    options["metric"] = next((kind for name, kind in kinds.items() if name in shapes), "none")
    numbers = [shapes[name][1] for name in ("window_rows", "window_q", "window_values", "window_entries") if name in shapes]
    if numbers:
        options |= _format("window", numbers[0], "low_bit")
    if left_out := {"error", "residual"} & shapes.keys():
        name = left_out.pop()
        dtype, (_, scale) = shapes[name][1], shapes.get(f"{name}_scale", ((), None))
        four_bits = "minmax4" if scale == torch.bfloat16 else "int4"
        options |= _format("error", dtype, "int8" if dtype == torch.int8 else four_bits)
    return options


def scopes_of(entries: Iterable[Known], options: Any) -> list[str]:
    """Give the scopes that a state may have, the likelier first. Several Gram matrices may be tensors', or several states'."""
    grams = sum(name == "gram" for name, _, _ in entries)
    likely = "layer" if grams > 1 else getattr(options, "scope", "model")
    return sorted(("model", "layer"), key=lambda scope: scope != likely)


def _format(kind: str, dtype: torch.dtype, otherwise: str) -> dict[str, Any]:
    """Give the options of a plain format, if the dtype is a floating one; else the format `otherwise`."""
    plain = {f"{kind}_format": "plain", f"{kind}_dtype": dtype}
    return plain if dtype.is_floating_point else {f"{kind}_format": otherwise}


def as_given(options: Mapping[str, Any]) -> str:
    """Write options as one would type them."""
    return ", ".join(f"{name}={as_text(value)}" for name, value in options.items())


def saved_choice(saved: Mapping[str, Any] | str | Path, placement: Placement) -> tuple[list[Known], Mapping[str, Any] | None]:
    """Read the entries of a saved state, and its options where they are named.

    Args:
        saved: a folder of `torch.distributed.checkpoint.save`, a file of `torch.save`, or a state dict.
        placement: of this process. A process that has no state (an empty dict, no such file) takes it from the others.

    Raises:
        OptionError: nothing can be read on any process.
    """
    mine: tuple[list[Known] | None, Any] = None, None
    problem = "choose_as: no state was saved"
    try:
        mine = _read(saved)
    except OptionError as error:
        problem = str(error)
    entries, options = next((theirs for theirs in placement.gather(mine) if theirs[0] or theirs[1]), (None, None))
    if entries is None:
        raise OptionError(problem)
    return entries, options


def widened(entry: Known) -> Known:
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
