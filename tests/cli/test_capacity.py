"""`hf-efcp capacity`: formats by name, saved models, what the states of optimizers are worth."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_efcp.cli.capacity import of_optimizer
from hf_efcp.cli.formats import SHOWN, parse
from hf_efcp.cli.main import main
from hf_efcp.core import capacity as core
from hf_efcp.registry import list_optimizers, optim_defaults
from tests.cli.helpers import assert_one_line_of_error, write_shapes, written

FEW = ("--samples", "10000")


def test_the_table_and_the_json(tmp_path, capsys):
    found = written("capacity", tmp_path, "int4", "2:4", "minmax4=64", "2:4*int4", *FEW)
    rows = {row["format"]: row for row in found["formats"]}
    assert rows["int4"]["capacity"] == core.capacity(core.uniform(4).value) and rows["int4"]["gmse_error"] == 0
    assert rows["minmax4=64"]["gmse_error"] > 0 and rows["minmax4=64"]["capacity_error"] > 0
    product = rows["int4"]["capacity"] * rows["2:4"]["capacity"]
    assert rows["2:4*int4"]["capacity"] == pytest.approx(product) and rows["2:4*int4"]["gmse"] is None
    assert [rows[f]["bits"] for f in ("int4", "2:4", "minmax4=64", "2:4*int4")] == [4, 16.75, 4.5, 2.75]
    printed = capsys.readouterr().out
    assert "| 2:4*int4   |" in printed and "indicative" in printed


def test_the_other_fit_has_its_own_ceiling(tmp_path):
    found = written("capacity", tmp_path, "fp32", "--fit", "olmo2", *FEW)
    assert found["formats"][0]["capacity"] == pytest.approx(0.84, abs=1e-3)


def test_formats_of_our_states_are_what_the_codecs_do():
    plain, drawn, fours = (parse(name, 200_000) for name in ("window_int8", "error_int8", "error_int4"))
    assert 1.8 < drawn.gmse.value / plain.gmse.value < 2.2  # stochastic rounding has twice the mean square
    assert fours.bits == 4.125 and fours.gmse.value > 100 * drawn.gmse.value
    exact = parse("minmax4=256", 200_000).gmse.value
    assert parse("error_minmax4", 200_000).gmse.value == pytest.approx(exact, rel=0.02)  # its bounds are bf16
    ten, low = parse("top=0.1", 200_000), parse("low_bit_top=0.1", 200_000)
    assert ten.gmse.value == pytest.approx(core.sparse(0.9).value, abs=0.01)
    assert ten.gmse.value < low.gmse.value < ten.gmse.value + 0.001 and low.bits < 0.4 * ten.bits


def test_nf4_has_its_sixteen_levels():
    from hf_efcp.cli.formats import _fp4, _nf4

    levels = _nf4()
    assert len(levels) == 16 and levels[[0, 7, 15]].tolist() == [-1, 0, 1]
    # Table of arXiv 2305.14314, appendix E.
    assert levels[[1, 6, 8, 14]].tolist() == pytest.approx([-0.6961928, -0.0910500, 0.0795803, 0.7229568], abs=1e-6)
    assert _fp4().tolist()[-3:] == pytest.approx([0.5, 4 / 6, 1]) and len(_fp4()) == 15


@pytest.mark.parametrize("text", SHOWN)
def test_every_format_that_is_shown_is_known(text):
    found = parse(text.replace("vq=2x4", "vq=2x1").replace("vq=4x2", "vq=1x2"), 10_000)
    assert 0 <= found.capacity(core.FITS["llama"]) <= 1 and 0 < found.bits <= 32


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["int44"], "format='int44': bits=44: must be an integer from 1 to 12"),
        (["nf5=64"], "unknown format 'nf5=64': did you mean 'nf4=64'?"),
        (["sparse=1.5"], "sparsity=1.5: must be from 0 to 1"),
        (["5:4"], "1 <= n <= m"),
        (["int4*2:4"], "format='int4': only sparse=..., top=..., rank=... and N:M can stand before *"),
        (["int4", "--fit", "lama"], "unknown fit 'lama': did you mean 'llama'?"),
        (["int4", "--samples", "10"], "samples=10: must be an integer >= 10000"),
        (["--model", "nowhere"], "model='nowhere': must be a folder with a config.json"),
        (["int4", "--plot", "x.txt"], "plot='x.txt'"),
        (["vq=1024x1"], "format='vq=1024x1'"),
        (["rank=0/0x768"], "format='rank=0/0x768'"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_input_is_one_line(argv, message, capsys):
    assert_one_line_of_error(capsys, message, "capacity", *argv)


def model(folder, config, **tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def test_a_sparse_model(tmp_path):
    half = torch.randn(10, 40)
    half[:, ::2] = 0
    folder = model(tmp_path / "m", {}, a=half, b=torch.randn(20, 30), bias=torch.zeros(7))
    found = written("capacity", tmp_path, "--model", folder, *FEW)["model"]
    assert found["parameters"] == 1000 and found["zeros"] == 0.2 and found["quantization"] is None
    assert found["capacity"] == pytest.approx(0.4 * core.capacity(core.sparse(0.5).value) + 0.6, abs=1e-9)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4=64"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "window_int8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "minmax4=128"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "minmax4=4096"),
    ],
)
def test_a_quantized_model(tmp_path, config, name):
    folder = model(tmp_path / "m", {"quantization_config": config}, a=torch.zeros(4, 4, dtype=torch.uint8))
    found = written("capacity", tmp_path, "--model", folder, *FEW)["model"]
    assert found["quantization"] == name
    assert found["capacity"] == pytest.approx(parse(name, 10_000).capacity(core.FITS["llama"]), abs=1e-12)


def test_a_gptq_checkpoint_counts_parameters_and_not_codes(tmp_path):
    """A layer of 32 x 8 in 4 bits, whose codes are 4 x 8 integers, and an embedding that is not quantized."""
    layer = {"a.qweight": torch.zeros(4, 8, dtype=torch.int32), "a.scales": torch.ones(1, 8), "a.qzeros": torch.zeros(1, 1).int()}
    folder = model(tmp_path / "m", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, e=torch.ones(16, 8), **layer)
    found = written("capacity", tmp_path, "--model", folder, "--fit", "olmo2", *FEW)["model"]
    fit = core.FITS["olmo2"]
    quantized = parse("minmax4=4096", 10_000).capacity(fit)
    assert found["parameters"] == 32 * 8 + 16 * 8
    assert found["capacity"] == pytest.approx((2 * quantized + fit.L) / 3, abs=1e-12)


def test_thin_matrices_are_stored_at_another_rank_or_whole():
    defaults = {"lr": 1e-4, **optim_defaults("efcp_lowrank_mfac")}
    assert dict(of_optimizer("efcp_lowrank_mfac", defaults, (8, 768)))["window"].startswith("rank=2/8x768*")
    assert "rank" not in dict(of_optimizer("efcp_lowrank_mfac", defaults, (4, 768)))["window"]


def test_a_quantization_that_is_not_known(tmp_path, capsys):
    folder = model(tmp_path / "m", {"quantization_config": {"quant_method": "hqq"}}, a=torch.zeros(4, 4))
    assert_one_line_of_error(capsys, "quantization_config: 'hqq' is not known", "capacity", "--model", folder)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["capacity", "int4", "2:4", "2:4*int4", "--plot", str(tmp_path / "c.png"), *FEW]) == 0
    assert (tmp_path / "c.png").stat().st_size > 5000


@pytest.mark.parametrize("name", list_optimizers())
def test_estimate_has_capacities_beside_bytes(name):
    for _, text in of_optimizer(name, {"lr": 1e-4, **optim_defaults(name)}, (768, 3072)):
        assert 0 <= parse(text, 10_000).capacity(core.FITS["llama"]) <= 1


def test_estimate_capacity(tmp_path, capsys):
    shapes = write_shapes(tmp_path, {"a": [64, 96], "b": [64, 96], "c": [10]})
    flags = ("--optim", "efcp_lowrank_mfac,efcp_sparse_mfac", "--optim_args")
    args = ("window_format=low_bit,error_format=int4,rank=2,density=0.05", "--capacity")
    found = written("estimate", tmp_path, shapes, *flags, *args)
    rows = {(r["optimizer"], r["state"]): r for r in found["capacity"]}
    assert {r["format"] for r in rows.values()} == {"rank=2/64x96*window_int8", "low_bit_top=0.05", "error_int4"}
    assert len(rows) == 4
    for (name, kind), row in rows.items():
        assert row["bytes"] == found["optimizers"][name]["bytes"][kind] > 0
    assert "capacity of an entry" in capsys.readouterr().out
