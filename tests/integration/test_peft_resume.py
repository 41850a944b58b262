"""LoRA by PEFT: adapters that are added mid-run, renamed, saved and resumed."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.integration.peft_runs import (
    adapters,
    by_few_names,
    by_name,
    copies,
    lora,
    loss_of,
    make,
    moved,
    options,
    tiny_llama,
    train,
    with_lora,
)
from tests.optim.helpers import differences, snapshot


@by_name
def test_an_adapter_added_mid_run_joins_the_window(name):
    """Both train on; then the second alone, with the first one frozen."""
    torch.manual_seed(1)
    model = tiny_llama()
    model.add_adapter(lora(target_modules=["q_proj", "v_proj"]), "first")
    first = adapters(model)
    optimizer = make(name, first.values())
    train(model, optimizer, 0, 6)
    kept = snapshot(optimizer, list(first.values()), without=("gram", "step", "skipped"))
    model.add_adapter(lora(target_modules=["down_proj"], r=2), "second")
    second = adapters(model, "second")
    model.set_adapter(["first", "second"])
    for p in [*first.values(), *second.values()]:
        p.requires_grad_(True)
    optimizer.add_param_group({"params": list(second.values()), "lr": 1e-2})
    assert set(optimizer.state) == set(first.values())
    optimizer.memory_footprint()  # allocates the second one's state
    assert set(optimizer.state) == {*first.values(), *second.values()}
    now = snapshot(optimizer, list(first.values()), without=("gram", "step", "skipped"))
    assert [k for k in differences(kept, now) if not k.startswith("group 1")] == []

    before, start = loss_of(model), copies(first | second)
    train(model, optimizer, 6, 16)
    assert moved(start, first | second) == {*first, *second}
    assert loss_of(model) < before and int(next(iter(optimizer.state.values()))["step"]) == 16

    for p in first.values():
        p.requires_grad_(False)
    before, start = loss_of(model), copies(first | second)
    train(model, optimizer, 16, 24)
    assert moved(start, first | second) == set(second)
    assert loss_of(model) < before


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_prefixes_of_names_do_not_matter(name):
    """`base_model.model.`, `_orig_mod.` or no names at all: the same run, and checkpoints that fit one another."""

    def run(wrap, named=True):
        model = with_lora(tiny_llama())
        wrapped = wrap(model)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(name, wrapped if named else params)
        train(model, optimizer, 0, 6)
        return model, optimizer, params

    _, plain, params = run(lambda model: model, named=False)
    expected = snapshot(plain, params)
    for wrap, prefix in (
        (lambda model: model, "base_model.model."),
        (lambda model: nn.ModuleDict({"_orig_mod": model}), "_orig_mod.base_model.model."),  # as torch.compile names it
        (lambda model: model.base_model.model, "model."),
    ):
        model, optimizer, others = run(wrap)
        names = optimizer.param_groups[0]["param_names"]
        assert all(n.startswith(prefix) for n in names)
        found = snapshot(optimizer, others)
        assert [k for k in differences(expected, found) if not k.endswith("param_names")] == []
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer.param_groups[0]["param_names"] == names
        train(model, optimizer, 6, 8)


@by_few_names
def test_a_resumed_lora_run_is_the_uninterrupted_one(name, make_args, tiny_bert, token_data, tmp_path):
    """Bit for bit, with dropout and a module of its own, from Trainer's checkpoint of the adapters."""

    def trainer():
        model = with_lora(copy.deepcopy(tiny_bert), task_type="SEQ_CLS", modules_to_save=["classifier"], lora_dropout=0.1)
        args = make_args(
            optim=name,
            optim_args=options(name),
            learning_rate=5e-3,
            max_steps=9,
            per_device_train_batch_size=16,
            logging_steps=1,
            save_steps=5,
            disable_tqdm=True,
        )
        return Trainer(model, args, train_dataset=token_data)

    def outcome(t):
        return snapshot(t.optimizer.optimizer, list(adapters(t.model).values()))

    whole = trainer()
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 9
    assert differences(outcome(whole), outcome(resumed)) == []
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
