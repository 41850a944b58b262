"""How the recipes begin and end: flags or a file of settings, and a few lines that say what the run reached and what it cost."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import HfArgumentParser

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def parse(kinds: Sequence[Any], description: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read flags, or one .json or .yaml file with the same names, into one dataclass of each kind.

    A mistake ends the program with one line and exit status 2, before anything is loaded.

    Args:
        kinds: dataclasses, as HfArgumentParser takes them.
        description: for `--help`.
        argv: the flags; None: the command line's.
    """
    from transformers import HfArgumentParser

    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [--flag value ...] | %(prog)s settings.json|yaml   (--help lists the flags)"
    parser: HfArgumentParser = HfArgumentParser(list(kinds), description=description, usage=usage)
    file = argv[0] if len(argv) == 1 and argv[0].endswith((".json", ".yaml")) else None
    try:
        parsed = parser.parse_dict(_settings(Path(file))) if file else parser.parse_args_into_dataclasses(argv)
    except (OSError, TypeError, ValueError) as error:  # the Trainer's and the optimizer's own checks raise these
        parser.error(f"{file}: {error}" if file else str(error))
    for part in parsed:
        if str(getattr(part, "resume_from_checkpoint", None)).lower() == "true":
            part.resume_from_checkpoint = True  # the Trainer takes the latest one
    return parsed


def _settings(file: Path) -> dict[str, Any]:
    """Read a file of settings; return name -> value."""
    if file.suffix == ".json":
        values = json.loads(file.read_text())
    else:
        import yaml

        try:
            values = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise ValueError("expected settings, name: value")
    # YAML takes 1e-4 for text: only 1.0e-4 is a number there.
    return {name: float(value) if _EXPONENT.fullmatch(str(value)) else value for name, value in values.items()}


def costs(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the number of trained parameters and the bytes of the optimizer's state, by the names of a Trainer's metrics."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if hasattr(inner, "memory_footprint"):
        total = sum(inner.memory_footprint().values())
    else:
        total = sum(t.nbytes for entry in inner.state.values() for t in entry.values() if isinstance(t, torch.Tensor))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"train_parameters": count, "train_optimizer_state_bytes": total}


def summary(title: str, results: Mapping[str, float], *names: str) -> str:
    """Write the results that have these names under a title, one a line, and what the run cost.

    Args:
        title: what was trained on what.
        results: as in all_results.json, with what `costs` gives; what is absent is left out.
        names: of metrics.
    """
    lines = [f"  {name.replace('_', ' '):<24} {results[name]:.4f}" for name in names if name in results]
    if "train_runtime" in results:
        minutes, seconds = divmod(round(results["train_runtime"]), 60)
        lines.append(f"  {'training time':<24} {minutes} min {seconds:02d} s")
    if results.get("train_parameters"):
        count, total = results["train_parameters"], results["train_optimizer_state_bytes"]
        lines.append(f"  {'optimizer state':<24} {total / 2**20:.1f} MiB, {total / count:.2f} bytes per parameter (AdamW: 8)")
    return "\n".join([title, *lines])
