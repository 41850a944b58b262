"""The Accelerate loop: a tiny run end to end, resuming bit for bit, mistakes."""

import json
import os
import subprocess
import sys

import accelerate_loop as recipe
import pytest
import torch
from accelerate import tracking
from safetensors.torch import load_file

import hf_efcp
from hf_efcp.report.read import metrics
from hf_efcp.report.read import read as read_runs
from tests.recipes.helpers import RECIPES
from tests.reference import args_known_to, info, known_to


@pytest.fixture
def dropout_model(tiny_model, tmp_path):
    """The tiny model with dropout: a resumed run must draw the same random numbers."""
    from transformers import AutoTokenizer, BertModel

    folder = str(tmp_path / "dropout")
    model = BertModel.from_pretrained(tiny_model)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def read(path):
    return json.loads(path.read_text())


def same_files(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_trains_evaluates_and_writes(flags, tmp_path, capsys):
    more = ["--num_train_epochs=10", "--logging_steps=4", "--num_warmup_steps=2", "--weight_decay=0.01"]
    results = recipe.main([*flags, *more])
    assert results["eval_accuracy"] == 1.0
    assert (results["train_steps"], results["train_samples"], results["eval_samples"]) == (40, 64, 24)
    out = tmp_path / "out"
    saved = {name: read(out / f"{name}_results.json") for name in ("all", "train", "eval")}
    assert saved["all"] == {**saved["train"], **saved["eval"]} == results
    assert read(out / "config.json")["id2label"] == {"0": "animal", "1": "fruit"}
    state = read(out / "trainer_state.json")
    assert (state["global_step"], state["epoch"], state["batch"]) == (40, 10, 0)
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(4, 41, 4))
    assert logged[0]["learning_rate"] == pytest.approx(5e-3 * 37 / 38)  # step 4's own, two after the warm-up
    assert logged[-1]["efcp_kappa"] >= 1.0
    (run,) = read_runs([out])  # as hf-efcp report reads it: diagnostics are told from metrics
    assert metrics([run]) == ["loss", "eval_loss", "eval_accuracy"] and run.diagnostics["kappa"].last >= 1.0
    assert results["eval_loss"] == [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1]
    printed = capsys.readouterr().out
    for text in ("step 40  epoch 10.00  loss", "efcp_lowrank_mfac on ", "eval accuracy", "bytes per parameter"):
        assert text in printed

    again = recipe.main([*flags, "--model_name_or_path=out", "--max_train_steps=1", "--learning_rate=0", "--output_dir=again"])
    assert again["eval_accuracy"] == 1.0
    assert same_files(out, tmp_path / "again")


@pytest.mark.parametrize("more", [["--optim=efcp_sparse_ggt"], ["--mixed_precision=bf16"], ["--optim=adamw"]], ids=str)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_same_run(flags, dropout_model, tmp_path, more):
    """64 examples are 11 batches and 4 steps an epoch, the last step of 2 batches; step 6 is in the middle of the second."""
    flags = [*flags, *more, f"--model_name_or_path={dropout_model}", "--num_train_epochs=3", "--checkpointing_steps=6"]
    flags += ["--per_device_train_batch_size=6", "--gradient_accumulation_steps=3", "--logging_steps=1", "--num_warmup_steps=2"]
    whole = recipe.main([*flags, "--output_dir=whole"])
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    state = read(checkpoint / "trainer_state.json")
    assert (state["epoch"], state["batch"], state["global_step"]) == (1, 6, 6)

    resumed = recipe.main([*flags, "--output_dir=resumed", f"--resume_from_checkpoint={checkpoint}"])
    assert (whole["train_steps"], resumed["train_steps"]) == (12, 6)
    assert same_files(tmp_path / "whole", tmp_path / "resumed")
    assert not same_files(checkpoint, tmp_path / "whole")
    assert read(tmp_path / "whole" / "trainer_state.json") == read(tmp_path / "resumed" / "trainer_state.json")
    losses = [entry["loss"] for entry in read(tmp_path / "resumed" / "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(set(losses)) == 12
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        assert whole[name] == resumed[name]


@pytest.mark.parametrize("save", ["epoch", "4"])
def test_a_run_resumed_between_two_epochs_is_the_same_run(flags, dropout_model, tmp_path, save):
    """4 steps an epoch: with "4" the checkpoint is written after the epoch's last step, before its evaluation."""
    flags = [*flags, f"--model_name_or_path={dropout_model}", "--num_train_epochs=2", f"--checkpointing_steps={save}"]
    whole = recipe.main([*flags, "--logging_steps=3"])
    state = tmp_path / "out" / "trainer_state.json"
    expected = read(state)
    (tmp_path / "out" / "checkpoint-8").rename(tmp_path / "last")
    resumed = recipe.main([*flags, "--logging_steps=3", "--resume_from_checkpoint=true"])  # the latest: checkpoint-4
    assert read(state) == expected
    assert (whole["train_loss"], whole["eval_loss"]) == (resumed["train_loss"], resumed["eval_loss"])
    assert same_files(tmp_path / "out", tmp_path / "last")


def test_a_finished_run_is_evaluated_again(flags):
    flags = [*flags, "--checkpointing_steps=epoch"]
    whole = recipe.main(flags)
    again = recipe.main([*flags, "--resume_from_checkpoint=true"])
    assert again["train_steps"] == 0
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        assert again[name] == whole[name]


def test_accumulation_is_a_larger_batch(flags, tmp_path):
    parts = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=4", "--output_dir=parts"]
    whole, split = recipe.main([*flags, "--logging_steps=1"]), recipe.main([*flags, *parts, "--logging_steps=1"])
    assert split["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    logs = [read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("out", "parts")]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-2)


@pytest.mark.parametrize("name", hf_efcp.list_optimizers())
def test_the_optimizers_are_those_of_optim(name):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    args = recipe.Arguments(optim=name, optim_args=args_known_to(name, "window_size=8"), learning_rate=3e-4, weight_decay=0.1)
    optimizer = recipe.make_optimizer(model, args)
    expected = {**info(name).cls.measured, "preset": "measured", **known_to(name, {"window_size": 8})}
    assert expected.items() <= vars(optimizer.options).items()
    if info(name).windowed:
        assert {"update_rms", "error_dtype"} <= expected.keys()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(3e-4, 0.1), (3e-4, 0.0)]
    assert optimizer.param_groups[1]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    model[0].weight.requires_grad_(False)
    assert [g["param_names"] for g in recipe.make_optimizer(model, args).param_groups] == [["0.bias", "1.weight", "1.bias"]]


def test_logs_go_to_a_tracker(flags, monkeypatch):
    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, logged = "aim", False, None, []

        def __init__(self, run_name, **kwargs):
            super().__init__()
            self.logged.append(run_name)

        def store_init_configuration(self, values):
            self.logged.append(values["optim"])

        def log(self, values, step):
            self.logged.append((step, sorted(values)))

    # In the place of a known one: not every accelerate takes new names.
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.AIM])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Tracker)
    recipe.main([*flags, "--with_tracking", "--report_to=aim", "--logging_steps=2", "--max_train_steps=2"])
    name, optim, (step, values), last = Tracker.logged
    assert (name, optim, step) == ("accelerate_loop", "efcp_lowrank_mfac", 2)
    assert {"loss", "learning_rate", "grad_norm", "efcp_kappa", "efcp_cosine_rows"} < set(values)
    assert last == (2, ["eval_accuracy", "eval_loss"])


# Launched -----------------------------------------------------------------------------------------------------------------


def launch(folder, processes, *argv):
    """`accelerate launch` of the recipe on CPU processes; returns the finished process."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    path = [str(RECIPES.parent), os.environ.get("PYTHONPATH")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_DATASETS_CACHE": str(folder / "cache")}
    settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += [RECIPES / "accelerate_loop.py", *argv]
    return subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)


def test_accelerate_launch(flags, tmp_path):
    done = launch(tmp_path, 1, *flags, "--max_train_steps=2", "--optim_args=rank=2,window_size=8")
    assert done.returncode == 0, done.stderr
    assert "efcp_lowrank_mfac on " in done.stdout
    assert read(tmp_path / "out" / "all_results.json")["train_steps"] == 2


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(flags, dropout_model, tmp_path):
    """64 examples are 6 batches of 2 x 6 and 3 steps an epoch; step 5 is in the middle of the second one."""
    flags = [*flags, f"--model_name_or_path={dropout_model}", "--num_train_epochs=3", "--checkpointing_steps=5"]
    flags += ["--per_device_train_batch_size=6", "--gradient_accumulation_steps=2", "--logging_steps=1"]
    runs = {"whole": [], "resumed": ["--resume_from_checkpoint=whole/checkpoint-5"]}
    for name, more in runs.items():
        done = launch(tmp_path, 2, *flags, *more, f"--output_dir={name}")
        assert done.returncode == 0, done.stderr
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    state = read(whole / "checkpoint-5" / "trainer_state.json")
    assert (state["epoch"], state["batch"], state["run"]["num_processes"]) == (1, 4, 2)
    assert (read(whole / "all_results.json")["train_steps"], read(resumed / "all_results.json")["train_steps"]) == (9, 4)
    assert read(whole / "trainer_state.json") == read(resumed / "trainer_state.json")
    assert same_files(whole, resumed)


# Mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim=adam"], "--optim adam: no such name: did you mean adamw?"),
        (["--optim_args=rnak=4"], "unknown option 'rnak' for efcp_lowrank_mfac: did you mean 'rank'?"),
        (["--optim_args=lr=1"], "lr=1.0 contradicts learning_rate=0.005; use --learning_rate"),
        (["--optim=adamw", "--optim_args=rank=4"], "--optim_args 'rank=4': adamw takes none"),
        (["--learning_rate=nan"], "--learning_rate nan: must be a finite number >= 0"),
        (["--max_train_steps=0"], "--max_train_steps 0: must be an integer >= 1"),
        (["--checkpointing_steps=0"], "--checkpointing_steps '0': must be"),
        (["--mixed_precision=int3"], "invalid choice: 'int3'"),
        (["--resume_from_checkpoint=true"], "no checkpoint in 'out'"),
        (["--learning_rates=1"], "learning_rates"),
    ],
)
def test_mistakes_end_the_program_and_write_nothing(flags, more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.main([*flags, *more])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="half precision works there")
def test_half_precision_needs_a_gpu(flags, tmp_path):
    with pytest.raises(ValueError, match="fp16"):
        recipe.main([*flags, "--mixed_precision=fp16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed=1"], "made with seed 42, this run has 1"),
        (["--optim=adamw"], "made with optim 'efcp_lowrank_mfac', this run has 'adamw'"),
        (["--per_device_train_batch_size=8"], "made with per_device_train_batch_size 16, this run has 8"),
        (["--max_train_samples=60"], "made with train_samples 64, this run has 60"),
        (["--optim_args=window_size=8"], r"checkpoint was made with window_size=\d+, this optimizer has window_size=8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(flags, more, message, tmp_path):
    recipe.main([*flags, "--output_dir=first", "--max_train_steps=1", "--checkpointing_steps=1"])
    with pytest.raises(ValueError, match=message):
        recipe.main([*flags, *more, "--resume_from_checkpoint=first/checkpoint-1"])
    assert not (tmp_path / "out").exists()
