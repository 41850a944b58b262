"""LoRA by PEFT: adapters of any type on frozen bases of any type, added, saved and resumed."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import hf_efcp
from tests.optim.helpers import all_finite, differences, same, snapshot
from tests.reference import info

NAMES = hf_efcp.list_optimizers()
by_name = pytest.mark.parametrize("name", NAMES)
# Options that compress matrices as thin as 4 x 32, and wrap around after 4 steps.
SMALL = {"window_size": 4, "update_rms": 0.5, "error_dtype": "bf16"}
LOSSY = {"low rank": {"rank": 1}, "sparse": {"density": 0.1, "block_size": 32}, "dense": {}}
STATE_DTYPES = {
    "window_p": torch.float32,
    "window_q": torch.float32,
    "window_indices": torch.int16,
    "window_values": torch.float32,
    "window_rows": torch.float32,
    "warm_start": torch.float32,
    "error": torch.bfloat16,
    "gram": torch.float64,
    "step": torch.int64,
    "skipped": torch.int64,
}


def options(name, **more):
    return {**SMALL, **LOSSY[info(name).compression], **more}


def make(name, params, lr=5e-3, **more):
    return hf_efcp.create_optimizer(name, params, lr=lr, **options(name, **more))


def lora(**given):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **given})


def tiny_llama(dtype=torch.float32, linear=None):
    """Two layers, grouped queries, random weights, always the same; `linear` replaces the decoder's linear layers."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,  # so that the frozen head passes gradients on
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    if linear is not None:
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, linear(child))
    return model.to(dtype) if linear is None else model


def with_lora(model, seed=1, adapter_dtype=None, **given):
    """The model with adapters, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(**given), autocast_adapter_dtype=False)
    if adapter_dtype is not None:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(adapter_dtype)
    return model


def adapters(model, part=""):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and part in name}


def batch(t):
    """Step t's 8 sequences of 8 tokens, all from the first quarter of the vocabulary: a loss of log 8 is in reach."""
    tokens = torch.randint(0, 8, (8, 8), generator=torch.Generator().manual_seed(t))
    return {"input_ids": tokens, "labels": tokens}


def loss_of(model, t=10_000):
    with torch.no_grad():
        return float(model(**batch(t)).loss)


def train(model, optimizer, start, stop, autocast=False):
    for t in range(start, stop):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch(t)).loss
        loss.backward()
        optimizer.step()


def copies(params):
    return {name: p.detach().clone() for name, p in params.items()}


def moved(before, params):
    return {name for name, p in params.items() if not same(before[name], p)}


# Training -----------------------------------------------------------------------------------------------------------------


@by_name
def test_bf16_llama_keeps_every_dtype_through_prepare_save_and_load(name, tmp_path):
    """And goes on from the saved state bit for bit."""

    def prepared():
        model = with_lora(tiny_llama(torch.bfloat16))
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, make(name, model))

    def check_dtypes(optimizer):
        found = {(key, value.dtype) for entry in optimizer.state.values() for key, value in entry.items()}
        assert {key for key, _ in found} >= {"gram", "step", *expected[info(name).compression]}
        assert found <= set(STATE_DTYPES.items())

    expected = {"low rank": {"window_p", "error"}, "sparse": {"window_indices", "error"}, "dense": {"window_rows"}}
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


@by_name
def test_trainer_trains_adapters_and_modules_to_save(name, make_args, tiny_bert, token_data):
    """The saved module is a copy: it trains, its original does not."""
    model = with_lora(tiny_bert, task_type="SEQ_CLS", modules_to_save=["classifier"])
    args = make_args(
        optim=name,
        optim_args={"window_size": 8, **LOSSY[info(name).compression]},
        learning_rate=2e-2,
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
    assert sum(footprint.values()) == sum(v.numel() * v.element_size() for v in elements) < 0.1 * whole


class QuantizedLinear(nn.Linear):
    """A linear layer as QLoRA's: its weight is a frozen parameter of bytes, made floating for every product."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, bias=False)
        self.register_buffer("scale", source.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter(((source.weight / self.scale).round() + 128).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype)).T


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
    assert {(k, v.dtype) for entry in optimizer.state.values() for k, v in entry.items()} <= set(STATE_DTYPES.items())


# Added, renamed, resumed --------------------------------------------------------------------------------------------------


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


@by_name
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
