"""`hf-efcp advise`: what it suggests fits, costs what estimate says, and is a command that works; what fails is warned of."""

import re
import shlex

import pytest

from hf_efcp.cli import advise
from hf_efcp.cli.main import main
from hf_efcp.options import as_text
from hf_efcp.registry import all_optimizers
from tests.cli.helpers import assert_one_line_of_error, write_shapes, written
from tests.reference import names

FIRST = names(compression="low rank")[0]
SHAPES = {f"layers.{i}.self_attn.{n}_proj.weight": [300, 256] for i in range(4) for n in "qkvo"}


@pytest.fixture
def shapes(tmp_path):
    return write_shapes(tmp_path, SHAPES)


def advice(capsys, *args):
    assert main(["advise", *map(str, args)]) == 0
    return capsys.readouterr().out


def command(text):
    (line,) = re.findall(r"^    (.*--optim .*)$", text, re.MULTILINE)
    return shlex.split(line)


def test_the_defaults_where_they_fit(shapes, tmp_path, capsys):
    text = advice(capsys, shapes, "--gpu", "24GiB", "--task", "sft")
    assert command(text)[3:] == ["--optim", FIRST, "--learning_rate", advise.TASKS["sft"].learning_rate]
    entry = written("estimate", tmp_path, shapes, "--optim", FIRST)["optimizers"][FIRST]
    assert f"{entry['bytes_per_parameter']:.2f} |" in text and "Known to fail" not in text


def test_fewer_bits_where_memory_is_short(shapes, tmp_path, capsys):
    def needs(*args):
        return written("estimate", tmp_path, shapes, "--optim", FIRST, *args)["optimizers"][FIRST]["needs"]

    formats = [",".join(f"{k}={as_text(v)}" for k, v in one.items()) for one in advise._FORMATS[1:]]
    default, *small = [needs(), *(needs("--optim_args", one) for one in formats)]
    assert default > small[0] > small[1]
    for args, size in zip(formats, small, strict=True):
        text = advice(capsys, shapes, "--reserve", "0", "--gpu", f"{size}")
        assert command(text)[command(text).index("--optim_args") + 1] == args
        assert "which is too much" in text


def test_several_gpus_share_the_state_or_all(shapes, tmp_path, capsys):
    assert "--multi_gpu" in command(advice(capsys, shapes, "--gpu", "24GiB", "--num_processes", "2"))
    size = written("estimate", tmp_path, shapes, "--optim", FIRST, "--num_processes", "4", "--fsdp")["optimizers"][FIRST]["needs"]
    text = advice(capsys, shapes, "--gpu", f"{size}", "--reserve", "0", "--num_processes", "4")
    assert "--fsdp_version" in command(text) and "it divides parameters" in text


def test_nothing_fits(shapes, capsys):
    text = advice(capsys, shapes, "--gpu", "100KiB")
    assert "Nothing fits" in text and "--dtype bfloat16" in text and "--task lora" in text and "--num_processes 2" in text


def test_lora_counts_the_adapters_alone(shapes, tmp_path, capsys):
    text = advice(capsys, shapes, "--task", "lora", "--lora_r", "4")
    adapters = [[4, 256] if name == "A" else [300, 4] for i in range(4) for _ in "qv" for name in "AB"]
    (tmp_path / "adapters").mkdir()
    file = write_shapes(tmp_path / "adapters", adapters)
    entry = written("estimate", tmp_path, file, "--optim", FIRST)["optimizers"][FIRST]
    assert f"{entry['bytes_per_parameter']:.2f} |" in text
    capsys.readouterr()
    assert_one_line_of_error(capsys, "no matrix to adapt", "advise", write_shapes(tmp_path, [[8, 8]]), "--task", "lora")


def test_experts_get_a_sparse_window(tmp_path, capsys):
    file = write_shapes(tmp_path, {"experts.gate": [8, 64, 32]})
    assert command(advice(capsys, file))[4] == names(compression="sparse")[0]
    assert "Take efcp_sparse" in advice(capsys, file, "--optim", FIRST)


@pytest.mark.parametrize(
    "args",
    ["scope=layer,rms_mode=adam", "update_rms=none", "window_momentum=0", "metric=none --task pretraining"],
)
def test_what_fails_is_warned_of(args, shapes, capsys):
    options, *more = args.split()
    text = advice(capsys, shapes, "--optim_args", options, *more)
    assert options.partition(",")[0] in text.partition("Known to fail:")[2]


@pytest.mark.parametrize("info", all_optimizers(), ids=lambda info: info.name)
def test_every_name_has_an_answer(info, shapes, capsys):
    assert command(advice(capsys, shapes, "--optim", info.name))[4] == info.name


BAD = {
    "--task sfd": "unknown task 'sfd': did you mean 'sft'?",
    "--reserve 1": "reserve=1.0: must be a number in [0, 1)",
    "--num_processes 0": "num_processes=0: must be an integer >= 1",
    "--optim_args windowsize=3": "did you mean 'window_size'?",
    "--gpu h1000": "unknown gpu 'h1000'",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, shapes, capsys):
    assert_one_line_of_error(capsys, BAD[flags], "advise", shapes, *flags.split())
