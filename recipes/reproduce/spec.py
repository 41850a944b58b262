"""A spec (which tasks, contenders, learning rates and seeds), and the runs that it wants, given the results so far.

title: Quality                # of the page
device: cpu                   # cpu or cuda; a page has runs on one kind of device only
tasks:                        # a name of tasks/, or a name of your own with other settings
  llama:
  llama_long: {task: llama, steps: 3000}
rates: [1/3, 1, 3, 10]        # times the task's usual learning rate
widen: 2                      # so often a third or three times the last rate is added where the best is on the edge
seeds: [0]                    # of the grid: they choose the rate, by validation loss
final_seeds: [1, 2, 3, 4, 5]  # at the chosen rate, and at the usual one
contenders:
  adamw: {optimizer: torch.optim.AdamW, options: {betas: [0.9, 0.999]}}
  adamw_95: {optimizer: torch.optim.AdamW, options: {betas: [0.9, 0.95]}, variant_of: adamw}  # chosen along with the rate
  ours: {optimizer: efcp_lowrank_mfac, tasks: [llama]}                                        # not on every task
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from .contenders import Contender
from .tasks import get_task
from .tasks.base import Task

DEVICES = ("cpu", "cuda")
WIDER = 3  # factor between the last rate of the grid and one that is added
_KEYS = {"title", "device", "tasks", "rates", "widen", "seeds", "final_seeds", "contenders", "compare", "plot"}
_CONTENDER_KEYS = {"optimizer", "options", "matrix_options", "rest", "variant_of", "tasks"}


class SpecError(ValueError):
    """A mistake in a spec; the message names the place."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: the task's name in the spec.
        task: with the spec's settings.
        contender: the optimizer.
        multiple: learning rate over the task's usual one.
        seed: of the weights, the batches and dropout.
        stage: "grid" or "final".
    """

    label: str
    task: Task
    contender: Contender
    multiple: Fraction
    seed: int
    stage: str

    @property
    def rate(self) -> float:
        """The highest learning rate of the run."""
        return float(f"{self.task.rate * self.multiple:.6g}")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, but for the code."""
        settings = {"task": self.task.name, **self.task.settings()}
        return {**settings, **self.contender.identity(), "learning_rate": self.rate, "seed": self.seed}

    def key(self) -> str:
        """Digest of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.label} {self.contender.name} lr {self.rate:g} seed {self.seed}"


Results = Mapping[str, Mapping[str, Any]]  # by key


@dataclasses.dataclass(frozen=True)
class Spec:
    """See the module's docstring. `families`: name -> its contender and the variants, of which the best takes part."""

    name: str
    tasks: dict[str, Task]
    rates: tuple[Fraction, ...]
    widen: int
    seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    families: dict[str, list[Contender]]
    limited_to: dict[str, set[str]]  # family -> tasks; absent: all
    compare: list[list[str]]
    plot: list[str]
    title: str
    device: str

    def families_of(self, label: str) -> list[str]:
        """The families that take part in a task."""
        return [name for name in self.families if label in self.limited_to.get(name, self.tasks)]

    def grid(self, label: str, contender: Contender, results: Results) -> list[Run]:
        """The runs that choose the learning rate, wider ones included as far as they are known to be needed."""
        multiples = sorted(self.rates)

        def runs() -> list[Run]:
            return [Run(label, self.tasks[label], contender, x, seed, "grid") for x in multiples for seed in self.seeds]

        for _ in range(self.widen if len(multiples) > 1 else 0):
            if any(run.key() not in results for run in runs()):
                break
            best = min(multiples, key=lambda x: self.validation_loss(label, contender, x, results))
            if best == multiples[-1]:
                multiples.append(best * WIDER)
            elif best == multiples[0]:
                multiples.insert(0, best / WIDER)
        return runs()

    def validation_loss(self, label: str, contender: Contender, multiple: Fraction, results: Results) -> float:
        """Mean over the grid's seeds; infinite where one diverged."""
        runs = [Run(label, self.tasks[label], contender, multiple, seed, "grid") for seed in self.seeds]
        return sum(loss(results[run.key()], "validation") for run in runs) / len(runs)

    def chosen(self, label: str, family: str, results: Results) -> tuple[Contender, Fraction] | None:
        """Contender of the family, and multiple of the usual rate, with the least validation loss; None: grid not finished."""
        runs = [run for contender in self.families[family] for run in self.grid(label, contender, results)]
        if not runs or any(run.key() not in results for run in runs):
            return None
        candidates = list(dict.fromkeys((run.contender.name, run.multiple) for run in runs))
        by_name = {contender.name: contender for contender in self.families[family]}
        name, multiple = min(candidates, key=lambda c: self.validation_loss(label, by_name[c[0]], c[1], results))
        return by_name[name], multiple

    def final(self, label: str, family: str, results: Results) -> tuple[list[Run], list[Run]]:
        """Runs of the table: (at the chosen rate, at the usual rate with the family's first contender).

        Without final seeds they are the grid's own, which chose the rate: enough to explore.
        """
        task, usual = self.tasks[label], self.families[family][0]
        choice, seeds = self.chosen(label, family, results), self.final_seeds or self.seeds
        best = [] if choice is None else [Run(label, task, *choice, seed, "final") for seed in seeds]
        return best, [Run(label, task, usual, Fraction(1), seed, "final") for seed in seeds]

    def wanted(self, results: Results) -> list[Run]:
        """All runs that are known to be needed, each once: the grids of all tasks, then the table's."""
        pairs = [(label, family) for label in self.tasks for family in self.families_of(label)]
        runs = [run for label, family in pairs for c in self.families[family] for run in self.grid(label, c, results)]
        for label, family in pairs if self.final_seeds else ():
            if self.chosen(label, family, results) is not None:
                best, usual = self.final(label, family, results)
                runs += best + usual
        return list({run.key(): run for run in reversed(runs)}.values())[::-1]


def check_device(spec: Spec, results: Results) -> None:
    """Raise SpecError for results of another kind of device than the spec's: a run is not told apart by it."""
    other = sum(("gpu" in result) != (spec.device == "cuda") for result in results.values())
    if other:
        raise SpecError(
            f"{spec.name}: device: {spec.device}, but {other} of {len(results)} results are of another kind of device"
        )


def loss(result: Mapping[str, Any], split: str) -> float:
    """Mean loss on a split; infinite after a divergence."""
    return math.inf if result[split] is None else result[split]["loss"]


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        SpecError: unknown keys, tasks or contenders, or values of the wrong kind.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {error}") from None
    _check_keys(given, _KEYS, str(path))
    try:
        tasks = {}
        for label, settings in given["tasks"].items():
            settings = dict(settings or {})
            tasks[label] = get_task(settings.pop("task", label), **settings)
        rates = tuple(Fraction(str(rate)) for rate in given["rates"])
        families, limits = _families(given["contenders"], tasks, str(path))
        seeds = tuple(map(int, given["seeds"])), tuple(map(int, given.get("final_seeds", ())))
        named = given.get("compare", []), given.get("plot", [])
        title, device = given.get("title", "Quality"), given.get("device", "cpu")
        if device not in DEVICES:
            raise SpecError(f"{path}: device: {device!r} is none of {', '.join(DEVICES)}")
        unknown = {name for names in [*named[0], named[1]] for name in names} - set(families)
        if unknown:
            raise SpecError(f"{path}: compare, plot: no contender {', '.join(sorted(unknown))}, or it is a variant")
        return Spec(path.stem, tasks, rates, int(given.get("widen", 0)), *seeds, families, limits, *named, title, device)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, SpecError) else SpecError(f"{path}: {error!r}") from None


def _families(given: Mapping[str, dict], tasks: Iterable[str], place: str) -> tuple[dict, dict]:
    families: dict[str, list[Contender]] = {}
    limits: dict[str, set[str]] = {}
    for name, entry in given.items():
        _check_keys(entry, _CONTENDER_KEYS, f"{place}: contender {name}")
        fields = {k: v for k, v in entry.items() if k not in ("variant_of", "tasks")}
        family = entry.get("variant_of", name)
        if family != name and family not in families:
            raise SpecError(f"{place}: contender {name}: variant_of {family!r} does not come before it")
        families.setdefault(family, []).append(Contender(name, **fields))
        if "tasks" in entry:
            limits[family] = set(entry["tasks"])
            if limits[family] - set(tasks):
                raise SpecError(f"{place}: contender {name}: no task {', '.join(sorted(limits[family] - set(tasks)))} here")
    return families, limits


def _check_keys(given: Any, valid: set[str], place: str) -> None:
    if not isinstance(given, Mapping):
        raise SpecError(f"{place}: expected names and values, not {given!r}")
    if set(given) - valid:
        raise SpecError(f"{place}: unknown {', '.join(sorted(set(given) - valid))}; valid: {', '.join(sorted(valid))}")


# Results ------------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by key from all .jsonl files of a folder; of two with the same key the later one. A torn line is left out."""
    results = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            results[result["key"]] = result
    return results


def write_result(folder: Path, label: str, result: Mapping[str, Any]) -> None:
    """Append a result to the task's file as one line, in one write: processes do not mix theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label}.jsonl"
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a process that was killed
    line = "\n" * torn + json.dumps(result, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
