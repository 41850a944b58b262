"""recipes/training_step.py at a tiny size."""

import json

import pytest

from tests.recipes import helpers  # noqa: F401  (puts the recipes on the path)


def test_a_tiny_model_on_the_cpu(tmp_path, capsys):
    import training_step

    flags = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--batch",
        "2",
        "--length",
        "8",
        "--steps",
        "3",
        "--optim_args",
        "window_size=8",
    ]
    found = training_step.main([*flags, "--json", str(tmp_path / "out.json"), "--precision", "fp32", "bf16"])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    for results in found["precisions"].values():
        assert set(results) == {"adamw_fused", "efcp_lowrank_mfac", "efcp_sparse_mfac"}
        assert results["adamw_fused"]["overhead"] == 0
        for entry in results.values():
            assert 0 < entry["optimizer_ms"] < entry["ms"]
            assert entry["overhead"] == pytest.approx(entry["ms"] / results["adamw_fused"]["ms"] - 1)
    assert "| efcp_sparse_mfac " in capsys.readouterr().out
