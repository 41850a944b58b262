"""The scale that DASH divides a matrix by: the loss of a vision transformer on digits over that scale, and over gradients.

python recipes/reproduce/dash_scaling.py --measure      # 60 runs of 60 steps, about ten minutes on one core
python recipes/reproduce/dash_scaling.py                # writes docs/benchmarks/dash_scaling.md and its picture

Two questions. Over the scale: the scale by which a matrix is divided is multiplied by a number, and the check that falls back to
the norm is off, so that the recursion sees what it is given. Over gradients: every gradient is multiplied by a number before the
step, as a loss in other units would do.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import hf_efcp
from hf_efcp.core import inverse_roots
from reproduce.report import ROOT, table
from reproduce.tasks import get_task
from reproduce.training import facts, train

RESULTS = Path(__file__).resolve().parent / "results" / "dash_scaling" / "digits_vit.jsonl"
PAGE = ROOT / "docs" / "benchmarks" / "dash_scaling.md"
SCALES = (1 / 16, 1 / 4, 1, 4, 16, 64)
GRADIENTS = (1e-6, 1e-3, 1, 1e3)
METHODS = ("newton", "newton_db")
STEPS, RATE, SEED = 60, 1e-3, 0
TITLES = {"scale": "the scale times", "gradients": "gradients times"}


@contextlib.contextmanager
def scaled(factor: float) -> Iterator[None]:
    """Multiply the scale of every matrix inside, and check nothing."""
    scale_of = inverse_roots.scale_of
    with (
        mock.patch.object(inverse_roots, "scale_of", lambda x, scaling: factor * scale_of(x, scaling)),
        mock.patch.object(inverse_roots, "safe_scale", lambda x, scale, limit: scale),
    ):
        yield


def builder(method: str, scaling: str, factor: float) -> Callable[[torch.nn.Module, float], torch.optim.Optimizer]:
    """Give what makes a DASH whose gradients are multiplied by `factor` before each step."""

    def build(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
        options = {"root_method": method, "root_scaling": scaling}
        optimizer = hf_efcp.create_optimizer("efcp_dash", model, lr=rate, weight_decay=0.0, **options)
        params = list(model.parameters())

        def multiply(*_: Any) -> None:
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(factor)

        optimizer.register_step_pre_hook(multiply)
        return optimizer

    return build


def measure(only: str | None = None) -> None:
    """Make the runs that have no result yet."""
    done = {tuple(r["of"]) for r in read()}
    task = dataclasses.replace(get_task("digits_vit"), steps=STEPS)
    for question, factors in (("scale", SCALES), ("gradients", GRADIENTS)):
        for method in METHODS:
            for scaling in inverse_roots.SCALINGS:
                for factor in factors:
                    of = (question, method, scaling, factor)
                    if of in done or only not in (None, question):
                        continue
                    with scaled(factor) if question == "scale" else contextlib.nullcontext():
                        run = train(task, builder(method, scaling, factor if question == "gradients" else 1.0), RATE, SEED)
                    loss = None if run["test"] is None else run["test"]["loss"]
                    RESULTS.parent.mkdir(parents=True, exist_ok=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps({"of": of, "test_loss": loss, "steps": STEPS, **facts()}) + "\n")
                    print(*of, loss, flush=True)


def read() -> list[dict[str, Any]]:
    """Give the results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write() -> None:
    """Write the page and its picture."""
    results = read()
    losses = {tuple(r["of"]): r["test_loss"] for r in results}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True)
    lines = [
        "# How DASH scales a matrix",
        "",
        "Written by `python recipes/reproduce/dash_scaling.py`, never by hand, from the runs of `--measure`.",
        "",
        "`newton` and `newton_db` divide a matrix by a scale before the inverse root is formed. Test loss of the small vision",
        f"transformer on digits after {STEPS} steps at a learning rate of {RATE:g}, seed {SEED}, the `--optim` defaults of",
        "`efcp_dash`. A dash: no number.",
        "",
        "![The loss over both factors](dash_scaling.png)",
        "",
    ]
    for i, (question, factors) in enumerate((("scale", SCALES), ("gradients", GRADIENTS))):
        lines += [f"## {'The scale' if question == 'scale' else 'Gradients'} multiplied", ""]
        lines += {
            "scale": ["The scale of `root_scaling` times a number. The check that falls back to the norm is off here.", ""],
            "gradients": ["Every gradient times a number before the step. `root_eps` is 1e-10.", ""],
        }[question]
        rows = []
        for j, method in enumerate(METHODS):
            for scaling in inverse_roots.SCALINGS:
                of = [losses.get((question, method, scaling, factor)) for factor in factors]
                rows.append([f"`{method}`, `{scaling}`", *("-" if x is None else f"{x:.3f}" for x in of)])
                seen = [(f, x) for f, x in zip(factors, of, strict=True) if x is not None]
                axes[i, j].plot(*zip(*seen, strict=True), marker="o", label=scaling)
            axes[i, j].set(xscale="log", title=method, xlabel=TITLES[question], ylabel="test loss", ylim=(0, 2.5))
            axes[i, j].legend()
        lines += [*table([TITLES[question], *(f"{factor:g}" for factor in factors)], rows)]
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".png"), dpi=100)
    machine = {key: results[0][key] for key in ("cpu", "threads", "python", "torch", "hf_efcp")}
    lines += ["Made with " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="make the runs that have no result yet")
    parser.add_argument("--only", choices=TITLES, help="with --measure: only the runs of one question")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(1)
        measure(args.only)
    elif not read():
        parser.error(f"there are no results in {RESULTS}: run it with --measure first")
    else:
        write()


if __name__ == "__main__":
    main()
