"""The runner and the console script."""

import dataclasses
import json
import sys

import pytest

from hf_efcp import list_optimizers
from hf_efcp.cli.main import main
from hf_efcp.options import GroupOptions
from hf_efcp.registry import get_optimizer_info

# Written like the text classification example of transformers; it knows nothing of hf_efcp.
TRAINING_SCRIPT = """
import sys
from dataclasses import dataclass

from toy_tokenizer import encode
from datasets import load_dataset
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class DataArguments:
    train_file: str


def main():
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_dataset("csv", data_files={"train": data_args.train_file}, cache_dir=args.output_dir)["train"]
    data = data.map(lambda row: {"input_ids": encode(row["sentence"])}, remove_columns=["sentence"])
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=data)
    trainer.save_metrics("train", trainer.train().metrics)
    trainer.save_state()
    assert type(trainer.optimizer.optimizer).__name__ == "LowRankMFAC"


if __name__ == "__main__":
    main()
"""

TOKENIZER = """
def encode(sentence):
    return [ord(letter) - ord("a") for letter in sentence]
"""

SHOW = "import sys\nprint(sys.argv[1:], sys.path[0], __name__, 'hf_efcp' in sys.modules)\n"


@pytest.fixture
def show(tmp_path):
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "show.py"
    script.write_text(SHOW)
    return script


@pytest.fixture
def training_script(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "toy_tokenizer.py").write_text(TOKENIZER)
    (folder / "train.py").write_text(TRAINING_SCRIPT)
    halves = ("abcdefghijklm", "nopqrstuvwxyz")
    rows = [f"{halves[i % 2][i % 8 : i % 8 + 5]},{i % 2}" for i in range(80)]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    return folder / "train.py"


def train(python, script, tmp_path, *argv):
    common = ["--train_file", "train.csv", "--output_dir", "out", "--use_cpu", "--report_to", "none", "--max_steps", "20"]
    common += ["--learning_rate", "5e-3", "--per_device_train_batch_size", "16", "--logging_steps", "1", "--save_steps", "20"]
    return python("-m", "hf_efcp.run", script, *common, *argv)


def test_an_unmodified_script_trains(python, training_script, tmp_path):
    argv = ["--optim", "efcp_lowrank_mfac", "--optim_args", "rank=4,window_size=32"]
    done = train(python, training_script, tmp_path, *argv)
    assert done.returncode == 0, done.stderr
    losses = [e["loss"] for e in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((tmp_path / "out/train_results.json").read_text())["train_loss"] < losses[0]
    assert (tmp_path / "out/checkpoint-20/optimizer.pt").exists()


def test_a_bad_option_is_one_line_and_writes_nothing(python, training_script, tmp_path):
    done = train(python, training_script, tmp_path, "--optim", "efcp_lowrank_mfac", "--optim_args", "rnk=4")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "Warning" not in line][-1].startswith("error: unknown option 'rnk'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_arguments_and_paths_are_those_of_the_script(python, show):
    expected = f"['--a', 'b,c=1', '-m', 'x y', '--help'] {show.parent} __main__ True\n"
    argv = ["--a", "b,c=1", "-m", "x y", "--help"]
    for runner in (["hf_efcp.run"], ["hf_efcp.cli.main", "run"]):
        done = python("-m", *runner, "scripts/show.py", *argv)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_a_module(python, show, tmp_path):
    done = python("-m", "hf_efcp.run", "-m", "scripts.show", "--a")
    assert (done.returncode, done.stdout) == (0, f"['--a'] {tmp_path} __main__ True\n"), done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "1"],
        pytest.param(
            ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, python, show):
    done = python("-m", *launcher, "-m", "hf_efcp.run", show, "--optim_args", "rank=4,window_size=32")
    assert (done.returncode, done.stdout) == (
        0,
        f"['--optim_args', 'rank=4,window_size=32'] {show.parent} __main__ True\n",
    ), done.stderr


def test_the_scripts_own_errors_pass_through(python, tmp_path):
    (tmp_path / "fails.py").write_text("def f():\n    raise KeyError('mine')\n\n\nf()\n")
    done = python("-m", "hf_efcp.run", "fails.py")
    assert done.returncode == 1
    plain = python("fails.py").stderr
    assert done.stderr.startswith(plain.splitlines()[0])
    assert done.stderr.endswith("".join(plain.splitlines(keepends=True)[1:]))
    (tmp_path / "exits.py").write_text("raise SystemExit(7)\n")
    assert python("-m", "hf_efcp.run", "exits.py").returncode == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a script, -m module or a program, got nothing"),
        (["-m"], "expected a module after -m, got nothing"),
        (["--optim", "x"], "expected a script, -m module or a program, got '--optim'"),
        (["missing.py", "--optim", "x"], "no such script: missing.py"),
        (["."], "no such script: ."),
        (["-m", "no_such_module"], "no such module, or nothing to run in it: no_such_module"),
        (["-m", "json.no_such_module"], "no such module, or nothing to run in it: json.no_such_module"),
        (["-m", "email"], "no such module, or nothing to run in it: email"),
    ],
)
def test_usage_errors(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # the runner replaces the first one
    assert main(["run", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")


def test_help(capsys):
    assert main(["run", "--help"]) == 0
    assert "hf-efcp run script.py" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "list the optimizers that --optim takes" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["lst"], ["list", "--option", "extra", "more"]])
def test_wrong_commands(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "hf-efcp" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list_optimizers(with_description=True)
    assert main(["list", "*lowrank*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_optimizers("*lowrank*")
    assert main(["list", "adam*"]) == 2
    assert "no optimizer matches 'adam*'; there are: efcp_" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_optimizers())
def test_list_options(name, capsys):
    info = get_optimizer_info(name)
    assert main(["list", name, "--options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert set(rows) == set(info.options())
    fields = {f.name: f for t in (GroupOptions, info.cls.options_type) for f in dataclasses.fields(t)}
    for option, row in rows.items():
        assert fields[option].metadata["help"] in row
    size = next(option for option in ("window_size", "rank", "block_size") if option in info.options())
    measured = info.cls.measured.get(size, fields[size].default)
    assert rows[size].split()[:4] == [size, "int", str(fields[size].default), str(measured)]
    assert rows["preset"].split()[1:4] == ["str", "paper", "measured"] and rows["shard"].split()[1:4] == ["str", "off", "auto"]
    assert "dtype or none" in rows.get("error_dtype", "dtype or none")
    assert ("update_rms" in rows) == info.windowed and "float or none" in rows.get("update_rms", "float or none")
    assert "--learning_rate" in rows["lr"]
