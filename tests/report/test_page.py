"""The page: everything in one file, for light and dark, with names of its own for every part; and the files of `plot`."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from hf_efcp.cli.main import main
from hf_efcp.report import figures
from hf_efcp.report.catalogue import CATALOGUE
from hf_efcp.report.read import read
from tests.report.runs import DIAGNOSTICS, logs, record

pytest.importorskip("matplotlib")
EMPTY = {"meta", "path", "use", "rect"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    ours = record(root / "ours <b>", logs(**DIAGNOSTICS))
    return [str(ours), str(record(root / "adamw", logs(end=0.6), "adamw_torch", 1.0))]


@pytest.fixture(scope="module")
def page(folders):
    assert main(["report", *folders]) == 0
    with open(f"{folders[0]}/report.html", encoding="utf-8") as file:
        return file.read()


def test_it_loads_nothing(page):
    assert not re.search(r"""(src|href)=["'](?!#)|@import|<script|<link|url\((?!#)""", page)
    assert len(page) < 500_000


def test_every_tag_is_closed_and_every_name_is_there_once(page):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.names, self.used = [], [], set()

        def handle_starttag(self, tag, attrs):
            self.open += [tag] * (tag not in EMPTY)
            for name, value in attrs:
                self.names += [value] * (name == "id")
                self.used |= {value} if name == "aria-labelledby" else {value[1:]} if value and value[0] == "#" else set()

        def handle_startendtag(self, tag, attrs):
            self.handle_starttag(tag, attrs)
            self.open = self.open[: -(tag not in EMPTY)] if tag not in EMPTY else self.open

        def handle_endtag(self, tag):
            if tag not in EMPTY:
                assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and len(reader.names) == len(set(reader.names))
    assert reader.used <= set(reader.names) | {""}


def test_figures_take_their_colours_from_the_page(page):
    drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2 * 2 + len(CATALOGUE) - 1 + 1  # no step was refused; memory
    for drawing in drawings:
        ET.fromstring(drawing.replace("xlink:href", "href"))
        assert "currentColor" in drawing and "var(--line-1)" in drawing and "#0102" not in drawing
    assert "prefers-color-scheme: dark" in page and page.count("--line-2:") == 2


def test_names_of_runs_are_text_and_nothing_else(page):
    assert "ours &lt;b&gt;" in page and "<b>:" not in page and "ours <b>" not in page


def test_all_parts_are_there(page):
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert titles == [
        "What to change next",
        "Loss and metrics",
        "Diagnostics",
        "Memory of the optimizer",
        "Options and arguments",
        "Environment",
    ]
    for entry in CATALOGUE[:-1]:
        assert entry.title.split(",")[0] in page
    assert "<td>window</td><td>2,500</td><td>2,500</td>" in page and "AdamW, computed" not in page
    assert "<td>5</td><td>1.812</td>" in page  # the loss at step 5


def test_plot_writes_a_file_for_each_curve(tmp_path, capsys):
    folder = record(tmp_path / "run", logs(compression_error=0.5))
    assert main(["plot", str(folder), "--output", str(tmp_path / "plots")]) == 0
    files = capsys.readouterr().out.split()
    names = {file.rsplit("/", 1)[1] for file in files}
    assert names == {f"{curve}_{by}.png" for curve in ("loss", "eval_loss") for by in ("step", "seconds")} | {
        "compression_error.png"
    }
    for file in files:
        with open(file, "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_picture_says_what_it_shows_and_a_page_says_it_once(folders):
    panel = next(figures.of_metrics(read(folders)))
    alone, on_page = (figures.figure(panel, titled=titled).axes[0] for titled in (True, False))
    assert alone.get_title(loc="left") == panel.title == "loss" and on_page.get_title(loc="left") == ""
    assert alone.get_xlabel() == "step"
    assert set(alone.get_xticks()) <= set(range(-100, 100, 5))  # round steps


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*neither efcp_run.json nor trainer_state.json.*\n", capsys.readouterr().err)
    folder = record(tmp_path / "run", logs())
    assert main(["report", str(folder), "--output", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    short = record(tmp_path / "short", [entry for entry in logs() if entry["step"] == logs()[0]["step"]])
    assert main(["plot", str(short)]) == 2 and not (short / "plots").exists()
    assert re.fullmatch(r"error: .*no curve has two points; .*--logging_steps\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["estimate", "bench"])
def test_estimate_and_bench_draw_too(command, tmp_path, capsys):
    file = tmp_path / "drawn.svg"
    (tmp_path / "shapes.json").write_text('{"a.weight": [24, 16]}')
    flags = ["--quick", "--steps", "1", "--warmup", "0"] if command == "bench" else []
    assert main([command, str(tmp_path / "shapes.json"), "--optim", "efcp_sparse_mfac", "--plot", str(file), *flags]) == 0
    assert "efcp_sparse_mfac" in file.read_text()
