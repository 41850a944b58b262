"""The model card says how our optimizer was set and what its state took; other optimizers' cards stay as they are."""

import pytest
from transformers import Trainer

from hf_efcp.registry import list_optimizers
from tests.reference import args_known_to

NAMES = list_optimizers()


def card(make_args, model, data, tmp_path, **given):
    args = make_args(max_steps=1, save_strategy="no", disable_tqdm=True, **given)
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    return trainer, {line[2:].partition(": ")[0]: line.partition(": ")[2] for line in lines if line.startswith("- ")}


@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_ours(name, make_args, tiny_bert, token_data, tmp_path):
    options = args_known_to(name, "window_size=5") or "beta1=0.8"
    trainer, found = card(make_args, tiny_bert, token_data, tmp_path, optim=name, optim_args=options)
    assert found["optimizer"].startswith(f"{name} of hf_efcp ") and options in found["optimizer"]
    total = sum(trainer.optimizer.memory_footprint().values())
    per_parameter = total / sum(p.numel() for p in tiny_bert.parameters())
    assert found["optimizer_state"].endswith(f"{per_parameter:.2f} bytes per trained parameter")


def test_another_optimizer(make_args, tiny_bert, token_data, tmp_path):
    _, found = card(make_args, tiny_bert, token_data, tmp_path, optim="adamw_torch")
    assert "hf_efcp" not in found["optimizer"] and "optimizer_state" not in found
