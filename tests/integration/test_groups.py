"""Parameter groups: kinds by module, decay as the Trainer has it, and what optim_target_modules compresses."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Trainer

import hf_efcp
from hf_efcp import OptionError, parameter_groups
from hf_efcp.groups import canonical_name, parse_targets
from tests.reference import few_names, info, known_to

by_name = pytest.mark.parametrize("name", hf_efcp.list_optimizers())


def tiny(kind, **options):
    """A language model of two small layers."""
    if kind == "gpt2":
        config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, **options)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=32, max_position_embeddings=16, num_key_value_heads=1, **sizes, **options)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model: (model.parameters(),), "takes a module, got generator: pass the model, not its parameters"),
        (lambda model: (model, -1), r"weight_decay=-1\.0: must be a finite number >= 0"),
        (lambda model: (model, "a"), "weight_decay='a': expected a number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OptionError, match=message):
        parameter_groups(*arguments(nn.Linear(3, 4)))


def names(groups, **wanted):
    """Names of the parameters in the groups that have the wanted entries."""
    return {n for g in groups if wanted.items() <= g.items() for n, _ in g["params"]}


def test_kinds_come_from_modules():
    groups = parameter_groups(tiny("llama", tie_word_embeddings=False), 0.1)
    assert names(groups, kind="embedding") == {"model.embed_tokens.weight"}
    assert names(groups, kind="head") == {"lm_head.weight"}
    assert len(names(groups, kind="matrix")) == 2 * 7
    assert names(groups, kind="vector") == {n for n, p in tiny("llama").named_parameters() if p.ndim == 1}
    assert all(g["params"] for g in groups)
    assert {(g["kind"], g["weight_decay"]) for g in groups} == {
        ("embedding", 0.1),
        ("head", 0.1),
        ("matrix", 0.1),
        ("vector", 0.0),
    }


def test_tied_weights_occur_once_and_conv1d_is_a_matrix():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = parameter_groups(model)
    assert names(groups, kind="embedding") == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert names(groups, kind="head") == set()
    assert {n.split(".", 3)[-1] for n in names(groups, kind="matrix")} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = tiny("llama")
    model.requires_grad_(False)
    assert parameter_groups(model) == []
    model.model.layers[1].mlp.up_proj.requires_grad_(True)
    (group,) = parameter_groups(model, 0.1)
    assert [n for n, _ in group["params"]] == ["model.layers.1.mlp.up_proj.weight"]


def test_device_meshes_are_kept_apart():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight.device_mesh = object()
    assert [[n for n, _ in g["params"]] for g in parameter_groups(model)] == [["0.weight", "2.weight"], ["1.weight"]]


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.a.b.weight",
        "module._orig_mod.a.b.weight",
        "a._checkpoint_wrapped_module.b.weight",
        "base_model.model.a.b.weight",
    ],
)
def test_names_are_those_of_the_bare_model(name):
    assert canonical_name(name) == "a.b.weight"
    assert canonical_name("a.module.weight") == "a.module.weight"


def test_a_compiled_model_has_the_same_groups():
    model = tiny("llama")
    bare, compiled = parameter_groups(model, 0.1), parameter_groups(torch.compile(model, backend="eager"), 0.1)
    assert [[n for n, _ in g["params"]] for g in bare] == [[n for n, _ in g["params"]] for g in compiled]
    assert [g["kind"] for g in bare] == [g["kind"] for g in compiled]


@by_name
def test_the_trainer_gets_them_with_its_own_rule_for_decay(name, make_args, tiny_bert):
    trainer = Trainer(tiny_bert, make_args(optim=name, weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    decayed = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert decayed == set(trainer.get_decay_parameter_names(tiny_bert))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(tiny_bert.parameters()))
    assert {g["kind"] for g in optimizer.param_groups} == {"embedding", "matrix", "vector"}


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("all-linear", ["all-linear"]),
        ("q_proj, v_proj,", ["q_proj", "v_proj"]),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("[qv]_proj", ["[qv]_proj"]),
        ("f.{1,2}_proj", ["f.{1,2}_proj"]),
    ],
)
def test_targets_are_read_from_lists_and_text(given, parsed):
    assert parse_targets(given) == parsed


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (["self_attn"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (r".*\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        ("lm_head,embed", {"lm_head", "embed_tokens"}),
    ],
)
def test_targets_select_modules(targets, expected, caplog):
    groups = parameter_groups(tiny("llama", tie_word_embeddings=False), target_modules=targets)
    compressed = {n.split(".")[-2] for n in names(groups, compress=True) - names(groups, kind="vector")}
    assert compressed == expected
    assert names(groups, kind="vector", compress=False) == set()
    assert "enter the window whole" in caplog.text


def test_conv1d_can_be_targeted():
    groups = parameter_groups(tiny("gpt2"), target_modules="c_attn")
    assert {n.split(".")[-2] for n in names(groups, kind="matrix", compress=True)} == {"c_attn"}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("target", ["lm_head", "^lm_head$", "embedding"])
def test_any_owner_of_a_shared_tensor_selects_it(kind, target):
    model = tiny(kind, tie_word_embeddings=True)
    shared = "transformer.wte" if kind == "gpt2" else "model.embed_tokens"
    groups = parameter_groups(model, target_modules=shared if target == "embedding" else target)
    assert names(groups, compress=True) - names(groups, kind="vector") == {f"{shared}.weight"}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert f"{shared}.weight" not in names(parameter_groups(model, target_modules="all-linear"), compress=True)


def test_targets_that_are_frozen_are_skipped_with_a_note(caplog):
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
    groups = parameter_groups(model, target_modules="lm_head,q_proj,up_proj")
    assert {n.split(".")[-2] for n in names(groups, kind="matrix", compress=True)} == {"up_proj"}
    notes = [r.getMessage() for r in caplog.records if "frozen modules only" in r.getMessage()]
    assert len(notes) == 2 and "'lm_head'" in notes[0] and "'q_proj'" in notes[1]
    # Where some of the modules are trained, nothing is said, and a name that matches nothing stays an error.
    caplog.clear()
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    parameter_groups(model, target_modules="q_proj")
    assert "frozen" not in caplog.text
    with pytest.raises(OptionError, match="'lm_hed' matches no module"):
        parameter_groups(model, target_modules="lm_head,lm_hed")


@pytest.mark.parametrize("optim", ["adamw_torch", *hf_efcp.list_optimizers()])
def test_group_0_decays_and_group_1_does_not(optim, make_args):
    """As transformers' own tests of Trainer ask for it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    first, second = Trainer(model, make_args(optim=optim, weight_decay=0.1)).create_optimizer().param_groups
    assert [first["weight_decay"], second["weight_decay"]] == [0.1, 0.0]
    assert first["params"] == [model[0].weight, model[2].weight]
    assert second["params"] == [model[0].bias, model[1].weight, model[1].bias, model[2].bias]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_order_of_groups_in_a_model_with_embeddings(weight_decay, make_args, tiny_bert):
    trainer = Trainer(tiny_bert, make_args(optim=hf_efcp.list_optimizers()[0], weight_decay=weight_decay))
    groups, decaying = trainer.create_optimizer().param_groups, set(trainer.get_decay_parameter_names(tiny_bert))
    assert set(groups[0]["param_names"]) <= decaying and not set(groups[1]["param_names"]) & decaying
    assert {n for g in groups[2:] for n in g["param_names"]} <= decaying
    assert {g["weight_decay"] for g in (groups[0], *groups[2:])} == {weight_decay} and groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "'q_prj' matches no module with trainable matrices; did you mean 'q_proj'.* such modules: .*down_proj"),
        (["q_proj", "nothing"], "'nothing' matches no module"),
        ("[q", r"'\[q' matches no module"),
        ("norm", "'norm' matches no module"),
        (" , ", "names no module"),
        ([], "names no module"),
        (7, "expected names of modules, all-linear, or a list"),
        ([7], "expected names of modules"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(OptionError, match=message):
        parameter_groups(tiny("llama"), target_modules=targets)


@pytest.mark.parametrize("name", few_names())
def test_targets_decide_what_the_trainer_compresses(name, make_args, tiny_bert, token_data):
    def footprint(targets):
        rank = {"rank": 1} if info(name).compression == "low rank" else {}
        args = make_args(optim=name, optim_args=json.dumps(known_to(name, {"window_size": 4, **rank})), max_steps=2)
        args.optim_target_modules = targets
        trainer = Trainer(tiny_bert, args, train_dataset=token_data)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        state = {
            n: optimizer.state[p] for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)
        }
        whole = {n for n, entry in state.items() if ("window_rows" in entry if info(name).windowed else "error" not in entry)}
        return matrices - whole  # vectors are no module's target: a method that compresses them does so in any case

    matrices = {n for n, p in tiny_bert.named_parameters() if p.ndim == 2}
    small = {"bert.embeddings.token_type_embeddings.weight", "classifier.weight"}  # where rank 1 does not pay
    if info(name).compression == "dense":
        assert footprint(None) == footprint("query") == set()
    else:
        embeddings = set() if info(name).windowed else {n for n in matrices if "embeddings" in n}  # they may have AdamW
        assert matrices - small - embeddings <= footprint(None)
        assert footprint("query,key") == {n for n in matrices if "query" in n or "key" in n}


def test_groups_of_a_plain_optimizer_can_be_left_whole():
    a, b = (nn.Parameter(torch.ones(16, 16)) for _ in range(2))
    optimizer = hf_efcp.LowRankMFAC([{"params": [a]}, {"params": [b], "compress": False}], lr=0.1, window_size=2, rank=1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert "window_p" in optimizer.state[a]
    assert "window_rows" in optimizer.state[b]
    with pytest.raises(OptionError, match="compress='maybe': expected true or false"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "compress": "maybe"})


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, hf_efcp.LowRankMFAC])
def test_groups_have_names_all_or_none(cls, named):
    model, new = nn.Linear(4, 4), nn.Parameter(torch.ones(3, 3))
    optimizer = cls(model.named_parameters() if named else model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="groups should be with/without names"):
        optimizer.add_param_group({"params": [new if named else ("new", new)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("new", new) if named else new]})
    assert optimizer.param_groups[1]["params"] == [new]
