"""Trainer's own ways of training, interrupted: the resumed run is the uninterrupted one, bit for bit."""

import copy
import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_efcp
from hf_efcp.registry import get_optimizer_info
from tests.optim.helpers import count, differences, snapshot
from tests.reference import args_known_to, few_names, names

NAMES = hf_efcp.list_optimizers()
two_names = pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
# An epoch is 8 batches: the checkpoint lies inside the second one, and the window has wrapped around.
STEPS, SAVED = 20, 11
TRAINING = {
    "gradient_accumulation": {"gradient_accumulation_steps": 3},  # 3, 3 and 2 batches an epoch
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.fixture
def make_trainer(make_args, tiny_bert, token_data, tmp_path):
    """A Trainer of a copy of tiny_bert that writes to the given folder of tmp_path."""

    def make(folder, name, dropout=0.1, dtype=torch.float32, **given):
        arguments = {
            "output_dir": str(tmp_path / folder),
            "optim": name,
            "optim_args": args_known_to(name, "window_size=4,momentum=0.5"),
            "learning_rate": 3e-3,
            "weight_decay": 0.01,
            "max_steps": STEPS,
            "save_steps": SAVED,
            "logging_steps": 1,
            "per_device_train_batch_size": 16,
            "disable_tqdm": True,
        }
        model = copy.deepcopy(tiny_bert).to(dtype)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        # The better it is trained, the larger the loss: the first of several checkpoints is the best one.
        wrong = [{**row, "labels": 1 - row["labels"]} for row in token_data[:32]]
        return Trainer(model, make_args(**{**arguments, **given}), train_dataset=token_data, eval_dataset=wrong)

    return make


@pytest.fixture
def checkpoint(tmp_path):
    return str(tmp_path / f"out/checkpoint-{SAVED}")


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_an_optimizer_file_that_is_cut_short_is_named(kept, make_trainer, checkpoint):
    make_trainer("out", NAMES[0], max_steps=SAVED).train()
    file = f"{checkpoint}/optimizer.pt"
    with open(file, "r+b") as f:
        f.truncate(int(kept * f.seek(0, 2)))
    with pytest.raises(hf_efcp.OptionError, match=r"checkpoint-11/optimizer\.pt is damaged or cut short"):
        make_trainer("out", NAMES[0]).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_an_optimizer_is_warned_of(make_trainer, checkpoint, caplog):
    """transformers goes on without a word."""
    make_trainer("out", NAMES[0], max_steps=SAVED, save_only_model=True).train()
    make_trainer("out", NAMES[0], max_steps=SAVED + 1).train(resume_from_checkpoint=checkpoint)
    assert "checkpoint-11 has no optimizer.pt: the optimizer starts anew" in caplog.text


def optimizer_of(trainer):
    return trainer.optimizer.optimizer  # inside accelerate's


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def everything(trainer):
    """Weights, the optimizer's state and groups, and what was logged on the way, without timings."""
    on_the_way = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    logged = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in on_the_way]
    # As text: a NaN, which is what the norm of an overflow is, equals itself.
    return {**snapshot(optimizer_of(trainer), list(trainer.model.parameters())), "logged": json.dumps(logged, sort_keys=True)}


def assert_resumed(resumed, uninterrupted, checkpoint):
    """Train both, the first one from the second one's checkpoint, and compare."""
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert differences(everything(uninterrupted), everything(resumed)) == []


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", few_names())
def test_every_optimizer(name, dtype, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, dtype=dtype) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)
    assert count(optimizer_of(again)) == STEPS


@two_names
@pytest.mark.parametrize("training", TRAINING)
def test_ways_of_training(training, name, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, **TRAINING[training]) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models(backend, make_trainer, checkpoint):
    given = {"torch_compile": True, "torch_compile_backend": backend}
    out, again = (make_trainer(folder, "efcp_lowrank_mfac", **given) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_efcp"]


@two_names
@pytest.mark.parametrize("preset", [None, "paper"])
def test_new_defaults_leave_an_old_run_as_it_was(name, preset, make_trainer, checkpoint, monkeypatch, caplog):
    cls = get_optimizer_info(name).cls
    monkeypatch.setattr(cls, "measured", {"window_size": 32, "update_rms": 0.5, "error_dtype": torch.bfloat16})
    out = make_trainer("out", name, optim_args="momentum=0.5")
    out.train()
    assert said(caplog) == []
    new = {"window_size": 16, "error_dtype": torch.float32, "update_rms": 0.1, "weight_decay_mode": "l2"}
    monkeypatch.setattr(cls, "measured", new)
    again = make_trainer("again", name, optim_args=f"preset={preset}" if preset else None)
    again.train(resume_from_checkpoint=checkpoint)
    assert differences(everything(out), everything(again)) == []
    (line,) = said(caplog)
    assert line.startswith(f"{cls.__name__}: options from the checkpoint: ") and "update_rms=0.5" in line


def test_a_given_option_wins_or_is_refused(make_trainer, checkpoint, caplog):
    make_trainer("out", "efcp_lowrank_mfac").train()
    with pytest.raises(hf_efcp.OptionError, match="checkpoint was made with window_size=4, this optimizer has window_size=5"):
        make_trainer("other", "efcp_lowrank_mfac", optim_args="window_size=5").train(resume_from_checkpoint=checkpoint)
    again = make_trainer("again", "efcp_lowrank_mfac", optim_args="damping=0.7")
    again.train(resume_from_checkpoint=checkpoint)
    assert optimizer_of(again).options.damping == 0.7
    assert "; this run's and not the checkpoint's: damping=0.7 (not " in said(caplog)[-1]


@two_names
def test_the_best_model_is_loaded_at_the_end(name, make_trainer, checkpoint):
    given = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED}
    out, again = (make_trainer(folder, name, **given) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)
    assert again.state.best_model_checkpoint == out.state.best_model_checkpoint == checkpoint


@two_names
def test_a_checkpoint_of_the_model_only_starts_the_optimizer_afresh(name, make_trainer, checkpoint):
    given = {"save_only_model": True, "dropout": 0.0}  # no random state is saved either
    out, again = (make_trainer(folder, name, **given) for folder in ("out", "again"))
    out.train()
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == STEPS
    assert count(optimizer_of(again)) == STEPS - SAVED
    # The weights are the saved ones, so is the loss of the next step; the one after it is another optimizer's.
    assert losses(again)[: SAVED + 1] == losses(out)[: SAVED + 1]
    assert losses(again)[SAVED + 1] != losses(out)[SAVED + 1]


def limit_memory(model, batch_size, start):
    """From the forward pass number `start` on, larger batches fail as on a GPU; returns the sizes that were tried."""
    tried = []

    def check(module, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > batch_size and len(tried) >= start:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return tried


@pytest.mark.parametrize("name", few_names(names(windowed=True)))
def test_the_batch_size_that_fits_is_found(name, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, auto_find_batch_size=True) for folder in ("out", "again"))
    tried, tried_again = limit_memory(out.model, 14, start=4), limit_memory(again.model, 14, start=1)
    # The Trainer starts again with the weights and the optimizer that the three first steps left.
    assert_resumed(again, out, checkpoint)
    assert count(optimizer_of(again)) == 3 + STEPS
    assert tried[:4] == [16] * 4
    assert max(tried[4:]) == max(tried_again) in (8, 14)  # Accelerate before 1.9 halves 16, later ones take 0.9 of it


@two_names
def test_fp16_with_a_gradient_scaler(name, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, fp16=True) for folder in ("out", "again"))
    for trainer in (out, again):  # on the CPU accelerate trains in fp32 and without a scaler
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    assert_resumed(again, out, checkpoint)
    assert again.accelerator.scaler.state_dict() == out.accelerator.scaler.state_dict()
    # The scaler left out the steps that overflowed: the optimizer saw no gradient that is not finite.
    overflows = sum(not math.isfinite(entry["grad_norm"]) for entry in out.state.log_history if "loss" in entry)
    assert overflows >= 3
    assert (count(optimizer_of(out)), count(optimizer_of(out), "skipped")) == (STEPS - overflows, 0)


def test_hyperparameter_search(make_args, tiny_bert, token_data):
    """Trials choose the optimizer and its options; each starts from nothing."""
    optuna = pytest.importorskip("optuna")
    options = {"efcp_lowrank_mfac": "rank=2,window_size=3", "efcp_sparse_ggt": "density=0.1,window_size=4"}
    ran = {}

    class Record(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            used = optimizer.optimizer
            ran[args.optim.value] = type(used), used.options.window_size, count(used)

    def space(trial):
        name = trial.suggest_categorical("optim", list(options))
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        return {"optim": name, "optim_args": options[name], "learning_rate": rate}

    trainer = Trainer(
        args=make_args(max_steps=5, save_strategy="no", disable_tqdm=True),
        model_init=lambda: copy.deepcopy(tiny_bert),
        train_dataset=token_data,
        eval_dataset=token_data[:32],
        callbacks=[Record()],
    )
    sampler = optuna.samplers.GridSampler({"optim": list(options), "learning_rate": [3e-3]}, seed=0)
    trainer.hyperparameter_search(space, lambda metrics: metrics["eval_loss"], 2, backend="optuna", sampler=sampler)
    assert ran == {"efcp_lowrank_mfac": (hf_efcp.LowRankMFAC, 3, 5), "efcp_sparse_ggt": (hf_efcp.SparseGGT, 4, 5)}
