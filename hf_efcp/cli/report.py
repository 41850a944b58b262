"""`hf-efcp report` and `hf-efcp plot`: what a training run did, as one HTML page or as PNG files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..options import OptionError


def add_parsers(commands: Any) -> None:
    """Add both commands."""
    about = (
        "output folders of training runs. The command reads efcp_run.json in each folder, if it is there, and otherwise "
        "trainer_state.json. --optim_args report=true writes efcp_run.json in any script, and --efcp_report true in the recipes"
    )
    report = commands.add_parser(
        "report",
        help="write one HTML page about a training run, or about several side by side",
        description="Writes one HTML page about one or more training runs. It has the curves of loss and metrics, the "
        "optimizer's diagnostics, its memory beside AdamW's, the options, the environment, and what to change next. The "
        "page needs no network.",
    )
    plot = commands.add_parser(
        "plot",
        help="draw the curves of training runs as PNG files",
        description="Draws the curves of one or more training runs, each curve into a PNG file of its own.",
    )
    for parser in (report, plot):
        parser.add_argument("folders", metavar="OUTPUT_DIR", nargs="+", help=about)
    report.add_argument("--output", metavar="FILE", help="the page to write (default: report.html in the first folder)")
    report.set_defaults(handler=_report)
    plot.add_argument("--output", metavar="FOLDER", help="the folder for the PNG files (default: plots in the first folder)")
    plot.set_defaults(handler=_plot)


def _report(args: argparse.Namespace) -> int:
    from ..report.page import write

    print(write(args.folders, args.output or Path(args.folders[0], "report.html")))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from ..report import figures
    from ..report.read import read

    runs, folder = read(args.folders), Path(args.output or Path(args.folders[0], "plots"))
    panels = [*figures.of_metrics(runs), *figures.of_diagnostics(runs)]
    if not panels:
        raise OptionError(f"{args.folders[0]}: no curve has two points; train with a lower --logging_steps")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder}: cannot be made: {error.strerror}") from None
    for panel in panels:
        name = f"{panel.title} {panel.x.split(' ')[0]}" if panel.large else panel.title
        file = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png"
        figures.save(figures.figure(panel, *figures.ON_WHITE, titled=True), file)
        print(file)
    return 0
