"""LoRA by PEFT: adapters of any type on frozen bases of any type."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, PromptTuningConfig, get_peft_model
from transformers import Trainer

from tests.integration.peft_runs import (
    LOSSY,
    QuantizedLinear,
    adapters,
    by_few_names,
    by_name,
    copies,
    lora,
    loss_of,
    make,
    moved,
    options,
    state_dtypes,
    tiny_llama,
    train,
    with_lora,
)
from tests.optim.helpers import all_finite, differences, snapshot
from tests.reference import info, known_to, rate_of_adam

# Training -----------------------------------------------------------------------------------------------------------------


@by_few_names
def test_bf16_llama_keeps_every_dtype_through_prepare_save_and_load(name, tmp_path):
    """And goes on from the saved state bit for bit."""

    def prepared():
        model = with_lora(tiny_llama(torch.bfloat16))
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, make(name, model))

    def check_dtypes(optimizer):
        found = {(key, value.dtype) for entry in optimizer.state.values() for key, value in entry.items()}
        assert {key for key, _ in found} >= {"gram" if windowed else "counter", "step", *expected[info(name).compression]}
        assert found <= set(state_dtypes(name).items())

    windowed = info(name).windowed
    low_rank = {"window_p", "error"} if windowed else {"error"}
    expected = {"low rank": low_rank, "sparse": {"window_indices", "error"}, "dense": {"window_rows"}}
    accelerator, model, optimizer = prepared()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before = loss_of(model)
    train(model, optimizer, 0, 30)
    assert loss_of(model) < 0.8 * before
    check_dtypes(optimizer)
    accelerator.save_state(tmp_path)

    accelerator, other, resumed = prepared()
    accelerator.load_state(tmp_path)
    check_dtypes(resumed)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 30, 36)
        check_dtypes(o)
    states = [snapshot(o.optimizer, list(adapters(m).values())) for m, o in ((model, optimizer), (other, resumed))]
    assert differences(*states) == []


@pytest.mark.parametrize("scope", ["model", "layer"])
@by_name
def test_b_of_zeros_moves_first_and_then_a(name, scope):
    model = with_lora(tiny_llama())
    a, b = adapters(model, "lora_A"), adapters(model, "lora_B")
    optimizer = make(name, model, scope=scope)
    start_a, start_b = copies(a), copies(b)
    train(model, optimizer, 0, 1)
    assert not any(p.grad.any() for p in a.values()) and not any(p.any() for p in start_b.values())
    assert moved(start_a, a) == set() and moved(start_b, b) == set(b)
    train(model, optimizer, 1, 2)
    assert all(p.grad.any() for p in a.values()) and moved(start_a, a) == set(a)
    train(model, optimizer, 2, 10)
    assert all_finite(optimizer, adapters(model).values())
    assert int(next(iter(optimizer.state.values()))["step"]) == 10


@pytest.mark.parametrize(
    "config",
    [
        lora(use_rslora=True),
        lora(use_dora=True),  # a vector beside every pair of matrices
        lora(init_lora_weights="pissa"),  # neither A nor B starts at zero
        lora(target_modules=["embed_tokens", "q_proj"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),  # (1, n) and (n, 1)
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["rslora", "dora", "pissa", "embeddings", "ia3", "prompt"],
)
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_other_methods_of_peft(name, config):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), copy.deepcopy(config))
    optimizer, params, before = make(name, model, lr=2e-2), adapters(model), loss_of(model)
    start = copies(params)
    train(model, optimizer, 0, 20)
    assert loss_of(model) < 0.98 * before and moved(start, params) == set(params)


@by_few_names
def test_trainer_trains_adapters_and_modules_to_save(name, make_args, tiny_bert, token_data):
    """The saved module is a copy: it trains, its original does not."""
    model = with_lora(tiny_bert, task_type="SEQ_CLS", modules_to_save=["classifier"])
    args = make_args(
        optim=name,
        optim_args=known_to(name, {"window_size": 8, "adam_lr_ratio": 0.2, **LOSSY[info(name).compression]}),
        learning_rate=rate_of_adam(name, 2e-2),
        weight_decay=0.01,
        max_steps=40,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        save_strategy="no",
        disable_tqdm=True,
    )
    frozen = copies({n: p for n, p in model.named_parameters() if not p.requires_grad})
    params, start = adapters(model), copies(adapters(model))
    assert sum("modules_to_save" in n for n in params) == 2
    trainer = Trainer(model, args, train_dataset=token_data, eval_dataset=token_data)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * untrained
    assert moved(start, params) == set(params)
    assert moved(frozen, {n: p for n, p in model.named_parameters() if n in frozen}) == set()
    optimizer = trainer.optimizer.optimizer
    assert set(optimizer.state) == set(params.values())
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(params) - 1, 1]  # the bias: no decay


# Frozen bases -------------------------------------------------------------------------------------------------------------


@by_name
def test_a_frozen_base_takes_no_memory(name):
    """Whether it is in the parameter groups or not; the LoRA run's state is small."""
    cls, given = info(name).cls, options(name)
    whole = sum(cls(tiny_llama().parameters(), 1e-3, **given).memory_footprint().values())
    model = with_lora(tiny_llama(), r=1, target_modules=["q_proj", "v_proj"])
    everything = cls(model.parameters(), 1e-3, **given)
    trainable = make(name, model, lr=1e-3)
    for optimizer in (everything, trainable):
        train(model, optimizer, 0, 2)
        assert set(optimizer.state) == set(adapters(model).values())
    footprint = everything.memory_footprint()
    assert footprint == trainable.memory_footprint()
    elements = [value for entry in everything.state.values() for value in entry.values()]
    assert sum(footprint.values()) == sum(v.numel() * v.element_size() for v in elements) < 0.11 * whole


@pytest.mark.parametrize("base", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@by_name
def test_adapters_on_a_quantized_base_under_autocast(name, adapter, base):
    kind = {"dtype": base} if base.is_floating_point else {"linear": QuantizedLinear}
    model = with_lora(tiny_llama(**kind), adapter_dtype=adapter)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    params, untouched = adapters(model), copies(frozen)
    assert {p.dtype for p in params.values()} == {adapter} and base in {p.dtype for p in frozen.values()}
    optimizer = info(name).cls(model.parameters(), 5e-3, **options(name))
    before, start = loss_of(model), copies(params)
    train(model, optimizer, 0, 1, autocast=True)
    assert moved(start, params) == set(adapters(model, "lora_B"))
    train(model, optimizer, 1, 12, autocast=True)
    assert moved(start, params) == set(params)
    assert moved(untouched, frozen) == set() and set(optimizer.state) == set(params.values())
    assert loss_of(model) < 0.9 * before and all_finite(optimizer, params.values())
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert {p.dtype for p in params.values()} == {adapter}
    assert {(k, v.dtype) for entry in optimizer.state.values() for k, v in entry.items()} <= set(state_dtypes(name).items())
