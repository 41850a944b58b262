"""EFCPTrainer, its mixin under other trainers, and the callback."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainerCallback,
)

import hf_efcp
from hf_efcp import EFCPCallback, EFCPTrainer, EFCPTrainerMixin, EFCPTrainingArguments
from tests.reference import each, has_error, info, known_to

by_name = pytest.mark.parametrize("name", each())


class Recorder(TrainerCallback):
    """Stands for a reporter: keeps what it is given to report."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def make(tmp_path):
    def make(**given):
        own = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        few = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "efcp_window_size": 4}
        return EFCPTrainingArguments(**{**own, **few, **given})

    return make


@by_name
def test_diagnostics_are_in_the_history_and_reach_every_reporter(name, make, tiny_bert, token_data):
    reporter = Recorder()
    figure = "efcp_kappa" if info(name).windowed else "efcp_error_norm" if has_error(name) else "efcp_step"
    args = make(optim=name, efcp_window_size=known_to(name, {"window_size": 4}).get("window_size"))
    trainer = EFCPTrainer(tiny_bert, args, train_dataset=token_data, callbacks=[reporter])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["efcp_step"] for entry in history] == [2, 4]
    assert all(entry[figure] > 0 and entry["efcp_skipped_steps"] == 0 for entry in history)
    assert [log[figure] for log in reporter.logs if "loss" in log] == [entry[figure] for entry in history]
    # The summary at the end is no training log.
    assert not any(key.startswith("efcp_") for key in trainer.state.log_history[-1])


def test_the_callback_alone_serves_the_stock_trainer(make, tiny_bert, token_data):
    later = Recorder()
    trainer = Trainer(tiny_bert, make(), train_dataset=token_data, callbacks=[EFCPCallback(), later])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["efcp_rows"] for entry in history] == [2, 4]
    assert [log["efcp_rows"] for log in later.logs if "loss" in log] == [2, 4]


def test_the_callback_is_there_once(make, tiny_bert):
    trainer = EFCPTrainer(tiny_bert, make(), callbacks=[EFCPCallback()])
    assert sum(isinstance(c, EFCPCallback) for c in trainer.callback_handler.callbacks) == 1


def test_other_optimizers_train_as_ever(make, tiny_bert, token_data):
    args = make(optim="adamw_torch", efcp_window_size=None)
    trainer = EFCPTrainer(tiny_bert, args, train_dataset=token_data)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert not any(key.startswith("efcp_") for entry in trainer.state.log_history for key in entry)


def test_an_optimizer_of_ones_own_is_kept(make, tiny_bert, token_data):
    own = hf_efcp.SparseGGT(tiny_bert.parameters(), lr=1e-3, window_size=2)
    trainer = EFCPTrainer(tiny_bert, make(), train_dataset=token_data, optimizers=(own, None))
    trainer.train()
    assert trainer.optimizer.optimizer is own
    assert "efcp_kappa" in trainer.state.log_history[0]


def test_decay_follows_the_trainers_own_rule(make, tiny_bert):
    class NoDecayForQueries(EFCPTrainer):
        def get_decay_parameter_names(self, model):
            return [n for n in super().get_decay_parameter_names(model) if "query" not in n]

    optimizer = NoDecayForQueries(tiny_bert, make(weight_decay=0.1)).create_optimizer()
    decayed = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert any("key.weight" in n for n in decayed)
    assert not any("query" in n for n in decayed)


def test_it_trains_exactly_as_the_stock_trainer(make, tiny_bert, token_data):
    start = {n: p.detach().clone() for n, p in tiny_bert.named_parameters()}

    def run(cls):
        tiny_bert.load_state_dict(start, strict=False)
        trainer = cls(tiny_bert, make(), train_dataset=token_data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, [p.detach().clone() for p in tiny_bert.parameters()]

    (losses, params), (others_losses, others) = run(EFCPTrainer), run(Trainer)
    assert losses == others_losses
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("keywords", [True, False])
def test_with_a_trainer_that_takes_more_before_its_arguments(keywords, make, tiny_bert):
    class HasReference(Trainer):  # as TRL's DPOTrainer and GRPOTrainer
        def __init__(self, model, reference=None, args=None, **kwargs):
            super().__init__(model, args, **kwargs)
            self.reference = reference

    class EFCPHasReference(EFCPTrainerMixin, HasReference):
        pass

    def build(args):
        return EFCPHasReference(model=tiny_bert, args=args) if keywords else EFCPHasReference(tiny_bert, "other", args)

    args = make()
    trainer = build(args)
    assert (trainer.args, trainer.reference) == (args, None if keywords else "other")
    with pytest.raises(hf_efcp.OptionError, match="'quary' matches no module"):
        build(make(optim_target_modules="quary"))


def test_with_seq2seq_trainer(tmp_path):
    class EFCPSeq2SeqTrainer(EFCPTrainerMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    tokens = torch.arange(8) + 2
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "out"),
        optim="efcp_lowrank_mfac",
        learning_rate=5e-3,
        max_steps=20,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        predict_with_generate=True,
        generation_max_length=8,
        disable_tqdm=True,
    )
    data = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}] * 32
    trainer = EFCPSeq2SeqTrainer(AutoModelForSeq2SeqLM.from_config(config), args, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert "efcp_kappa" in trainer.state.log_history[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]


def test_with_sft_trainer_of_trl(tmp_path):
    trl = pytest.importorskip("trl")

    class EFCPSFTTrainer(EFCPTrainerMixin, trl.SFTTrainer):
        pass

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=1, **sizes))
    args = trl.SFTConfig(
        str(tmp_path / "out"),
        optim="efcp_sparse_mfac",
        learning_rate=5e-3,
        max_steps=20,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=16,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"text": [" ".join(words)] * 32})
    trainer = EFCPSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert "efcp_kappa" in trainer.state.log_history[0]


def test_the_names_are_found_where_the_contract_has_them():
    assert {"EFCPTrainer", "EFCPTrainerMixin", "EFCPTrainingArguments", "EFCPCallback"} <= set(dir(hf_efcp)) & set(
        hf_efcp.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'EFCPTrainr'"):
        _ = hf_efcp.EFCPTrainr


def test_a_non_finite_loss_is_seen_in_the_logs(make, token_data):
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 2), 0

        def forward(self, input_ids, labels):
            self.calls += 1
            logits = self.linear(input_ids.float())
            loss = nn.functional.cross_entropy(logits, labels) * (float("nan") if self.calls == 3 else 1)
            return {"loss": loss, "logits": logits}

    args = make(per_device_train_batch_size=16, max_steps=4, logging_steps=4, max_grad_norm=0.0)
    trainer = EFCPTrainer(Explodes(), args, train_dataset=token_data)
    with pytest.warns(RuntimeWarning, match="not finite"):
        trainer.train()
    assert trainer.state.log_history[0]["efcp_skipped_steps"] == 1


def test_hyperparameter_search_over_the_fields(make, tiny_bert, token_data):
    pytest.importorskip("optuna")
    start = {n: p.detach().clone() for n, p in tiny_bert.state_dict().items()}
    ranks = []

    class Watching(EFCPTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            ranks.append(optimizer.options.rank)
            return optimizer

    def model_init():
        tiny_bert.load_state_dict(start)
        return tiny_bert

    trainer = Watching(model_init=model_init, args=make(), train_dataset=token_data, eval_dataset=token_data[:16])
    best = trainer.hyperparameter_search(
        lambda trial: {"efcp_rank": trial.suggest_categorical("efcp_rank", [1, 2])}, n_trials=3, backend="optuna"
    )
    assert best.hyperparameters["efcp_rank"] in (1, 2)
    assert len(ranks) == 3
    assert set(ranks) <= {1, 2}


def test_without_arguments_it_trains_with_ours(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert EFCPTrainer(tiny_bert).args.optim == "efcp_lowrank_mfac"


def test_another_optimizer_is_told_of(make, tiny_bert, caplog):
    EFCPTrainer(tiny_bert, make(optim="adamw_torch", efcp_window_size=None))
    assert "optim=adamw_torch is not one of hf_efcp's" in caplog.text
