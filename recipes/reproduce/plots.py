"""Training loss over steps and over seconds."""

from pathlib import Path
from typing import NamedTuple


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


def draw(curves: list[Curve], title: str, path: Path) -> None:
    """Write both plots, side by side, as one image.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        left.plot(curve.steps, curve.losses, label=curve.name, linewidth=1.4)
        right.plot(curve.seconds, curve.losses, label=curve.name, linewidth=1.4)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="seconds of one CPU thread")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
