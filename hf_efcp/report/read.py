"""What the output folder of a run says: its record (efcp_run.json), or what Trainer writes itself (trainer_state.json)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import OptionError

RECORD, STATE, VERSION = "efcp_run.json", "trainer_state.json", 1
PREFIX = "efcp_"
# Names in a log that are no metrics.
_NO_METRIC = {"step", "epoch", "total_flos", "grad_norm", "learning_rate"}


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: a number by step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.values[-1]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as it was recorded.

    Attributes:
        title: the folder's name, told apart from the other runs'.
        folder: where it is.
        curves: name -> series: loss, grad_norm, learning_rate and metrics.
        diagnostics: name without prefix -> series.
        times: (steps, seconds), from the start; `exact`: they were recorded, and not divided evenly over the steps.
        optimizer, model, arguments, environment: as in the record; empty where there is none.
        summary: figures of the whole run, by Trainer.
        share: of the seconds, in how many the process computed; None: on a GPU, or not recorded.
    """

    title: str
    folder: Path
    curves: dict[str, Series]
    diagnostics: dict[str, Series]
    times: tuple[tuple[int, float], ...]
    exact: bool
    optimizer: dict[str, Any]
    model: dict[str, Any]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, float]
    share: float | None = None

    def seconds(self, steps: Sequence[int]) -> list[float] | None:
        """Give the seconds at which these steps were done, between two records evenly; None: they are not known."""
        if len(self.times) < 1:
            return None
        known = [(0, 0.0), *self.times]
        found = []
        for step in steps:
            after = next((i for i, (at, _) in enumerate(known) if at >= step), len(known) - 1)
            (a, s), (b, t) = known[max(0, after - 1)], known[after]
            found.append(t if b <= a else s + (t - s) * min(1.0, (step - a) / (b - a)))
        return found

    @property
    def name(self) -> str:
        """The optimizer's name, as far as it is known."""
        return self.optimizer.get("name", "")


def read(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs in some folders.

    Raises:
        OptionError: a folder that is not there or has no run, or a file that is damaged.
    """
    if not folders:
        raise OptionError("no folder: name the output_dir of a run")
    titles = _titles([Path(folder) for folder in folders])
    return [_run(Path(folder), title) for folder, title in zip(folders, titles, strict=True)]


def _titles(folders: Sequence[Path]) -> list[str]:
    """Give each folder the shortest end of its path that tells it apart."""
    parts = [[part for part in folder.resolve().parts if part != folder.anchor] or ["/"] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise OptionError(f"{folders[0]}: the same folder is given twice")


def _run(folder: Path, title: str) -> Run:
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such folder; the output_dir of a run is wanted")
    record, state = folder / RECORD, _state_file(folder)
    if record.is_file():
        content = _json(record)
        if content.get("version") != VERSION:
            raise OptionError(f"{record}: version {content.get('version')!r}, and this hf_efcp reads version {VERSION}")
        if state is not None:  # it may have evaluations that came after the record
            later = _json(state).get("log_history")
            logs = content.get("log_history")
            if isinstance(later, list) and isinstance(logs, list) and len(later) > len(logs) and later[: len(logs)] == logs:
                content["log_history"] = later
        return _made(folder, title, content, record)
    if state is None:
        raise OptionError(
            f"{folder}: neither {RECORD} nor {STATE} is there or in a checkpoint-N below: is it the output_dir of a run?"
        )
    return _made(folder, title, _json(state), state)


def _state_file(folder: Path) -> Path | None:
    """Find Trainer's own file, in the folder or in its newest checkpoint."""
    if (own := folder / STATE).is_file():
        return own
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    files = [path / STATE for _, path in sorted(numbered, reverse=True) if (path / STATE).is_file()]
    return files[0] if files else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise OptionError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise OptionError(f"{file}: is no JSON, or was cut short: {error}") from None
    if not isinstance(content, dict):
        raise OptionError(f"{file}: a JSON object was expected, found {type(content).__name__}")
    return content


def _made(folder: Path, title: str, content: dict[str, Any], file: Path) -> Run:
    logs = content.get("log_history")
    if not isinstance(logs, list) or not all(isinstance(log, dict) for log in logs):
        raise OptionError(f"{file}: log_history is missing, or no list of logs")
    curves: dict[str, dict[int, float]] = {}
    summary: dict[str, float] = {}
    for log in logs:
        step = log.get("step")
        for name, value in log.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(step, int):
                continue
            if "train_runtime" in log or name.endswith(("runtime", "per_second", "preparation_time")):
                summary[name] = float(value)
            elif name not in ("step", "total_flos"):
                curves.setdefault(name, {})[step] = float(value)
    series = {name: Series(tuple(points), tuple(points.values())) for name, points in curves.items()}
    if "loss" not in series and not any(name.endswith("_loss") for name in series):
        raise OptionError(f"{file}: no loss was logged; set logging_steps below the number of steps")
    times, exact = content.get("times"), True
    if not times:
        exact, last = False, max((s.steps[-1] for s in series.values()), default=0)
        times = [(last, summary["train_runtime"])] if last and "train_runtime" in summary else []
    parts = {name: content.get(name) or {} for name in ("optimizer", "model", "arguments", "environment")}
    _check(parts, times, content.get("processor_share"), file)
    return Run(
        title,
        folder,
        {name: s for name, s in series.items() if not name.startswith(PREFIX)},
        {name.removeprefix(PREFIX): s for name, s in series.items() if name.startswith(PREFIX)},
        tuple((int(step), float(seconds)) for step, seconds in times),
        exact,
        parts["optimizer"],
        parts["model"],
        parts["arguments"],
        parts["environment"],
        summary,
        content.get("processor_share"),
    )


def _check(parts: dict[str, Any], times: Any, share: Any, file: Path) -> None:
    """Raise OptionError where a part of a record has not the shape in which it is written."""
    wrong = [name for name, part in parts.items() if not isinstance(part, dict)]
    if not wrong:
        named = [parts["optimizer"].get(name, {}) for name in ("options", "memory", "adamw")]
        sizes = [*(n for part in named[1:] if isinstance(part, dict) for n in part.values())]
        sizes += [parts["model"].get(name, 0) for name in ("parameters", "trained")]
        bad = not all(isinstance(part, dict) for part in named) or not all(type(n) is int for n in sizes)
        wrong = ["options or memory of the optimizer, or size of the model"] if bad else []
    if not isinstance(share, int | float | None):
        wrong.append("processor_share")
    if not isinstance(times, list) or not all(isinstance(t, list | tuple) and len(t) == 2 and _numbers(t) for t in times):
        wrong.append("times")
    if wrong:
        raise OptionError(f"{file}: {', '.join(wrong)}: not as hf_efcp writes it; is the file damaged?")


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(x, int | float) for x in values)


def metrics(runs: Sequence[Run]) -> list[str]:
    """Name the curves of metrics that the runs have, losses first."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name not in _NO_METRIC)
    return sorted(names, key=lambda name: (not name.endswith("loss"), name != "loss", name))
