"""`hf-efcp bench --sweep`: the points, the plot, and the exponents of growth."""

import pytest

from hf_efcp.bench.sweep import _exponent
from hf_efcp.cli.main import main
from tests.cli.helpers import written


def test_sweep(tmp_path, capsys):
    flags = ["--sweep_parameters", "1e6,2e6", "--sweep_windows", "2,8", "--steps", "1", "--warmup", "0", "--quick"]
    found = written("bench", tmp_path, "--sweep", "--optim", "efcp_sparse_mfac", *flags)
    assert [(p["parameters"], p["window_size"]) for p in found["points"]] == [(n * 2**20, m) for n in (1, 2) for m in (2, 8)]
    assert set(found["exponents"]["efcp_sparse_mfac"]) == {"parameters", "window_size"}
    assert "time grows like d^" in capsys.readouterr().out


def test_the_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "sweep.svg"
    flags = ["--sweep_parameters", "1e6,2e6", "--sweep_windows", "2,4", "--steps", "1", "--warmup", "0", "--quick"]
    assert main(["bench", "--sweep", "--optim", "efcp_sparse_mfac", "--plot", str(file), *flags]) == 0
    assert "<svg" in file.read_text()


def test_the_exponent_is_that_of_a_power_law():
    points = [
        {"optimizer": "x", "parameters": d, "window_size": m, "step_ms": {"median": 3.0 * d * m**2}}
        for d in (10, 100)
        for m in (2, 4, 8)
    ]
    assert _exponent(points, "x", "parameters") == pytest.approx(1)
    assert _exponent(points, "x", "window_size") == pytest.approx(2)
    assert _exponent(points[:1], "x", "window_size") is None
