"""The stock Trainer trains with every registered name."""

import math

import pytest
from transformers import Trainer

from hf_efcp.registry import get_optimizer_info
from tests.reference import args_known_to, few_names, info, rate_of_adam


@pytest.mark.parametrize("name", few_names())
def test_training_lowers_the_loss(name, make_args, tiny_bert, token_data):
    options = args_known_to(name, "window_size=8,momentum=1e-3,adam_lr_ratio=0.2")
    if info(name).compression == "sparse" and not info(name).windowed:
        options += ",density=0.1"  # a coordinate moves only where it is kept: not once in 40 steps

    def run(learning_rate):
        args = make_args(
            optim=name,
            optim_args=options,
            learning_rate=learning_rate,
            weight_decay=0.01,
            max_steps=40,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=128,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_bert, args, train_dataset=token_data, eval_dataset=token_data)
        trainer.train()
        return trainer, trainer.evaluate()["eval_loss"]

    # lr = 0 first: it must leave the model as it is, and shows that the bound below can be missed.
    _, untrained = run(0.0)
    trainer, trained = run(rate_of_adam(name, 1e-2))
    assert untrained == pytest.approx(math.log(2), abs=0.1)
    assert trained < 0.2 * untrained

    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is get_optimizer_info(name).cls
    assert getattr(optimizer.options, "window_size", 8) == 8
    assert getattr(optimizer.options, "momentum", 1e-3) == 1e-3
    decay = {(group["kind"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decay == {("embedding", 0.01), ("matrix", 0.01), ("vector", 0.0)}
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == pytest.approx(rate_of_adam(name, 1e-2), rel=0.05)
    assert logged == sorted(logged, reverse=True)
