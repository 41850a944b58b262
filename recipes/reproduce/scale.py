"""Learning rate, damping and the size of updates: heat maps from the runs of specs/scale.yaml, and quantiles of |u/g|.

python recipes/reproduce/run.py recipes/reproduce/specs/scale.yaml
python recipes/reproduce/scale.py --measure      # trains each task twice, for the quantiles; without it they are read
python recipes/reproduce/scale.py                # writes docs/benchmarks/scale.md and its pictures
"""

import argparse
import math
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from reproduce.contenders import Contender
from reproduce.plots import heat_maps
from reproduce.report import ROOT, Results, table
from reproduce.spec import Run, Spec, loss, read_results, read_spec, write_result
from reproduce.training import facts, fit

HERE = Path(__file__).resolve().parent
SPEC, RESULTS, RATIOS = HERE / "specs" / "scale.yaml", HERE / "results" / "scale", HERE / "results" / "ratios"
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
MOMENTS = (0.1, 0.5, 0.9)  # shares of all steps
MODES = ("adam", "constant")  # rms_mode; contenders are called MODE_DAMPING
MEASURED = ("adamw", "adam_0.1")
INTRODUCTION = (
    "Written by `python recipes/reproduce/scale.py`, never by hand, from the runs of "
    "`python recipes/reproduce/run.py recipes/reproduce/specs/scale.yaml` and of `scale.py --measure`.",
    "One map for learning rate and update_rms is enough: the update is rescaled to update_rms and then multiplied by the "
    "learning rate, so that only their product counts (`pytest tests/optim/test_metric_limits.py -k product`). All runs have "
    "update_rms=1.",
)


class Watched:
    """An optimizer that notes quantiles of |u/g| at some steps, u = (p before - p after) / lr.

    Args:
        optimizer: one whose weight decay is 0.
        steps: counted from 1.

    Attributes:
        ratios: step -> quantiles over the coordinates whose gradient is not 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: set[int]) -> None:
        self.optimizer, self.steps, self.count = optimizer, steps, 0
        self.param_groups = optimizer.param_groups
        self.ratios: dict[int, list[float]] = {}

    def step(self) -> None:
        """One step of the optimizer."""
        self.count += 1
        if self.count not in self.steps:
            self.optimizer.step()
            return
        lr = self.param_groups[0]["lr"]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients, before = ([x.detach().clone() for x in xs] for xs in ([p.grad for p in params], params))
        self.optimizer.step()
        parts = zip(params, before, gradients, strict=True)
        self.ratios[self.count] = quantiles(torch.cat([((b - p.detach()) / lr / g)[g != 0].abs() for p, b, g in parts]))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()


def quantiles(x: Tensor) -> list[float]:
    """QUANTILES of the numbers in x, which may be many: torch.quantile takes at most 2^24."""
    ordered = x.double().sort().values
    return [float(ordered[min(len(x) - 1, round(q * (len(x) - 1)))]) for q in QUANTILES]


def contender(spec: Spec, name: str) -> Contender:
    """A contender of the spec."""
    return next(c for members in spec.families.values() for c in members if c.name == name)


def measure(spec: Spec) -> None:
    """Train each task at its usual rate, and write the quantiles."""
    torch.set_num_threads(1)
    for label, task in spec.tasks.items():
        for name in MEASURED:
            problem = task.make(0)
            torch.manual_seed(0)
            steps = {max(1, round(share * task.steps)) for share in MOMENTS}
            watched = Watched(contender(spec, name).build(problem.model, task.rate), steps)
            fit(problem, watched, task, task.rate, 0)
            ratios = {str(step): values for step, values in watched.ratios.items()}
            names = {"key": f"{label} {name}", "task": label, "contender": name}
            write_result(RATIOS, "ratios", names | {"ratios": ratios} | facts())
            print(f"{label} {name}: done", flush=True)


def losses(spec: Spec, results: Results, label: str, mode: str) -> tuple[list[float], list[float], list[list[float]]]:
    """Dampings, multiples of the usual rate, and validation losses [damping][multiple]; nan: not run, inf: diverged."""
    named = {float(name.removeprefix(f"{mode}_")): name for name in spec.families if name.startswith(f"{mode}_")}

    def one(name: str, multiple: Fraction) -> float:
        run = Run(label, spec.tasks[label], contender(spec, name), multiple, spec.seeds[0], "grid")
        return loss(results[run.key()], "validation") if run.key() in results else math.nan

    dampings = sorted(named)
    return dampings, list(map(float, spec.rates)), [[one(named[d], x) for x in spec.rates] for d in dampings]


def page(spec: Spec, results: Results, ratios: Results) -> list[str]:
    """The page's lines."""
    lines = ["# Learning rate, damping and the size of updates", ""]
    for paragraph in INTRODUCTION:
        lines += [*textwrap.wrap(paragraph, 120, break_on_hyphens=False), ""]
    for label, task in spec.tasks.items():
        lines += [f"## {label}: {task.title}", "", f"Validation loss, seed {spec.seeds[0]}, usual rate {task.rate:g}.", ""]
        for mode in MODES:
            dampings, rates, values = losses(spec, results, label, mode)
            rows = [[f"{d:g}", *map(shown, row)] for d, row in zip(dampings, values, strict=True)]
            lines += table([f"damping, `rms_mode={mode}`", *(f"{x:.3g} x" for x in rates)], rows)
        if any(run.label == label and run.key() in results for run in spec.wanted({})):  # else there is no picture
            lines += [f"![validation loss of {label}](scale_{label}.png)", ""]
        rows = []
        for name in MEASURED:
            measured = ratios.get(f"{label} {name}", {"ratios": {}})["ratios"]
            rows += [[f"`{name}`", step, *(f"{x:.2g}" for x in values)] for step, values in measured.items()]
        lines += ["Quantiles over the coordinates of |u/g|, at the usual rate:", ""]
        lines += table(["contender", "step", *(f"{q:.0%}" for q in QUANTILES)], rows)
    return lines


def shown(x: float) -> str:
    """A loss as text."""
    return "not run" if math.isnan(x) else "diverged" if math.isinf(x) else f"{x:.4f}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the quantiles of |u/g| first")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of scale.md and its pictures")
    options = parser.parse_args(argv)
    spec = read_spec(SPEC)
    if options.measure:
        measure(spec)
    results, ratios = read_results(RESULTS), read_results(RATIOS)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "scale.md"
    path.write_text("\n".join(page(spec, results, ratios)).rstrip() + "\n")
    for label, task in spec.tasks.items():
        maps = {f"rms_mode={mode}": losses(spec, results, label, mode) for mode in MODES}
        heat_maps(maps, f"{label}: {task.title}, validation loss", options.output / f"scale_{label}.png")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
