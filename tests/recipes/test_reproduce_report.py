"""The report of recipes/reproduce says what the results say."""

import re

import pytest
import yaml

import tests.recipes.helpers  # noqa: F401  puts the recipes on the path

pytest.importorskip("sklearn")
from reproduce import report
from reproduce.spec import read_results, read_spec, write_result

FACTS = {"cpu": "a CPU", "threads": 1, "python": "3", "torch": "2", "transformers": "5", "hf_efcp": "0", "commit": "abc"}
SPEC = {
    "tasks": {"digits_vit": {"steps": 20}},
    "rates": [1, 3],
    "seeds": [0],
    "final_seeds": [1, 2, 3],
    "compare": [["new", "adamw"]],
    "plot": ["adamw", "new"],
    "contenders": {"adamw": {"optimizer": "torch.optim.AdamW"}, "new": {"optimizer": "torch.optim.SGD"}},
}


@pytest.fixture
def page(tmp_path):
    """(make results with a test loss for each run, or None after a divergence; the page's lines)."""

    def make(test_loss, **changes):
        path, folder = tmp_path / "spec.yaml", tmp_path / "results"
        path.write_text(yaml.safe_dump(SPEC | changes))
        gpu = {"gpu": "a GPU"} if changes.get("device") == "cuda" else {}
        spec = read_spec(path)
        results = {}
        while left := [r for r in spec.wanted(results) if r.key() not in results and test_loss(r) != "missing"]:
            for r in left:
                loss = test_loss(r)
                score = None if loss is None else {"loss": loss, "accuracy": 0.5}
                cost = {"steps": [10, 20], "losses": [2.0, 1.0], "seconds": [0.5, 1.0], "train_seconds": 1.0}
                cost |= {"optimizer_seconds": 0.1, "bytes_per_parameter": 8.0, "diverged_at": 7 if loss is None else None}
                write_result(folder, r.label, {"key": r.key(), "validation": score, "test": score, **cost, **FACTS, **gpu})
            results = read_results(folder)
        assert report.main([str(path), "--results", str(folder), "--output", str(tmp_path / "docs")]) == 0
        return (tmp_path / "docs/spec.md").read_text().splitlines()

    return make


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """matplotlib is no dependency of the tests."""
    drawn = []
    monkeypatch.setattr(report, "draw", lambda curves, title, path, clock: drawn.append((curves, path.name, clock)))
    return drawn


def losses(of_new):
    """AdamW: 0.9, and 0.1 more by seed; the other one: that and the given differences."""
    differences = {0: -1.0, **dict(zip((1, 2, 3), of_new, strict=True))}
    return lambda r: 0.9 + 0.1 * r.seed + (differences[r.seed] if r.contender.name == "new" else 0) + 0.01 * (r.multiple == 3)


def test_a_paired_difference_has_mean_and_standard_errors(page):
    lines = page(losses([-0.1, -0.2, -0.3]))
    assert "| digits_vit | -0.2000 (-3.5 s.e.) | -0.2000 (-3.5 s.e.) |" in lines
    assert any(line.startswith("| `new` | 0.9000<br>-0.2000 (-3.5 s.e.)") for line in lines)
    row = next(line for line in lines if line.startswith("| `adamw` | 0.001 (best) |"))
    assert "| 1.1000 ± 0.0577 | 50.00% |" in row and "| 8.00 | 50, 5.0 |" in row


@pytest.mark.parametrize(("device", "says", "clock"), [("cpu", "CPU time", "CPU"), ("cuda", "wall time", "wall time")])
def test_a_page_says_what_its_times_are(device, says, clock, page, no_plot):
    lines = page(losses((-0.3, -0.1, -0.2)), device=device)
    assert says in next(line for line in lines if "Times are" in line)
    assert ("- gpu: a GPU" in lines) == ("bf16 (autocast)" in " ".join(lines)) == (device == "cuda")
    assert all(clock in axis for _, _, axis in no_plot) and no_plot


def test_a_win_of_adamw_is_bold(page):
    lines = page(losses([0.1, 0.2, 0.3]))
    assert "| digits_vit | **+0.2000 (+3.5 s.e.)** | **+0.2000 (+3.5 s.e.)** |" in lines


def test_a_divergence_counts_as_lost(page):
    lines = page(lambda r: None if (r.contender.name, r.seed) == ("new", 2) else 1.0)
    assert "| digits_vit | **diverged** | **diverged** |" in lines
    assert any(line.startswith("| `new` | 0.001 (best) | 1 of 3 diverged |  | **diverged** |") for line in lines)


def test_what_has_not_run_is_said(page):
    lines = page(lambda r: "missing" if r.contender.name == "new" or r.seed == 3 else 1.0)
    assert "| digits_vit | not run | not run |" in lines
    assert any("1.0000 ± 0.0000 (2 of 3 seeds)" in line for line in lines)
    assert any(line.startswith("| `new` | (best) | not run |") for line in lines)


def test_the_best_rate_of_the_grid_is_marked_and_the_finals_run_there(page, no_plot):
    lines = page(lambda r: 1.0 if r.multiple == 3 else 2.0)
    assert "| `adamw` | 2.0000 | _1.0000_ |" in lines
    assert any(line.startswith("| `adamw` | 0.003 (best) | 1.0000") for line in lines)
    assert any(line.startswith("| `adamw` | 0.001 (usual) | 2.0000") for line in lines)
    ((curves, name, _),) = no_plot
    assert [curve.name for curve in curves] == ["adamw", "new"] and name == "spec_digits_vit.png"
    assert curves[0].steps == [10, 20] and curves[0].losses == [2.0, 1.0] and curves[0].seconds == [0.5, 1.0]
    assert "![training loss of digits_vit](spec_digits_vit.png)" in lines


def test_text_is_wrapped_and_every_task_row_has_its_command(page):
    lines = page(losses([0, 0, 0]))
    assert max(len(line) for line in lines if not line.startswith("|")) <= 140  # a path is never broken
    rows = [line for line in lines if re.match(r"\| `\w+` \| \S+ \((best|usual)\)", line)]
    assert len(rows) == 4 and all("--tasks digits_vit --contenders" in row for row in rows)


def test_the_short_table_replaces_the_one_before(page, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    page(losses([-0.1, -0.2, -0.3]))
    arguments = [str(tmp_path / "spec.yaml"), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    for _ in range(2):  # the second time in place of the first table
        assert report.main([*arguments, "--readme", str(readme)]) == 0
    before, begin, _, header, _, row, _, end, after = readme.read_text().splitlines()
    assert (before, begin, end, after) == ("before", report.BEGIN, report.END, "after")
    assert header.startswith("| task | `adamw` | `new` | difference |") and "| -0.2000 (-3.5 s.e.) | -0.2000 (-3.5 s.e.) |" in row


def test_a_page_without_the_place_for_the_table_stays_as_it_is(page, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.END}\n{report.BEGIN}\n")
    page(losses([-0.1, -0.2, -0.3]))
    arguments = [str(tmp_path / "spec.yaml"), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    assert report.main([*arguments, "--readme", str(readme)]) == 1
    assert readme.read_text() == f"{report.END}\n{report.BEGIN}\n" and "has no line" in capsys.readouterr().err


def test_the_short_table_of_a_spec_that_compares_nothing_has_all_contenders(page, tmp_path, monkeypatch):
    monkeypatch.setitem(SPEC, "compare", [])
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    page(losses([-0.1, -0.2, -0.3]))
    arguments = [str(tmp_path / "spec.yaml"), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    assert report.main([*arguments, "--readme", str(readme)]) == 0
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == "| optimizer | learning rate | accuracy | seconds | bytes per parameter |"
    assert [row.split("`")[1] for row in rows[1:]] == ["adamw", "new"] and all(report.NOT_RUN not in row for row in rows)


def test_the_short_table_says_what_is_not_run_yet(page, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    page(lambda r: "missing" if r.contender.name == "new" else 1.0)
    arguments = [str(tmp_path / "spec.yaml"), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    assert report.main([*arguments, "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2
    assert lines[-2].startswith("Not run yet: digits, small vision transformer")
