"""IOBSCallback: prunes under Trainer, holds the zeros, goes on after a resume bit for bit."""

import copy

import pytest
import torch
from transformers import Trainer

from hf_efcp import OptionError
from hf_efcp.pruning import IOBSCallback, Masks
from tests.integration.test_resume import differences, everything
from tests.reference import NAMES, few, names

STEPS, SAVED = 8, 5


@pytest.fixture
def make_trainer(make_args, tiny_bert, token_data, tmp_path):
    def make(folder, callback, **given):
        arguments = {
            "output_dir": str(tmp_path / folder),
            "learning_rate": 3e-3,
            "max_steps": STEPS,
            "save_steps": SAVED,
            "logging_steps": 1,
            "per_device_train_batch_size": 16,
            "disable_tqdm": True,
        }
        args = make_args(**{**arguments, **given})
        return Trainer(copy.deepcopy(tiny_bert), args, train_dataset=token_data, callbacks=[callback])

    return make


def callback(**given):
    return IOBSCallback(**{"sparsity": 0.75, "calibration_batches": 2, "iterations": 2, **given})


@pytest.mark.parametrize("name", ["adamw_torch", *few(NAMES, names(windowed=True)[0].__eq__)])
def test_zeros_hold_and_a_resumed_run_is_the_uninterrupted_one(name, make_trainer, tmp_path):
    whole, resumed = callback(start_step=2), callback(start_step=2)
    first, second = make_trainer("out", whole, optim=name), make_trainer("other", resumed, optim=name)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}"))
    assert whole.masks.are_zero() and whole.masks.sparsity() == pytest.approx(0.75, abs=0.01)
    assert differences(everything(first), everything(second)) == []
    assert all(torch.equal(mask, resumed.masks.keep[n]) for n, mask in whole.masks.keep.items())


def test_the_order_of_training_and_its_random_numbers_stay(make_trainer):
    """Pruning nothing is training as ever."""
    losses = []
    for i, given in enumerate([{"sparsity": 0.0, "method": "magnitude"}, {"sparsity": 0.0, "start_step": 100}]):
        trainer = make_trainer(f"out{i}", callback(**given), learning_rate=0.0)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_stages_rise_to_the_sparsity(make_trainer, tmp_path):
    pruned = callback(start_step=1, stages=3, stage_steps=2)
    make_trainer("out", pruned, save_steps=1, max_steps=5, optim="adamw_torch").train()
    shares = {
        step: Masks.load(pruned_model, tmp_path / f"out/checkpoint-{step}").sparsity()
        for step in (1, 2, 3, 5)
        for pruned_model in [make_trainer("unused", callback()).model]
    }
    expected = [0.75 * (1 - (1 - i / 3) ** 3) for i in (1, 1, 2, 3)]
    assert list(shares.values()) == pytest.approx(expected, abs=0.01)
    assert pruned.masks.are_zero()


def test_a_checkpoint_without_masks_has_its_zeros(make_trainer, tmp_path, caplog):
    make_trainer("out", callback()).train()
    (tmp_path / f"out/checkpoint-{SAVED}/pruning_masks.pt").unlink()
    again = callback()
    make_trainer("out", again).train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}"))
    assert again.masks.are_zero() and again.masks.sparsity() == pytest.approx(0.75, abs=0.01)
    assert "a weight that is zero is taken for a pruned one" in caplog.text


def test_the_trainers_own_window_gives_the_curvature(make_trainer, monkeypatch):
    used = []
    monkeypatch.setattr("hf_efcp.pruning.model.filled_window", lambda *given: used.append(given))
    pruned = callback(start_step=3, method="mfac")
    make_trainer("out", pruned, optim="efcp_sparse_mfac", optim_args="window_size=4").train()
    assert not used and pruned.masks.are_zero() and pruned.masks.sparsity() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 0}, "stages=0: must be an integer >= 1"),
        ({"start_step": -1}, "start_step=-1: must be an integer >= 0"),
        ({"sparsity": None, "pattern": "2:4", "stages": 2}, "stages=2: pattern='2:4' has one sparsity"),
        ({"sparsity": 2}, "sparsity=2: must be a number in"),
        ({"suport": "sweep"}, "unknown option 'suport' for IOBSCallback: did you mean 'support'"),
        ({"support": "swep"}, "support='swep': must be sweep or cost"),
    ],
)
def test_mistakes_are_found_before_training(given, message):
    with pytest.raises(OptionError, match=message):
        callback(**given)
