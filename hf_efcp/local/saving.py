"""The files of local updates in a checkpoint: `local_updates/common.pt`, and each worker's optimizer in `worker_J.pt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..options import OptionError

FOLDER = "local_updates"
_COMMON = "common.pt"


def save_worker(folder: Path, position: int, optimizer: torch.optim.Optimizer, common: dict[str, Any]) -> None:
    """Write worker `position`'s state; the first one writes what all have in common.

    A folder that is written to again keeps nothing of the workers that are gone.
    """
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if position == 0:
        torch.save(common, folder / _COMMON)
        for file in folder.glob("worker_*.pt"):
            if int(file.stem.partition("_")[2]) >= common["workers"]:
                file.unlink()
    torch.save(optimizer.state_dict(), _file(folder, position))


@torch.no_grad()
def load_worker(
    folder: Path, position: int, workers: int, optimizer: torch.optim.Optimizer, averaged: Sequence[str]
) -> dict[str, Any]:
    """Load the state of a worker; give what all have in common.

    Args:
        folder: of the checkpoint.
        position: of this worker.
        workers: how many there are now.
        optimizer: gets the state.
        averaged: entries whose mean every worker gets, where there are more or fewer workers than there were.

    Raises:
        OptionError: a file is not there.
    """
    folder = folder / FOLDER
    common = _read(folder / _COMMON)
    before = common["workers"]
    optimizer.load_state_dict(_read(_file(folder, position % before)))
    if workers != before and averaged:
        states = [_read(_file(folder, j))["state"] for j in range(before)]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for number, p in enumerate(params):
            for name in averaged:
                if name in (entry := optimizer.state.get(p, {})):
                    have = [state[number][name] for state in states if name in state.get(number, {})]
                    terms = [t.to(entry[name].device, torch.float64) for t in have]
                    entry[name].copy_(torch.stack(terms).mean(0))
    return common


def _file(folder: Path, position: int) -> Path:
    return folder / f"worker_{position}.pt"


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OptionError(f"{file} is missing: the checkpoint is not one of local updates, or a part of it is lost") from None
