"""What PEFT can do with a LoRA adapter, it can do with ours: save, load, merge, several adapters, quantized bases, Trainer."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import Trainer, TrainingArguments

from hf_efcp.core.nested import KINDS
from hf_efcp.matryoshka import MatryoshkaConfig, at_rank, save_truncated, set_rank, truncate
from tests.integration.peft_runs import QuantizedLinear, batch, tiny_llama
from tests.matryoshka.models import filled, layers_of

X = batch(0)


def config(**given):
    return MatryoshkaConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **given})


def nested(base=None, **given):
    return filled(get_peft_model(base or tiny_llama(), config(**given), autocast_adapter_dtype=False)).eval()


def answer(model):
    with torch.no_grad():
        return model(**X).logits


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


# Saved and loaded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_as_what_it_is(kind, tmp_path):
    model = nested(kind=kind, rank_scale="rank", lora_alpha=3, train_ranks=[4] if kind == "lora" else [1, 4])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    read = loaded.peft_config["default"]
    assert type(read) is type(PeftConfig.from_pretrained(tmp_path)) is MatryoshkaConfig
    saved = model.peft_config["default"]
    assert [getattr(read, f) for f in ("kind", "train_ranks", "rank_scale", "lora_alpha")] == [
        *(kind, saved.train_ranks, "rank", 3)
    ]
    for rank in (None, 1, 2):
        set_rank(model, rank)
        set_rank(loaded, rank)
        assert torch.equal(answer(loaded), answer(model))
    for m in (model, loaded):
        m.train()
        torch.manual_seed(0)
    a, b = answer(model), (torch.manual_seed(0), answer(loaded))[1]
    assert torch.equal(a, b)
    assert not any(".p" in name.rsplit("weight")[-1] for name in model.state_dict() if "lora_" in name)


def test_other_ways_to_load(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = nested()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    expected = answer(model)
    assert torch.equal(answer(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=True).eval()
    assert torch.equal(answer(loaded), expected)
    loaded.train()
    close(answer(loaded), answer(copy.deepcopy(model).train()))
    loaded.load_adapter(tmp_path / "adapter", "second")
    loaded.set_adapter("second")
    with at_rank(loaded, 2, "second"), at_rank(model, 2):
        assert torch.equal(answer(loaded.eval()), answer(model))


def test_an_adapter_injected_into_a_model():
    bare = inject_adapter_in_model(config(), tiny_llama())
    filled(bare).eval()
    with at_rank(bare, 1), at_rank(model := nested(), 1):
        assert torch.equal(bare(**X).logits, answer(model))


def test_copies_and_pickles_are_whole():
    model = nested(kind="dylora").train()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        answers = []
        for m in (model, other):
            torch.manual_seed(3)
            answers.append(torch.stack([answer(m) for _ in range(4)]))
        assert torch.equal(*answers)
        assert type(layers_of(other)[0]) is type(layers_of(model)[0])


# At one rank, as an ordinary adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_truncated_is_the_slice_and_ordinary(use_rslora, tmp_path):
    model = nested(rank_scale="sqrt", use_rslora=use_rslora, modules_to_save=["lm_head"])
    filled(model, seed=4, part="modules_to_save")
    for rank in (1, 3, 4):
        with at_rank(model, rank):
            expected = answer(model)
        name = truncate(model, rank)
        assert type(model.peft_config[name]) is LoraConfig and model.peft_config[name].r == rank
        before = {n: p for n, p in model.named_parameters() if "default" in n}
        for layer in layers_of(model):
            assert torch.equal(layer.lora_A[name].weight, layer.lora_A["default"].weight[:rank])
            assert torch.equal(layer.lora_B[name].weight, layer.lora_B["default"].weight[:, :rank])
        model.set_adapter(name)
        close(answer(model), expected)
        model.set_adapter("default")
        assert all(p is before[n] for n, p in model.named_parameters() if "default" in n)
        save_truncated(model, rank, tmp_path / name)
        model.save_pretrained(tmp_path / "all", selected_adapters=[name])
        for folder in (tmp_path / name, tmp_path / "all" / name):
            loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
            assert type(loaded.peft_config["default"]) is LoraConfig
            close(answer(loaded), expected)
    with pytest.raises(ValueError, match="name='rank_3': the model has an adapter of that name"):
        truncate(model, 3)


def test_plain_peft_loads_both_without_us(tmp_path):
    """A truncated adapter, and the whole one, which is the adapter of rank r to a program that knows nothing of P."""
    model = nested(tiny_llama())
    model.save_pretrained(tmp_path / "whole")
    save_truncated(model, 2, tmp_path / "cut")
    tiny_llama().save_pretrained(tmp_path / "base")
    script = f"""
import sys, torch, peft, transformers, warnings
warnings.simplefilter("ignore")
x = torch.tensor({X["input_ids"].tolist()})
answers = []
for name in ("whole", "cut"):
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    model = peft.PeftModel.from_pretrained(base, name).eval()
    assert type(model.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        answers.append(model(input_ids=x).logits)
torch.save(answers, "answers.pt")
assert "hf_efcp" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, cut = torch.load(tmp_path / "answers.pt")
    close(whole, answer(model))
    with at_rank(model, 2):
        close(cut, answer(model))


def test_the_files_of_a_truncated_adapter(tmp_path):
    model = nested(rank_scale="sqrt", train_ranks=[2, 4])
    save_truncated(model, 2, tmp_path / "new" / "folder")
    read = json.loads((tmp_path / "new/folder/adapter_config.json").read_text())
    assert read["r"] == 2 and read["lora_alpha"] / 2 == pytest.approx(2**-0.5, abs=1e-15) and read["peft_type"] == "LORA"
    assert "train_ranks" not in read and "rank_scale" not in read


# Merged, disabled, several --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1, 3, "sum"])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_and_unmerged(rank, safe):
    model = nested(tiny_llama(torch.float64))
    set_rank(model, rank)
    expected, base = answer(model), {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(answer(model), expected, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        if name in base:
            torch.testing.assert_close(p, base[name], rtol=0, atol=1e-14)
    assert torch.equal(answer(copy.deepcopy(model)), answer(model))
    whole = model.merge_and_unload(safe_merge=safe)
    assert not layers_of(whole)
    torch.testing.assert_close(whole(**X).logits, expected, rtol=1e-6, atol=1e-6)


def test_merging_changes_neither_a_nor_b():
    model = nested()
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    set_rank(model, 2)
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_several_adapters_of_both_kinds():
    model = nested()
    first = answer(model)
    model.add_adapter("plain", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    model.add_adapter("other", config(r=2, rank_scale="none", target_modules=["q_proj", "up_proj"]))
    filled(model, seed=7).eval()  # PEFT's new adapters are in training mode
    alone = {}
    for name in ("default", "plain", "other"):
        model.set_adapter(name)
        alone[name] = answer(model)
        model.merge_adapter()
        close(answer(model), alone[name])
        model.unmerge_adapter()
    filled(model, part="default")
    model.set_adapter("default")
    filled(get := nested())
    assert torch.equal(answer(get), first)
    model.base_model.set_adapter(["default", "plain", "other"])
    together = answer(model)
    model.merge_adapter()
    close(answer(model), together, atol=1e-3)
    model.unmerge_adapter()
    with model.disable_adapter():
        close(answer(model), answer(tiny_llama().eval()))
    set_rank(model, 1, "other")
    assert not torch.equal(answer(model), together)
    model.delete_adapter("plain")
    assert list(model.peft_config) == ["default", "other"]
    close(answer(model.unload().eval()), answer(tiny_llama().eval()))


def test_a_batch_of_several_adapters():
    model = nested()
    model.add_adapter("other", config(r=2))
    filled(model, seed=7).eval()
    set_rank(model, 1, "other")
    names = ["default", "other"] * 4
    with torch.no_grad():
        mixed = model(input_ids=X["input_ids"], adapter_names=names).logits
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        close(mixed[i::2], answer(model)[i::2])


def test_weighted_adapters_of_one_rank():
    model = nested(rank_scale="none")
    model.add_adapter("other", config(rank_scale="none"))
    filled(model, seed=7).eval()
    deltas = [layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other") for layer in layers_of(model)]
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "both", combination_type="svd", svd_rank=4)
    assert all(torch.isfinite(layer.get_delta_weight("both")).all() for layer in layers_of(model)) and len(deltas) == 4


# Number formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_bases(adapter):
    model = nested(tiny_llama(torch.bfloat16))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)
    set_rank(model, 2)
    expected = answer(model).float()
    model.merge_adapter()
    assert (answer(model).float() - expected).abs().max() < 0.06 * expected.abs().max()
    model.unmerge_adapter()
    model.train()
    loss = model(**X).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == adapter for p in model.parameters() if p.requires_grad)


def test_a_quantized_base_trains_under_autocast():
    model = nested(tiny_llama(linear=QuantizedLinear), train_ranks=[1, 4]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**X).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_bases_of_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")

    def quantized(child):
        cls, more = (
            (bnb.nn.Linear4bit, {"quant_type": "nf4"}) if bits == 4 else (bnb.nn.Linear8bitLt, {"has_fp16_weights": False})
        )
        made = cls(child.in_features, child.out_features, bias=False, **more)
        made.load_state_dict(child.state_dict())
        return made

    base = tiny_llama(linear=quantized).to("cpu")
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = nested(base)
    set_rank(model, 2)
    name = truncate(model, 2)
    expected = answer(model)
    assert type(layers_of(model)[0]).__name__ == {4: "NestedLinear4bit", 8: "NestedLinear8bitLt"}[bits]
    model.set_adapter(name)
    close(answer(model), expected)


# Training -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["matryoshka", "dylora"])
def test_trainer_goes_on_bit_for_bit(kind, tmp_path):
    def run(folder, steps, resume=None):
        model = nested(kind=kind)
        data = [{"input_ids": ids, "labels": ids} for t in range(4) for ids in batch(t)["input_ids"]]
        args = TrainingArguments(
            str(folder),
            optim="adamw_torch",
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=8,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=data)
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate(data)["eval_loss"] < before
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 3)
    resumed = run(tmp_path / "cut", 6, str(tmp_path / "cut/checkpoint-3"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
