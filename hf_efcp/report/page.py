"""The report as one HTML file: nothing is loaded from elsewhere, and colours follow the reader's setting."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..cli.common import gibibytes
from ..options import OptionError
from . import figures
from .advice import Advice, advise
from .figures import COLOURS, Panel
from .read import Run, metrics, read
from .style import STYLE

_KINDS = {"change": "Change", "try": "Try", "fine": "Fine"}
# Rows of a figure's table; of longer curves some are left out.
_ROWS = 40


def write(folders: Sequence[str | Path], file: str | Path) -> Path:
    """Write the report of the runs in some folders; give the file.

    Raises:
        OptionError: a folder has no run that can be read, matplotlib is not installed, or the file cannot be written.
    """
    text = page(read(folders))
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{file}: cannot be written: {error.strerror}") from None
    return Path(file)


def page(runs: Sequence[Run]) -> str:
    """Give the report as HTML."""
    light, dark = (" ".join(f"--line-{i + 1}: {pair[side]};" for i, pair in enumerate(COLOURS)) for side in (0, 1))
    title = "Training report: " + ", ".join(run.title for run in runs)
    numbers = iter(range(10**6))
    parts = [
        f"<header><h1>{_text(title)}</h1>{_about(runs)}</header><main>",
        f'<ul class="runs">{"".join(_card(i, run) for i, run in enumerate(runs))}</ul>',
        _section("What to change next", f'<ul class="advice">{"".join(_remark(a, len(runs) > 1) for a in advise(runs))}</ul>'),
        _section("Loss and metrics", _panels(figures.of_metrics(runs), "two", numbers)),
        _section("Diagnostics", _panels(figures.of_diagnostics(runs), "three", numbers), _DIAGNOSTICS),
        _section("Memory of the optimizer", _memory(runs, numbers)),
        _section(
            "Options and arguments",
            _comparison(runs, "Options and arguments", ("arguments",), ("model",), ("optimizer", "options")),
        ),
        _section("Environment", _comparison(runs, "Environment", ("environment",))),
        "</main><footer>Written by hf-efcp report. The same numbers as tables are below each figure.</footer>",
    ]
    style = STYLE.replace("LIGHT", light).replace("DARK", dark)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{style}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


_DIAGNOSTICS = "Measured on single steps by optimizer.diagnostics(); the page docs/diagnostics.md has usual values of each."


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str, note: str = "") -> str:
    name = title.lower().replace(" ", "-")
    note = f'<p class="soft">{_text(note)}</p>' if note else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{_text(title)}</h2>{note}{content}</section>' if content else ""


def _about(runs: Sequence[Run]) -> str:
    model, environment = runs[0].model, runs[0].environment
    facts = [
        " ".join(filter(None, (model.get("class"), f"({model['name']})" if model.get("name") else ""))),
        f"{model['parameters']:,} parameters" if "parameters" in model else "",
    ]
    facts += [environment.get("gpu") or environment.get("cpu", "")]
    return f'<p class="soft">{_text("; ".join(filter(None, facts)))}</p>'


def _card(number: int, run: Run) -> str:
    dash = ("", "7 4", "9 3 2 3", "2 3")[number % 4]
    line = f'<path d="M0 5H26" stroke="var(--line-{number % len(COLOURS) + 1})" stroke-width="3" stroke-dasharray="{dash}"/>'
    mark = f'<svg class="mark" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'
    rows: list[tuple[str, str]] = [("optimizer", run.name)] if run.name else []
    rows += [(f"last {name}", f"{run.curves[name].last:.4g}") for name in metrics([run])[:6]]
    if run.times:
        step, seconds = run.times[-1]
        rows += [("steps", f"{step:,}"), ("time", _time(seconds)), ("time of a step", f"{seconds / max(1, step):.3g} s")]
    if own := sum(run.optimizer.get("memory", {}).values()):
        count = run.model.get("trained", 0)
        rows.append(("optimizer state", gibibytes(own) + (f", {own / count:.2f} bytes per parameter" if count else "")))
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    return f"<li>{mark}<strong>{_text(run.title)}</strong><dl>{listed}</dl></li>"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _remark(advice: Advice, several: bool) -> str:
    whose = f"<strong>{_text(advice.run)}:</strong> " if several and advice.run else ""
    return f'<li class="{advice.kind}"><b>{_KINDS[advice.kind]}</b>{whose}{_text(advice.text)}</li>'


def _panels(panels: Iterable[Panel], columns: str, numbers: Iterable[int]) -> str:
    drawn = [_figure(panel, next(iter(numbers))) for panel in panels]
    return f'<div class="{columns}">{"".join(drawn)}</div>' if drawn else ""


def _figure(panel: Panel, number: int) -> str:
    title = f"{panel.title} over {'steps' if panel.x == 'step' else panel.x}" if panel.large else panel.title
    drawing = figures.svg(figures.figure(panel), number, _text(title))
    note = f"<figcaption>{_text(panel.meaning)}</figcaption>" if panel.meaning else ""
    head = ["run" if panel.large else "line", panel.x, panel.title]
    rows = [
        [line.label, _number(x), _number(y)] for line in panel.lines for x, y in _some(list(zip(line.x, line.y, strict=True)))
    ]
    return f"<figure><h3>{_text(title)}</h3>{drawing}{note}{_details(head, rows, title)}</figure>"


def _some(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(points) // _ROWS)
    return points[::-1][:: max(1, step)][::-1]


def _number(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() and abs(x) < 1e12 else f"{x:.4g}"


def _details(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    return f"<details><summary>Table</summary>{_table(head, rows, label)}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, differing: Iterable[int] = ()) -> str:
    marked = set(differing)
    body = "".join(
        f"<tr{' class=differs' if i in marked else ''}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    first = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    wide = f'<div class="wide" tabindex="0" role="region" aria-label="{_text(label)}, table">'
    return f"{wide}<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"


def _memory(runs: Sequence[Run], numbers: Iterable[int]) -> str:
    having = [run for run in runs if run.optimizer.get("memory")]
    if not having:
        return ""
    rows = [(run.title, {kind: n for kind, n in run.optimizer["memory"].items() if n}) for run in having]
    adamw = [run.optimizer["adamw"] for run in having if run.name.startswith("efcp_") and run.optimizer.get("adamw")]
    if adamw and not any(run.name.startswith("adamw") for run in having):
        rows.append(("AdamW, computed", adamw[0]))
    least = max(sum(parts.values()) for _, parts in rows) / 500  # what is too small to be seen is one part
    shown = []
    for name, parts in rows:
        small = sum(n for n in parts.values() if n < least)
        shown.append((name, {k: n / 2**20 for k, n in parts.items() if n >= least} | ({"other": small / 2**20} if small else {})))
    drawing = figures.svg(
        figures.bars("", shown, "MiB on the first process"), next(iter(numbers)), "Bytes of optimizer state by kind"
    )
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    cells = [[kind, *(f"{parts.get(kind, 0):,}" for _, parts in rows)] for kind in kinds]
    cells.append(["total", *(f"{sum(parts.values()):,}" for _, parts in rows)])
    table = _details(["bytes", *(name for name, _ in rows)], cells, "Bytes by kind")
    return f"<figure><h3>State by kind, MiB</h3>{drawing}{table}</figure>"


def _comparison(runs: Sequence[Run], label: str, *places: Sequence[str]) -> str:
    """Tabulate what the records say at some places, a run a column; rows in which runs differ stand out."""
    columns: list[dict[str, str]] = []
    for run in runs:
        found: dict[str, str] = {}
        for place in places:
            part = getattr(run, place[0])
            for name in place[1:]:
                part = part.get(name) or {}
            found |= {name: str(value) for name, value in part.items()}
        columns.append(found)
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return ""
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    differing = [i for i, row in enumerate(rows) if len({cell for cell in row[1:] if cell}) > 1]
    return _table(["name", *(run.title for run in runs)], rows, label, differing)
