"""What `bench` prints: Markdown, ready for docs/benchmarks."""

from __future__ import annotations

import importlib.metadata
import textwrap
from typing import Any

from ..cli.common import gibibytes, table
from .measuring import PHASES
from .peers import PEERS

# How many operations of a phase are shown.
_SHOWN = 8
# Characters of what keeps a peer out, in the table; it is written out below.
_REASON = 50


def versions_used(names: Any) -> dict[str, str]:
    """Package -> version, of everything that ran."""
    packages = ["hf_efcp", *(PEERS[name][0] for name in names if name in PEERS)]
    versions = {}
    for package in dict.fromkeys(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            from .._version import __version__

            versions[package] = __version__
    return versions


def text(report: dict[str, Any]) -> str:
    """The whole report of one model."""
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters, {report['dtype']}, {report['device']}, {report['clock']}",
        "",
    ]
    lines += [_machine(report), "", _rates(report["rates"]), ""]
    lines += [_times(report["optimizers"], report["skipped"]), ""]
    timed = {name: e for name, e in report["optimizers"].items() if "phase_share" in e}
    if timed:
        lines += ["Milliseconds by phase, and the least for it:", "", _phases(timed), ""]
    lines += ["State:", "", _state(report["optimizers"])]
    if report["cut_short"]:
        lines += ["", "The run was cut short: phases and temporaries were not measured for all, nor all steps."]
    if len(report["batches"]) > 1:
        together = "; ".join(", ".join(batch) for batch in report["batches"])
        lines += ["", f"Not all fit into memory together. By turns ran: {together}"]
    if report["device"] == "cpu" and "numba" not in report["machine"]:
        hint = 'pip install "hf_efcp[cpu]" adds numba, whose kernels are several times faster.'
        lines += ["", f"Steps ran in plain torch, because numba is not installed: {hint}"]
    lines += ["", *(f"skipped: {name}: {why}" for name, why in report["skipped"].items())]
    return "\n".join(lines).rstrip()


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    gpu = f"{m['gpu']}, CUDA {m['cuda']}; " if "gpu" in m else ""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if name != "torch")
    return f"{gpu}{m['cpu']}, {m['threads']} threads of {m['cores']} cores; Python {m['python']}, torch {m['torch']}, {versions}"


def _rates(rates: dict[str, dict[str, float]]) -> str:
    shown = []
    for name, unit in (("bandwidth", "GB/s"), ("fp32_flops", "GFLOP/s fp32"), ("fp64_flops", "GFLOP/s fp64")):
        r = rates[name]
        shown.append(f"{r['median'] / 1e9:.3g} {unit} ({r['q1'] / 1e9:.3g} to {r['q3'] / 1e9:.3g})")
    return "Rates, median (quartiles): " + ", ".join(shown)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(entries: dict[str, Any], skipped: dict[str, str]) -> str:
    rows = [
        ("optimizer", "step ms", "quartiles", "roofline ms", "bound by", "ratio", "best", "bytes per parameter", "temporaries")
    ]
    for name, e in entries.items():
        step, roof = e["step_ms"], e.get("roofline")
        limit = (_ms(roof["ms"]), roof["bound"], f"{e['ratio']:.2f}", f"{e['best_ratio']:.2f}") if roof else ("",) * 4
        state = f"{e['bytes_per_parameter']:.2f}", _bytes(e, "temporaries")
        rows.append((name, _ms(step["median"]), f"{_ms(step['q1'])} to {_ms(step['q3'])}", *limit, *state))
    rows += [(name, textwrap.shorten(why, _REASON), *("",) * 7) for name, why in skipped.items() if name in PEERS]
    note = "ratio: median step over the roofline at median rates; best: least step over the roofline at the highest rates."
    return table(rows) + f"\n\n{note}"


def _phases(entries: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("optimizer", *PHASES)]
    for name, e in entries.items():
        cells = [f"{_ms(e['phases_ms'][phase])} ({e['phase_share'][phase]:.0%})" for phase in PHASES]
        rows.append((name, *cells))
        rows.append(("its least", *(_ms(e["roofline"]["phases_ms"][p]) if p != "rest" else "" for p in PHASES)))
    return table(rows)


def _state(entries: dict[str, Any]) -> str:
    rows = [("optimizer", "bytes by kind", "total", "peak with parameters and gradients")]
    for name, e in entries.items():
        kinds = sorted(((k, n) for k, n in e["bytes"].items() if n >= 4096), key=lambda item: -item[1])
        shown = ", ".join(f"{kind} {gibibytes(n)}" for kind, n in kinds)
        rows.append((name, shown, gibibytes(e["total"]), _bytes(e, "peak_bytes")))
    return table(rows)


def _bytes(entry: dict[str, Any], name: str) -> str:
    """Give a figure that a run which was cut short does not have."""
    return gibibytes(entry[name]) if name in entry else ""


def launches_text(report: dict[str, Any]) -> str:
    """The report of `--launches`: for each optimizer a table by phase, and what is launched most."""
    lines = [f"{report['model']}: {report['parameters']:,} parameters, {report['dtype']}; one step, counted without a GPU"]
    for name, found in report["optimizers"].items():
        rows = [("phase", "launches", "of them Triton", "bytes", "reads", "waits")]
        for phase, tally in (*found["phases"].items(), ("all", found["total"])):
            numbers = (sum(tally[kind].values()) for kind in ("kernels", "reads", "waits"))
            triton, reads, waits = map(str, numbers)
            rows.append((phase, f"{tally['launches']:,}", triton, gibibytes(tally["bytes"]), reads, waits))
        lines += ["", f"{name}:", "", table(rows), "", *_most_frequent(found)]
    if not report["triton"]:
        lines += ["", "Triton is not installed: its kernels are not counted, but what torch would do in their place."]
    return "\n".join(lines)


def _most_frequent(found: dict[str, Any]) -> list[str]:
    """Lines of the operations that are launched most, by phase, and of what the host waits for."""
    lines = []
    for phase, tally in found["phases"].items():
        counts = {**{f"Triton's {name}": number for name, number in tally["kernels"].items()}, **tally["operations"]}
        most = sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN]
        if most:
            lines.append(f"{phase}: " + ", ".join(f"{name} {number}" for name, number in most))
    for kind in ("reads", "waits"):
        if found["total"][kind]:
            lines.append(f"{kind}: " + ", ".join(f"{name} {number}" for name, number in found["total"][kind].items()))
    if found["missing"]:
        lines.append("no kernel, but torch: " + ", ".join(found["missing"]))
    return lines
