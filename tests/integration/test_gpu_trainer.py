"""Trainer on a GPU: it trains, and resumes to the bit, with steps by a CUDA graph as they are by default. By hand: -m gpu."""

import logging

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_efcp
from hf_efcp.engine import graph
from tests.reference import NAMES, info, names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
STEPS, SAVED = 16, 8


class Sentences(torch.utils.data.Dataset):
    """Tokens whose class is which of two of them there are more of."""

    def __init__(self, number=256, length=24):
        self.tokens = torch.randint(2, 4, (number, length), generator=torch.Generator().manual_seed(0))
        self.labels = (self.tokens.eq(2).sum(1) > length // 2).long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def trained(folder, name, resume=None, **arguments):
    """The model and the losses of a run, whole or from a checkpoint on."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    args = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=SAVED, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
        optim=name, report_to=[], seed=0, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {key: value.clone() for key, value in model.state_dict().items()}, losses, trainer.optimizer


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_and_resumes_to_the_bit(name, precision, tmp_path, caplog):
    hf_efcp.register()
    with caplog.at_level(logging.DEBUG, "hf_efcp"):
        whole, losses, optimizer = trained(tmp_path, name, **precision)
    assert sum(losses[-4:]) < (0.97 if name in names(family="mfac") else 1.1) * sum(losses[:4])
    inner = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    by_graph = inner.builder.graph._graph is not None
    assert by_graph == (name in names(family="mfac")), caplog.text
    resumed, _, _ = trained(tmp_path, name, resume=str(tmp_path / f"checkpoint-{SAVED}"), **precision)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", names(family="mfac"))
def test_a_graph_is_bit_for_bit_what_a_step_is(name, monkeypatch):
    """BERT-base, embeddings of 4,096 words: else a run that is resumed, and begins without a graph, would differ."""
    shapes = [(4096, 768), (512, 768), *[(768, 768)] * 8, *[(3072, 768)] * 2, *[(768, 3072)] * 2, *[(768,)] * 9, *[(3072,)] * 2]
    results = []
    for most in (0, 8):
        monkeypatch.setattr(graph, "_MOST", most)
        generator = torch.Generator("cuda").manual_seed(0)
        params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator, device="cuda")) for shape in shapes]
        optimizer = info(name).cls(params, lr=1e-3, window_size=4, preset="measured")
        for _ in range(10):
            for p in params:
                p.grad = 0.01 * torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        assert (optimizer.builder.graph._graph is not None) == bool(most)
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
