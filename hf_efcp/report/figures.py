"""Figures by matplotlib: as SVG that takes its colours from the page around it, light or dark, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..options import OptionError
from .catalogue import CATALOGUE, Entry
from .read import Run, metrics

# Colours of the lines, one for each run or kind, light and dark. Each is legible on its ground (WCAG 3:1).
COLOURS = (
    ("#1f6fb4", "#6cb4f0"),
    ("#c2410c", "#fb923c"),
    ("#15803d", "#4ade80"),
    ("#7e22ce", "#c084fc"),
    ("#a16207", "#facc15"),
    ("#be185d", "#f472b6"),
    ("#0f766e", "#2dd4bf"),
    ("#475569", "#a8b5c7"),
)
DASHES = ("-", "--", "-.", ":")
# An axis is logarithmic where values differ by more than this factor.
_DECADE = 10.0
# What stands for the page's own colour until the SVG is in the page.
_INK = "#010203"
# Of figures that are no part of a page: ink, and lines.
ON_WHITE = "#1b1f24", [light for light, _ in COLOURS]
# Width and height in inches, and points of text, of a figure of its own and of one among several.
_LARGE, _SMALL = (5.4, 3.3, 12.0), (4.4, 2.7, 10.0)


class Line:
    """A curve of a panel: its label, x, y, and which colour and dash it has."""

    def __init__(self, label: str, x: Sequence[float], y: Sequence[float], colour: int, dash: int = 0):
        self.label, self.x, self.y, self.colour, self.dash = label, list(x), list(y), colour, dash


class Panel:
    """One figure: a title, lines over x, and what the axes are.

    Args:
        title: of the y axis, with the unit.
        x: of the x axis, with the unit.
        lines: the curves.
        log: whether y is logarithmic.
        meaning: what it shows, in a sentence.
        large: whether it is among the main figures.
    """

    def __init__(self, title: str, x: str, lines: Sequence[Line], log: bool = False, meaning: str = "", large: bool = False):
        self.title, self.x, self.lines, self.meaning, self.large = title, x, list(lines), meaning, large
        values = [value for line in self.lines for value in line.y]
        self.log = log and min(values) > 0 and max(values) > _DECADE * min(values)


def of_metrics(runs: Sequence[Run]) -> Iterator[Panel]:
    """Give a panel over steps and one over seconds for each metric that was logged more than once."""
    for name in metrics(runs):
        having = [
            (i, run, run.curves[name]) for i, run in enumerate(runs) if name in run.curves and len(run.curves[name].steps) > 1
        ]
        if not having:
            continue
        lines = [Line(run.title, series.steps, series.values, i, i) for i, run, series in having]
        yield Panel(name, "step", lines, large=True)
        timed = [(i, run, series, seconds) for i, run, series in having if (seconds := run.seconds(series.steps)) is not None]
        if timed:
            about = "" if all(run.exact for _, run, _, _ in timed) else " (evenly over the steps, where no record was kept)"
            yield Panel(
                name, "seconds" + about, [Line(run.title, seconds, s.values, i, i) for i, run, s, seconds in timed], large=True
            )


def of_diagnostics(runs: Sequence[Run]) -> Iterator[Panel]:
    """Give a panel for each entry of the catalogue that some run has logged."""
    for entry in CATALOGUE:
        lines = list(_lines(entry, runs))
        if lines and not (entry.names == ("skipped_steps",) and not any(any(line.y) for line in lines)):
            yield Panel(entry.title, "step", lines, entry.log, entry.meaning)


def _lines(entry: Entry, runs: Sequence[Run]) -> Iterator[Line]:
    having = [(i, run, _named(entry, run)) for i, run in enumerate(runs)]
    several = max((len(names) for _, _, names in having), default=0) > 1
    for i, run, names in having:
        for j, name in enumerate(names):
            series = run.diagnostics[name]
            label = _short(name, entry) if several else run.title
            label = f"{label}, {run.title}" if several and sum(bool(n) for _, _, n in having) > 1 else label
            yield Line(label, series.steps, series.values, j if several else i, i)


def _named(entry: Entry, run: Run) -> list[str]:
    """Name the diagnostics of a run that an entry shows; weights by age are in the order of ages."""
    found = [n for name in entry.names for n in run.diagnostics if n == name or (name[-1] == "*" and n.startswith(name[:-1]))]
    return sorted(found, key=lambda n: int(re.findall(r"\d+", n)[0])) if entry.names[0].startswith("weight_age") else found


def _short(name: str, entry: Entry) -> str:
    start = next((n[:-1] for n in entry.names if n[-1] == "*"), "")
    return name.removeprefix(start).removeprefix("scale_").replace("_", " to " if start.startswith("weight") else " ")


# Drawing -------------------------------------------------------------------------------------------------------------------


def figure(panel: Panel, ink: str = _INK, colours: Sequence[str] | None = None, titled: bool = False) -> Any:
    """Draw a panel; gives a matplotlib figure.

    Args:
        panel: what is drawn.
        ink: of text and axes.
        colours: of lines; None: stand-ins that `svg` replaces.
        titled: whether the title is in the figure. A page has it as a heading.
    """
    width, height, points = _LARGE if panel.large else _SMALL
    made, axes = blank(width, height, points, ink)
    several = len(panel.lines) > 1 and len({line.label for line in panel.lines}) > 1
    for line in panel.lines:
        colour = (colours or _stand_ins())[line.colour % len(COLOURS)]
        dots = "o" if len(line.x) < 30 else ""
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=DASHES[line.dash % 4],
            linewidth=1.6,
            marker=dots,
            markersize=3,
            label=line.label,
        )
    if panel.log:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _within(panel, 100) else (1.0,), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(panel.x)
    axes.margins(x=0.02)
    if panel.x == "step":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    if titled:
        axes.set_title(panel.title, loc="left", fontsize=points, color=ink)
    if several:
        made.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=_columns(panel), frameon=False, labelcolor=ink
        )
    return made


def _within(panel: Panel, factor: float) -> bool:
    values = [value for line in panel.lines for value in line.y]
    return max(values) < factor * min(values)


def _columns(panel: Panel) -> int:
    """Give the number of labels that fit beside each other."""
    longest = max(len(line.label) for line in panel.lines)
    return max(1, min(len(panel.lines), int((_LARGE if panel.large else _SMALL)[0] * 11) // (longest + 7)))


def bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], unit: str, ink: str = _INK, colours: Any = None) -> Any:
    """Draw stacked bars, one a row, each a sum of kinds; gives a matplotlib figure."""
    made, axes = blank(5.4, 1.5 + 0.42 * len(rows), 11.0, ink)
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    starts = [0.0] * len(rows)
    for i, kind in enumerate(kinds):
        sizes = [parts.get(kind, 0.0) for _, parts in rows]
        axes.barh(range(len(rows)), sizes, left=starts, color=(colours or _stand_ins())[i % len(COLOURS)], label=kind, height=0.6)
        starts = [a + b for a, b in zip(starts, sizes, strict=True)]
    for i, total in enumerate(starts):
        axes.text(total, i, f" {total:.3g}", va="center", color=ink)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{title}, {unit}" if title else unit)
    axes.grid(axis="y", visible=False)
    made.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, labelcolor=ink)
    return made


def blank(width: float, height: float, points: float, ink: str) -> tuple[Any, Any]:
    """Make a figure and its axes, in the report's style.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    style: Any = {"font.size": points, "svg.fonttype": "none", "axes.formatter.useoffset": False, "axes.axisbelow": True}
    style |= {
        name: ink for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "grid.color")
    }
    with rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained")
        axes = made.subplots()
        made.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.grid(alpha=0.18, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_alpha(0.5)
    return made, axes


def _stand_ins() -> list[str]:
    return [f"#0102{16 + i:02x}" for i in range(len(COLOURS))]


def svg(made: Any, number: int, label: str) -> str:
    """Give a figure as an element of a page: colours are the page's, names of its parts are its own, `label` is read aloud."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"figure {number}"}):
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number}-", text)
    for i, stand_in in enumerate(_stand_ins()):
        text = text.replace(stand_in, f"var(--line-{i + 1})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"\s*\n\s*", "\n", text.replace(_INK, "currentColor"))


def save(made: Any, file: str | Path) -> None:
    """Write a figure to a file, in the format that its name ends in.

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        made.savefig(file, dpi=160, facecolor="white")
    except (OSError, ValueError) as error:
        raise OptionError(f"{file}: cannot be written: {error}") from None
