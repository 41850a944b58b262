"""Tables and plots of a spec from its results, written to docs/benchmarks/; what has not run yet is shown as "not run".

python recipes/reproduce/report.py recipes/reproduce/specs/quality.yaml
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.plots import Curve, draw
from reproduce.spec import Run, Spec, SpecError, check_device, loss, read_results, read_spec
from reproduce.words import contenders, introduction, one_rate, times, wrapped

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = "not run"
# Between these lines a page has the short table.
BEGIN, END = "<!-- written by report.py -->", "<!-- end of what report.py writes -->"
Results = Mapping[str, Mapping[str, Any]]


class Paired(NamedTuple):
    """Mean over seeds of one contender's loss minus another's, and its standard error (nan below two seeds)."""

    mean: float
    error: float
    seeds: int

    @property
    def in_errors(self) -> float:
        """The mean in units of its standard error."""
        return self.mean / self.error if self.error else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean: nan below two values or where one is infinite."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 and math.isfinite(mean) else math.nan


class Cell:
    """The runs of a family on a task, at the chosen learning rate or at the usual one, as far as there are results.

    Attributes:
        runs: one for each final seed; empty: the grid is not finished.
        done: seed -> result.
        losses: seed -> test loss, infinite after a divergence.
    """

    def __init__(self, runs: list[Run], results: Results) -> None:
        self.runs = runs
        self.done = {run.seed: results[run.key()] for run in runs if run.key() in results}
        self.losses = {seed: loss(result, "test") for seed, result in self.done.items()}

    def against(self, other: "Cell") -> Paired | None:
        """The paired difference over the seeds that both have finished; None: there is none, or a run diverged."""
        seeds = self.losses.keys() & other.losses.keys()
        differences = [self.losses[seed] - other.losses[seed] for seed in seeds]
        if not differences or not all(map(math.isfinite, differences)):
            return None
        return Paired(*mean_and_error(differences), len(differences))

    def mean(self, name: str) -> float:
        """Mean over the results of a number that they have."""
        return statistics.fmean(result[name] for result in self.done.values())

    def text(self) -> str:
        """Mean test loss and its standard error."""
        if not self.done:
            return NOT_RUN
        diverged = sum(math.isinf(x) for x in self.losses.values())
        if diverged:
            return f"{diverged} of {len(self.losses)} diverged"
        mean, error = mean_and_error(list(self.losses.values()))
        part = "" if len(self.done) == len(self.runs) else f" ({len(self.done)} of {len(self.runs)} seeds)"
        return f"{mean:.4f} ± {error:.4f}{part}" if math.isfinite(error) else f"{mean:.4f}{part}"

    def quality(self) -> str:
        """Perplexity or accuracy, where the task has one."""
        if not self.done or any(map(math.isinf, self.losses.values())):
            return ""
        if self.runs[0].task.perplexity:
            return f"{math.exp(statistics.fmean(self.losses.values())):.2f}"
        tests = [result["test"] for result in self.done.values()]
        return f"{100 * statistics.fmean(test['accuracy'] for test in tests):.2f}%" if "accuracy" in tests[0] else ""


def paired_text(cell: Cell, other: Cell) -> str:
    """The paired difference and its size in standard errors; bold where the other contender's loss is lower."""
    difference = cell.against(other)
    if difference is None:
        lost = any(map(math.isinf, cell.losses.values())) and bool(other.done)
        return "**diverged**" if lost else NOT_RUN if not (cell.done and other.done) else ""
    text = f"{difference.mean:+.4f}"
    text += f" ({difference.in_errors:+.1f} s.e.)" if math.isfinite(difference.in_errors) else ""
    return f"**{text}**" if difference.mean > 0 else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def replace_between(path: Path, lines: Sequence[str]) -> None:
    """Write the lines between BEGIN and END of a page.

    Raises:
        ValueError: the page does not have both.
    """
    before, begin, rest = path.read_text().partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no line {BEGIN} and, after it, a line {END}")
    path.write_text(before + begin + "\n".join(["", *lines, ""]) + end + after)


class Report:
    """The page of a spec.

    Args:
        spec: what should have run.
        results: what has run.
        spec_path: as it is typed in commands.
    """

    def __init__(self, spec: Spec, results: Results, spec_path: str) -> None:
        self.spec, self.results, self.spec_path = spec, results, spec_path
        self.reference = next(iter(spec.families))
        self.chosen: dict[tuple[str, str], Cell] = {}
        self.usual: dict[tuple[str, str], Cell] = {}
        for label in spec.tasks:
            for family in spec.families_of(label):
                best, usual = spec.final(label, family, results)
                self.chosen[label, family], self.usual[label, family] = Cell(best, results), Cell(usual, results)

    def command(self, label: str, family: str) -> str:
        """What makes the runs of a row."""
        return f"`python recipes/reproduce/run.py {self.spec_path} --tasks {label} --contenders {family}`"

    def lines(self, image: str) -> list[str]:
        """The whole page; `image` is the name of a task's plot with {} for the task."""
        page = [f"# {self.spec.title}", "", *introduction(self.spec, self.results, self.reference, self.spec_path)]
        tables = [("At the best rate of the grid", self.chosen), ("At AdamW's usual rate", self.usual)]
        for title, cells in tables[1:] if one_rate(self.spec) else tables:
            page += [f"## {title}", "", *self._overview(cells)]
        for first, second in self.spec.compare:
            page += [f"## {first} against {second}", "", *self._comparison(first, second)]
        page += ["## Task by task", ""]
        for label, task in self.spec.tasks.items():
            page += [f"### {label}: {task.title}", "", *self._task(label)]
            if any(self._curves(label)):
                page += [f"![training loss of {label}]({image.format(label)})", ""]
        return [*page, "## Contenders", "", *contenders(self.spec), "## What it ran on", "", *self._machine()]

    def summary(self) -> list[str]:
        """The short table: the first comparison of the spec, a row for each task that has results of both.

        Of a spec that compares nothing: all contenders on its first task, at the best rate of the grid.
        """
        if not self.spec.compare:
            return self._all_on(next(iter(self.spec.tasks)))
        ours, reference = self.spec.compare[0]
        header = ["task", f"`{reference}`", f"`{ours}`", "difference", "difference at the usual rate", "bytes per parameter"]
        rows, missing = [], []
        for label, task in self.spec.tasks.items():
            if (label, ours) not in self.chosen or (label, reference) not in self.chosen:
                continue
            best, other = self.chosen[label, ours], self.chosen[label, reference]
            if not best.done or not other.done:
                missing.append(task.title)
                continue
            usual = paired_text(self.usual[label, ours], self.usual[label, reference])
            texts = [other.text(), best.text(), paired_text(best, other), usual]
            rows.append([task.title, *texts, self._cost(best, task.steps)[0]])
        left = wrapped(f"Not run yet: {'; '.join(missing)}.") if missing else []
        return [*table(header, rows), *left]

    def _all_on(self, label: str) -> list[str]:
        task, rows = self.spec.tasks[label], []
        for family in self.spec.families_of(label):
            cell = self.chosen[label, family]
            if not cell.done or any(map(math.isinf, cell.losses.values())):
                rows.append([f"`{family}`", "", NOT_RUN if not cell.done else "diverged", "", ""])
                continue
            cost = f"{cell.mean('train_seconds'):.0f}", f"{cell.mean('bytes_per_parameter'):.2f}"
            rows.append([f"`{family}`", f"{cell.runs[0].rate:g}", cell.quality() or cell.text(), *cost])
        number = "perplexity" if task.perplexity else "accuracy"
        return table(["optimizer", "learning rate", number, "seconds", "bytes per parameter"], rows)

    def _overview(self, cells: Mapping[tuple[str, str], Cell]) -> list[str]:
        rows = []
        for family in self.spec.families:
            row = [f"`{family}`"]
            for label in self.spec.tasks:
                cell = cells.get((label, family))
                text = "" if cell is None else re.sub(r" ± \S+", "", cell.text())
                if cell is not None and cell.done and family != self.reference:
                    text += "<br>" + paired_text(cell, cells[label, self.reference])
                row.append(text)
            rows.append(row)
        return table(["mean test loss", *self.spec.tasks], rows)

    def _comparison(self, first: str, second: str) -> list[str]:
        rows = []
        for label in self.spec.tasks:
            if (label, first) in self.chosen and (label, second) in self.chosen:
                texts = [paired_text(cells[label, first], cells[label, second]) for cells in (self.chosen, self.usual)]
                rows.append([label, *texts])
        return [
            f"Test loss of `{first}` minus that of `{second}`, paired by seed; bold where `{second}` is better.",
            "",
            *table(["task", "both at their best rate", "both at the usual rate"], rows),
        ]

    def _task(self, label: str) -> list[str]:
        task = self.spec.tasks[label]
        number = "perplexity" if task.perplexity else "accuracy"
        header = ["contender", "learning rate", "test loss", number, f"minus {self.reference}", "bytes per parameter"]
        header += ["ms per step, the optimizer's part", "command"]
        rows = []
        for family in self.spec.families_of(label):
            for name, cells in (("best", self.chosen), ("usual", self.usual)):
                cell, reference = cells[label, family], cells[label, self.reference]
                rate = f"{cell.runs[0].rate:g} ({name})" if cell.runs else f"({name})"
                variant = cell.runs[0].contender.name if cell.runs else family
                row = [f"`{variant}`", rate, cell.text(), cell.quality()]
                row.append("" if family == self.reference else paired_text(cell, reference))
                row += [*self._cost(cell, task.steps), self.command(label, family)]
                rows.append(row)
        settings = f"{task.steps} steps of {task.batch_size}; usual rate {task.rate:g}."
        return [
            settings,
            "",
            *table(header, rows),
            "Validation loss on the grid, the least of each contender in italics:",
            "",
            *self._grid(label),
        ]

    @staticmethod
    def _cost(cell: Cell, steps: int) -> list[str]:
        if not cell.done or any(map(math.isinf, cell.losses.values())):
            return ["", ""]
        times = [1000 * cell.mean(name) / steps for name in ("train_seconds", "optimizer_seconds")]
        return [f"{cell.mean('bytes_per_parameter'):.2f}", f"{times[0]:.0f}, {times[1]:.1f}"]

    def _grid(self, label: str) -> list[str]:
        spec, grids = self.spec, {}
        for family in spec.families_of(label):
            for contender in spec.families[family]:
                runs = spec.grid(label, contender, self.results)
                finished = [run for run in runs if run.key() in self.results]
                multiples = dict.fromkeys(run.multiple for run in runs)
                complete = [x for x in multiples if [r.multiple for r in finished].count(x) == len(spec.seeds)]
                grids[contender.name] = {x: spec.validation_loss(label, contender, x, self.results) for x in complete}
        columns = sorted({*spec.rates, *(x for grid in grids.values() for x in grid)})
        rows = []
        for name, grid in grids.items():
            best = min(grid, key=grid.__getitem__, default=None)
            shown = {x: "diverged" if math.isinf(grid[x]) else f"{grid[x]:.4f}" for x in grid}
            rows.append([f"`{name}`", *(f"_{shown[x]}_" if x == best else shown.get(x, "") for x in columns)])
        return table(["contender", *(f"{float(x):.3g} x" for x in columns)], rows)

    def _curves(self, label: str) -> list[Curve]:
        curves = []
        for family in self.spec.plot:
            done = [] if (label, family) not in self.chosen else list(self.chosen[label, family].done.values())
            done = [result for result in done if result["diverged_at"] is None]
            if done:
                means = [list(map(statistics.fmean, zip(*(r[k] for r in done), strict=True))) for k in ("losses", "seconds")]
                curves.append(Curve(family, done[0]["steps"], *means))
        return curves

    def _machine(self) -> list[str]:
        names = ("cpu", "gpu", "threads", "python", "torch", "transformers", "hf_efcp", "commit")
        values = {name: sorted({str(r[name]) for r in self.results.values() if name in r}) for name in names}
        if not self.results:
            return [NOT_RUN, ""]
        return [*wrapped(times(self.spec)), "", *(f"- {name}: {', '.join(values[name])}" for name in names if values[name]), ""]

    def draw(self, folder: Path, image: str) -> None:
        """Write the plots of the tasks that have something to draw."""
        for label, task in self.spec.tasks.items():
            curves = self._curves(label)
            if curves:
                clock = "seconds of one CPU thread" if self.spec.device == "cpu" else "seconds of wall time"
                draw(curves, f"{label}: {task.title}", folder / image.format(label), clock)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--results", type=Path, help="folder of the results; default: reproduce/results/NAME_OF_SPEC")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of NAME_OF_SPEC.md and plots")
    parser.add_argument("--readme", type=Path, help=f"a page that has a line {BEGIN} and a line {END}: gets a short table there")
    options = parser.parse_args(argv)
    try:
        spec = read_spec(options.spec)
        results = read_results(options.results or Path(__file__).resolve().parent / "results" / spec.name)
        check_device(spec, results)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = options.spec.resolve()
    report = Report(spec, results, str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else options.spec))
    image = f"{spec.name}_{{}}.png"
    options.output.mkdir(parents=True, exist_ok=True)
    page = options.output / f"{spec.name}.md"
    page.write_text("\n".join(report.lines(image)).rstrip() + "\n")
    report.draw(options.output, image)
    print(f"wrote {page}")
    if options.readme is not None:
        try:
            replace_between(options.readme, report.summary())
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"wrote the table in {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
