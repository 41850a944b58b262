"""Trainer's own ways of training, interrupted: the resumed run is the uninterrupted one, bit for bit."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, default_data_collator

import hf_efcp
from tests.optim.helpers import count, differences, snapshot

NAMES = hf_efcp.list_optimizers()
few_names = pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
# An epoch is 8 batches: the checkpoint lies inside the second one, and the window has wrapped around.
STEPS, SAVED = 20, 11
OPTIONS = {"optim_args": "window_size=4,momentum=0.5", "learning_rate": 3e-3, "weight_decay": 0.01}
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
            "optim_args": "window_size=4,momentum=0.5",
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


def optimizer_of(trainer):
    return trainer.optimizer.optimizer  # inside accelerate's


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def everything(trainer):
    """Weights, the optimizer's state and groups, and what was logged on the way, without timings."""
    on_the_way = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    logged = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in on_the_way]
    return {**snapshot(optimizer_of(trainer), list(trainer.model.parameters())), "logged": logged}


def assert_resumed(resumed, uninterrupted, checkpoint, steps=STEPS):
    """Train both, the first one from the second one's checkpoint, and compare; `steps` are those the optimizer counts."""
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert differences(everything(uninterrupted), everything(resumed)) == []
    assert count(optimizer_of(resumed)) == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer(name, dtype, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, dtype=dtype) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)


@few_names
@pytest.mark.parametrize("training", TRAINING)
def test_ways_of_training(training, name, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, **TRAINING[training]) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models(backend, make_trainer, checkpoint):
    given = {"torch_compile": True, "torch_compile_backend": backend}
    out, again = (make_trainer(folder, "efcp_lowrank_mfac", **given) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)


@few_names
def test_the_best_model_is_loaded_at_the_end(name, make_trainer, checkpoint):
    given = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED}
    out, again = (make_trainer(folder, name, **given) for folder in ("out", "again"))
    assert_resumed(again, out, checkpoint)
    assert again.state.best_model_checkpoint == out.state.best_model_checkpoint == checkpoint


@few_names
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


@few_names
def test_the_batch_size_that_fits_is_found(name, make_trainer, checkpoint):
    out, again = (make_trainer(folder, name, auto_find_batch_size=True) for folder in ("out", "again"))
    tried, tried_again = limit_memory(out.model, 14, start=4), limit_memory(again.model, 14, start=1)
    # The Trainer starts again with the weights and the optimizer that the three first steps left.
    assert_resumed(again, out, checkpoint, steps=3 + STEPS)
    assert tried[:4] == [16] * 4
    assert max(tried[4:]) == max(tried_again) == 14


@few_names
def test_fp16_with_a_gradient_scaler(name, tiny_bert, token_data):
    """As the Trainer does it on a GPU; on the CPU accelerate refuses fp16."""

    def start():
        model = copy.deepcopy(tiny_bert)
        optimizer = hf_efcp.create_optimizer(name, model, lr=3e-3, window_size=4, update_rms=0.5, error_dtype="bf16")
        return model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)

    def train(model, optimizer, scaler, steps):
        for t in steps:
            with torch.autocast("cpu", torch.float16):
                loss = model(**default_data_collator(token_data[t : t + 16])).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    run = start()
    train(*run, range(SAVED))
    resumed = start()
    for ours, theirs in zip(resumed, copy.deepcopy([part.state_dict() for part in run]), strict=True):
        ours.load_state_dict(theirs)
    train(*run, range(SAVED, STEPS))
    train(*resumed, range(SAVED, STEPS))
    a, b = (snapshot(optimizer, list(model.parameters())) for model, optimizer, _ in (run, resumed))
    assert differences(a, b) == []
    # Some steps overflowed, and the scaler left them out: the optimizer saw no gradient that is not finite.
    assert 4 < count(run[1]) < STEPS
    assert count(run[1], "skipped") == 0


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
