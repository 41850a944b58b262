"""The page of recipes/reproduce/scale.py says what its results say, and its quantiles are those of |u/g|."""

import json

import pytest
import torch
import yaml

import tests.recipes.helpers  # noqa: F401  puts the recipes on the path

pytest.importorskip("sklearn")
from reproduce import scale
from reproduce.spec import read_spec, write_result

SPEC = {
    "tasks": {"digits_vit": {"steps": 20}},
    "rates": [1, 3],
    "seeds": [0],
    "contenders": {
        "adam_0.1": {"optimizer": "torch.optim.SGD", "options": {"momentum": 0.1}},
        "adam_1": {"optimizer": "torch.optim.SGD", "options": {"momentum": 0.2}},
        "constant_0.1": {"optimizer": "torch.optim.SGD", "options": {"momentum": 0.3}},
    },
}


@pytest.fixture
def spec(tmp_path, monkeypatch):
    path = tmp_path / "scale.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    for name, value in (("SPEC", path), ("RESULTS", tmp_path / "scale"), ("RATIOS", tmp_path / "ratios")):
        monkeypatch.setattr(scale, name, value)
    return read_spec(path)


@pytest.fixture
def drawn(monkeypatch):
    """matplotlib is no dependency of the tests."""
    calls = []
    monkeypatch.setattr(scale, "heat_maps", lambda maps, title, path: calls.append((maps, path.name)))
    return calls


def test_losses_stand_where_their_damping_and_rate_are(spec, drawn, tmp_path):
    for run in spec.wanted({}):
        if run.contender.name == "adam_1" and run.multiple == 3:
            continue
        diverged = run.contender.name == "constant_0.1" and run.multiple == 3
        value = None if diverged else {"loss": float(run.contender.options["momentum"]) + run.multiple.numerator}
        write_result(tmp_path / "scale", run.label, {"key": run.key(), "validation": value})
    write_result(tmp_path / "ratios", "ratios", {"key": "digits_vit adam_0.1", "ratios": {"10": [0.125, 1.0, 2.0, 40.0, 500.0]}})
    assert scale.main(["--output", str(tmp_path)]) == 0
    lines = (tmp_path / "scale.md").read_text().splitlines()
    assert {"| 0.1 | 1.1000 | 3.1000 |", "| 1 | 1.2000 | not run |", "| 0.1 | 1.3000 | diverged |"} <= set(lines)
    assert "| `adam_0.1` | 10 | 0.12 | 1 | 2 | 40 | 5e+02 |" in lines
    [(maps, name)] = drawn
    assert name == "scale_digits_vit.png" and maps["rms_mode=adam"][:2] == ([0.1, 1.0], [1.0, 3.0])


def test_the_quantiles_are_of_the_update_over_the_gradient():
    p = torch.nn.Parameter(torch.zeros(101))
    p.grad = torch.arange(101.0)  # one coordinate without gradient
    watched = scale.Watched(torch.optim.SGD([p], lr=0.5), {2})
    watched.step()
    assert not watched.ratios
    watched.step()
    assert watched.ratios == {2: pytest.approx([1.0] * 5)}
    assert scale.quantiles(torch.arange(101.0)) == [1, 10, 50, 90, 99]


def test_measuring_trains_every_task_by_each_of_both(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "MEASURED", ("adam_0.1", "adam_1"))
    scale.measure(spec)
    results = [json.loads(line) for line in (tmp_path / "ratios/ratios.jsonl").read_text().splitlines()]
    assert [r["key"] for r in results] == ["digits_vit adam_0.1", "digits_vit adam_1"]
    assert all(list(r["ratios"]) == ["2", "10", "18"] for r in results)
    # SGD's ratio is 1, but for what fp32 parameters round away.
    assert all(0.5 < values[2] < 2 for values in results[0]["ratios"].values())
