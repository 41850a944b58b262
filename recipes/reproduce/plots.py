"""Training loss over steps and over seconds; heat maps of the loss over damping and learning rate."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """The training loss of a contender, averaged over seeds.

    Attributes:
        name: for the legend.
        steps: x of the first plot.
        losses: y.
        seconds: x of the second plot.
    """

    name: str
    steps: list[int]
    losses: list[float]
    seconds: list[float]


def draw(curves: list[Curve], title: str, path: Path, clock: str) -> None:
    """Write both plots, side by side, as one image; `clock` names the axis of the second one.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    figure, (left, right) = _two_plots()
    for curve in curves:
        left.plot(curve.steps, curve.losses, label=curve.name, linewidth=1.4)
        right.plot(curve.seconds, curve.losses, label=curve.name, linewidth=1.4)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel=clock)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def heat_maps(maps: Mapping[str, tuple[list[float], list[float], list[list[float]]]], title: str, path: Path) -> None:
    """Write two heat maps side by side as one image, with one scale of colours, which ends at twice the least loss.

    Args:
        maps: name -> (dampings, multiples of the usual rate, losses [damping][multiple]: nan for none, inf for a divergence).
        title: of the image.
        path: to write to.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    numbers = [x for _, _, values in maps.values() for row in values for x in row if math.isfinite(x)]
    if not numbers:
        return
    figure, plots = _two_plots()
    for axes, (name, (dampings, rates, values)) in zip(plots, maps.items(), strict=True):
        clipped = [[min(x, 2 * min(numbers)) for x in row] for row in values]  # nan stays nan, and has no colour
        image = axes.imshow(clipped, vmin=min(numbers), vmax=2 * min(numbers), cmap="viridis_r", aspect="auto", origin="lower")
        axes.set(xlabel="learning rate / usual rate", ylabel="damping", title=name)
        axes.set_xticks(range(len(rates)), [f"{x:.3g}" for x in rates])
        axes.set_yticks(range(len(dampings)), [f"{x:g}" for x in dampings])
        for i, row in enumerate(values):
            for k, x in enumerate(row):
                text = "" if math.isnan(x) else "diverged" if math.isinf(x) else f"{x:.3f}"
                axes.text(k, i, text, ha="center", va="center", fontsize=8, color="white" if x > 1.5 * min(numbers) else "black")
    figure.colorbar(image, ax=plots)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _two_plots() -> tuple[Any, Any]:
    """A figure, and two plots side by side in it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, 2, sharey=True)
