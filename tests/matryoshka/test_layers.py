"""PEFT's layers with P behind A: against brute force in fp64, and what training sees at which rank."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_efcp import OptionError
from hf_efcp.core.nested import masks, staircase
from hf_efcp.matryoshka import MatryoshkaConfig, at_rank, set_rank, truncate
from tests.matryoshka.models import filled, layers_of, mlp

SCALES = {"none": lambda rho: 1.0, "sqrt": lambda rho: 1 / math.sqrt(rho), "rank": lambda rho: 1 / rho}


def only(model):
    """x -> what the single adapted layer adds, with A (in, r) and B (r, out)."""
    (layer,) = layers_of(model)
    a, b = layer.lora_A["default"].weight.detach().T, layer.lora_B["default"].weight.detach().T
    x = torch.randn(4, a.shape[0], dtype=a.dtype, generator=torch.Generator().manual_seed(3))
    return layer, a, b, x, layer(x).detach() - layer.base_layer(x).detach()


def one(dtype=torch.float64, **given):
    config = MatryoshkaConfig(**{"r": 8, "target_modules": ["up"], **given})
    return filled(get_peft_model(mlp().to(dtype), config, autocast_adapter_dtype=False))


@pytest.mark.parametrize("rank_scale", SCALES)
def test_training_adds_the_sum_of_all_nested_adapters(rank_scale):
    ranks = [1, 3, 8]
    model = one(train_ranks=ranks, rank_scale=rank_scale).train()
    _, a, b, x, added = only(model)
    expected = sum(SCALES[rank_scale](rho) * x @ a[:, :rho] @ b[:rho] for rho in ranks)
    torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-12)
    model.eval()
    set_rank(model, "sum")
    torch.testing.assert_close(only(model)[-1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank_scale", SCALES)
def test_evaluation_is_at_the_chosen_rank_without_p(rank_scale, use_rslora):
    model = one(rank_scale=rank_scale, use_rslora=use_rslora).eval()
    for rank in (None, 1, 3, 8):
        set_rank(model, rank)
        _, a, b, x, added = only(model)
        rho = rank or 8
        torch.testing.assert_close(added, SCALES[rank_scale](rho) * x @ a[:, :rho] @ b[:rho], rtol=1e-12, atol=1e-12)
        layer = layers_of(model)[0]
        torch.testing.assert_close(x @ layer.get_delta_weight("default").T, added, rtol=1e-12, atol=1e-12)


def test_lora_alpha_is_pefts_at_the_largest_rank():
    model = one(lora_alpha=24, rank_scale="rank", train_ranks=[2, 8]).eval()
    config = model.peft_config["default"]
    assert [config.scale(rho) for rho in (8, 2)] == [3, 12]
    with at_rank(model, 2):
        _, a, b, x, added = only(model)
    torch.testing.assert_close(added, 12 * x @ a[:, :2] @ b[:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_kind_lora_is_pefts_lora_bit_for_bit(train):
    model = one(torch.float32, kind="lora", rank_scale="rank", lora_alpha=16).train(train)
    plain = get_peft_model(mlp(), LoraConfig(r=8, lora_alpha=16, target_modules=["up"])).train(train)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(model(x), plain(x))


def test_dylora_draws_one_rank_for_all_layers_and_every_rank_comes():
    torch.manual_seed(0)
    ranks = [1, 2, 4, 8]
    model = one(kind="dylora", train_ranks=ranks, target_modules=["up", "down"]).train()
    each = masks(8, ranks, "sqrt") / 8**-0.5
    seen = []
    for _ in range(400):
        model(torch.ones(1, 12, dtype=torch.float64))
        indices = {int(layer.lora_A["default"].draw.index) for layer in layers_of(model)}
        assert len(indices) == 1
        seen.append(indices.pop())
        layer = layers_of(model)[0]
        torch.testing.assert_close(layer.lora_A["default"].p, each, rtol=1e-15, atol=0)
    counts = torch.bincount(torch.tensor(seen), minlength=4)
    assert len(counts) == 4 and counts.min() > 70  # 100 expected, standard deviation 9
    torch.manual_seed(5)
    before = [int(torch.randint(4, ())) for _ in range(5)]
    torch.manual_seed(5)
    drawn = [
        model(torch.ones(1, 12, dtype=torch.float64)) is not None and int(layer.lora_A["default"].draw.index) for _ in before
    ]
    assert drawn == before  # torch's CPU generator: a resumed run and a repeated forward draw the same


def test_what_dylora_draws_gets_gradients_and_the_rest_zeros():
    model = one(kind="dylora").train()
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    a = layers_of(model)[0].lora_A["default"]
    rank = a.train_ranks[int(a.draw.index)]
    assert a.weight.grad[:rank].abs().min() > 0 and not a.weight.grad[rank:].any()
    assert layers_of(model)[0].lora_B["default"].weight.grad.shape == (20, 8)


def test_two_layers_do_not_share_a_wrong_p():
    """The reference keeps one P for all layers, whatever their ranks."""
    model = one(train_ranks=[1, 8])
    model.add_adapter("small", MatryoshkaConfig(r=3, train_ranks=[2, 3], rank_scale="none", target_modules=["up"]))
    layer = layers_of(model)[0]
    torch.testing.assert_close(layer.lora_A["default"].p[0].double(), staircase(8, [1, 8]) * 8**0.5, rtol=1e-12, atol=0)
    assert layer.lora_A["small"].p.tolist() == [[2, 2, 1]]


def test_p_stays_fp32_in_a_bf16_model():
    model = one(torch.float32, train_ranks=[1, 2, 8]).bfloat16().train()
    a = layers_of(model)[0].lora_A["default"]
    assert a.weight.dtype == torch.bfloat16 and a.p.dtype == torch.float32
    torch.testing.assert_close(a.p[0].double(), staircase(8, [1, 2, 8]) * 8**0.5, rtol=1e-7, atol=0)
    x = torch.randn(64, 12).bfloat16()
    h = a(x)
    assert h.dtype == torch.bfloat16
    exact = x.double() @ a.weight.double().T * a.p[0].double()
    assert ((h.double() - exact).abs() <= 2 * 2**-8 * exact.abs() + 1e-6).all()
    assert model(x).dtype == torch.bfloat16


def test_checkpointed_forwards_draw_the_same_rank():
    from torch.utils.checkpoint import checkpoint

    grads = []
    for repeated in (False, True):
        torch.manual_seed(2)
        model = one(kind="dylora", target_modules=["up", "down"]).train()
        torch.manual_seed(7)
        for _ in range(3):
            x = torch.ones(2, 12, dtype=torch.float64, requires_grad=True)
            out = checkpoint(model, x, use_reentrant=False) if repeated else model(x)
            out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_an_adapter_that_comes_again_draws_again():
    model = one(kind="dylora").train()
    x = torch.ones(1, 12, dtype=torch.float64)
    model(x)
    config = model.peft_config["default"]
    model.add_adapter("other", copy.copy(config))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    torch.manual_seed(0)
    a = layers_of(model)[0].lora_A["default"]
    assert len({model(x) is not None and int(a.draw.index) for _ in range(40)}) == 4


def test_the_start_of_a():
    for reference, bound in ((False, 12**-0.5), (True, 8**-0.5)):
        model = get_peft_model(mlp(), MatryoshkaConfig(r=8, target_modules=["up"], reference_init=reference))
        a = layers_of(model)[0].lora_A["default"].weight
        assert 0.8 * bound < a.abs().max() <= bound
        assert not layers_of(model)[0].lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "matroshka"}, "unknown kind 'matroshka': did you mean 'matryoshka'"),
        ({"rank_scale": "root"}, "unknown rank_scale 'root'.*valid: none, sqrt, rank"),
        ({"r": 0}, "r=0: must be an integer >= 1"),
        ({"train_ranks": [1, 16]}, r"from 1 to r=8"),
        ({"train_ranks": [2, 2, 8]}, "different integers"),
        ({"train_ranks": 8}, "must be a list of integers"),
        ({"train_ranks": [1, 4]}, "columns 4 to 7 would never be trained; set r=4"),
        ({"kind": "lora", "train_ranks": [1, 8]}, "kind='lora' trains rank r=8 alone"),
        ({"lora_alpha": 0}, "lora_alpha=0: must be"),
        ({"use_dora": True}, "use_dora=True: MatryoshkaConfig does not take it"),
        ({"rank_pattern": {"up": 2}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_bad_configuration_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        MatryoshkaConfig(**{"r": 8, "target_modules": ["up"], **given})


def test_only_linear_layers_are_taken():
    with pytest.raises(OptionError, match="'0' is Embedding; MatryoshkaConfig takes linear layers"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 3)), MatryoshkaConfig(r=2, target_modules=["0"]))


def test_a_bad_rank_is_refused():
    model = one()
    with pytest.raises(OptionError, match="rank=9: must be an integer from 1 to r=8"):
        set_rank(model, 9)
    with pytest.raises(OptionError, match="adapter='other'"):
        set_rank(model, 2, adapter="other")
    model.merge_adapter()
    with pytest.raises(OptionError, match="is merged; unmerge it first"):
        set_rank(model, 2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_trained_weights_are_the_leading_entries_of_p(use_rslora):
    model = one(lora_alpha=5.0, use_rslora=use_rslora, train_ranks=[1, 4, 8]).eval()
    p = staircase(8, [1, 4, 8]) * model.peft_config["default"].scale(8) / SCALES["sqrt"](8)
    for rank in (1, 3, 8):
        with at_rank(model, rank, weights="trained"):
            _, a, b, x, added = only(model)
        torch.testing.assert_close(added, (x @ a[:, :rank] * p[:rank]) @ b[:rank], rtol=1e-12, atol=1e-12)
        name = truncate(model, rank, weights="trained")
        model.set_adapter(name)
        layer = layers_of(model)[0]
        plain = layer(x).detach() - layer.base_layer(x).detach()
        torch.testing.assert_close(plain, added, rtol=1e-12, atol=1e-12)
        model.set_adapter("default")
    assert layers_of(model)[0].lora_A["default"].weights == "own"
    with at_rank(model, "sum"):
        whole = only(model)[-1]
    with at_rank(model, 8, weights="trained"):
        torch.testing.assert_close(only(model)[-1], whole, rtol=1e-12, atol=1e-12)


def test_bad_weights_are_refused():
    with pytest.raises(OptionError, match="unknown weights 'train': did you mean 'trained'"):
        set_rank(one(), 2, weights="train")
    with pytest.raises(OptionError, match="kind='dylora' trains with another P"):
        set_rank(one(kind="dylora"), 2, weights="trained")
