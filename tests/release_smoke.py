"""What tests/release.py runs in a fresh environment: one step in plain torch, two of Trainer; then one line with all versions."""

import os
import platform
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_efcp


def main() -> None:
    assert hf_efcp.__version__ == sys.argv[1], hf_efcp.__version__
    assert Path(sys.prefix) in Path(hf_efcp.__file__).parents, hf_efcp.__file__
    weights = torch.nn.Linear(32, 16)
    os.environ["HF_EFCP_KERNELS"] = "0"  # the compiler takes a minute for all of them
    for name in hf_efcp.list_optimizers():
        optimizer = hf_efcp.create_optimizer(name, weights, lr=1e-2, **hf_efcp.optim_defaults(name))
        before = weights.weight.detach().clone()
        weights(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(before, weights.weight) and weights.weight.isfinite().all(), name
        optimizer.zero_grad()
    del os.environ["HF_EFCP_KERNELS"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    data = [{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, optim="efcp_lowrank_mfac", max_steps=2, report_to="none", use_cpu=True)
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, hf_efcp.LowRankMFAC) and trainer.state.global_step == 2
    versions = [f"{module.__name__} {module.__version__}" for module in (hf_efcp, torch, transformers, accelerate)]
    print("works:", ", ".join([*versions, f"Python {platform.python_version()}"]))


if __name__ == "__main__":
    main()
