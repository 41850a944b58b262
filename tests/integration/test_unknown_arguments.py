"""Misspelt names in every way of giving options; nothing to train; other parameters under Trainer."""

import importlib.util
import json

import pytest
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_efcp
from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.integrations.deepspeed import check_config
from tests.reference import args_known_to, few_names, info

NAMES = hf_efcp.list_optimizers()
by_name = pytest.mark.parametrize("name", NAMES)
FIRST = NAMES[0]
WAYS = ["constructor", "command line", "dict", "json"]


def parsed(way, kind, given, tmp_path):
    """The arguments of a class, given in one of four ways."""
    given = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", **given}
    if way == "constructor":
        return kind(**given)
    parser = HfArgumentParser(kind)
    if way == "command line":
        return parser.parse_args_into_dataclasses([text for k, v in given.items() for text in (f"--{k}", str(v))])
    if way == "dict":
        return parser.parse_dict(given)
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(given))
    return parser.parse_json_file(str(file))


@pytest.mark.parametrize("way", WAYS)
def test_a_misspelt_field(way, tmp_path):
    with pytest.raises(
        OptionError, match=r"unknown field 'efcp_windw_size': did you mean 'efcp_window_size'.*valid: efcp_"
    ) as error:
        parsed(way, EFCPTrainingArguments, {"efcp_windw_size": 4}, tmp_path)
    assert "efcp_lr" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_an_option_without_its_prefix(way, tmp_path):
    with pytest.raises(OptionError, match="window_size: these training arguments have no such field: give efcp_window_size"):
        parsed(way, EFCPTrainingArguments, {"optim": FIRST, "window_size": 4}, tmp_path)


@pytest.mark.parametrize("field", ["efcp_window_size", "window_size"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_a_field_of_other_arguments(way, field, tmp_path):
    with pytest.raises(OptionError, match=rf"{field}: .* no such field: give --optim_args window_size=VALUE"):
        parsed(way, TrainingArguments, {"optim": FIRST, field: 4}, tmp_path)


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_misspelt_field_of_other_arguments(way, tmp_path):
    with pytest.raises(OptionError, match="efcp_windw_size: unknown option 'windw_size': did you mean 'window_size'"):
        parsed(way, TrainingArguments, {"optim": FIRST, "efcp_windw_size": 4}, tmp_path)


def test_options_that_are_several_arguments(tmp_path):
    given = ["--output_dir", str(tmp_path), "--optim", FIRST, "--optim_args", "window_size=4", "scope=layer"]
    with pytest.raises(OptionError, match=r"scope=\.\.\.: --optim_args takes one text: put commas between options"):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(given)


@pytest.mark.parametrize("way", WAYS[1:])
def test_what_is_not_ours_is_said_as_ever(way, tmp_path):
    for given in ({"window_size": 4}, {"optim": FIRST, "no_such": 4}):
        with pytest.raises(ValueError, match="not used by the HfArgumentParser") as error:
            parsed(way, TrainingArguments, given, tmp_path)
        assert not isinstance(error.value, OptionError)


def test_python_refuses_other_fields(make_args):
    with pytest.raises(TypeError, match="no_such"):
        EFCPTrainingArguments("out", no_such=3)


@pytest.mark.parametrize("change", [str.upper, lambda n: n.removeprefix("efcp_"), lambda n: n.replace("_", "-")])
@by_name
def test_a_name_that_is_nearly_ours(name, change, make_args):
    with pytest.raises(OptionError, match=f"unknown optimizer .*did you mean '{name}'"):
        make_args(optim=change(name))


@by_name
def test_a_class_in_place_of_a_name(name, make_args):
    with pytest.raises(OptionError, match=f"optim={info(name).cls.__name__}: give the name of that class, optim='{name}'"):
        make_args(optim=info(name).cls)


@pytest.mark.parametrize("optim", ["adamw_torchh", "no_such"])
def test_a_name_like_none_of_ours_is_transformers_to_refuse(optim, make_args):
    with pytest.raises(ValueError, match="is not a valid OptimizerNames") as error:
        make_args(optim=optim)
    assert not isinstance(error.value, OptionError)


def test_a_field_is_named_with_its_prefix():
    with pytest.raises(OptionError, match=r"^efcp_window_size='x': expected an integer"):
        EFCPTrainingArguments("out", efcp_window_size="x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": "two"}}, r"zero_optimization\.stage='two': expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": None}}, r"zero_optimization\.stage=None: expected 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization=True: expected a section"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, "offload_optimizer='cpu': expected a section"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW': expected a section"),
    ],
)
def test_a_deepspeed_config_of_another_form(config, message):
    with pytest.raises(OptionError, match=message):
        check_config(config, info(FIRST).cls, {})


@by_name
def test_nothing_to_train(name, make_args):
    model = nn.Linear(3, 3).requires_grad_(False)
    for make in (lambda: hf_efcp.create_optimizer(name, model, lr=0.1), Trainer(model, make_args(optim=name)).create_optimizer):
        with pytest.raises(OptionError, match="nothing to train: all of its 2 parameters are frozen"):
            make()


@by_name
def test_what_the_trainer_is_told_has_the_parameters(name, make_args, tiny_bert):
    """docs/using.md: with a model, its groups are among the keyword arguments; without one they are not."""
    args = make_args(optim=name, weight_decay=0.1)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, tiny_bert)
    optimizer = cls(**kwargs)
    assert [g["param_names"] for g in optimizer.param_groups] == [[n for n, _ in g["params"]] for g in kwargs["params"]]
    assert "params" not in Trainer.get_optimizer_cls_and_kwargs(args)[1]


@pytest.mark.parametrize("name", few_names())
def test_a_run_that_is_resumed_with_other_parameters(name, make_args, tiny_bert, token_data):
    def trainer(**more):
        args = make_args(optim=name, optim_args=args_known_to(name, "window_size=4"), **more)
        return Trainer(tiny_bert, args, train_dataset=token_data)

    tiny_bert.bert.embeddings.requires_grad_(False)
    first = trainer(max_steps=1, save_steps=1)
    first.train()
    tiny_bert.bert.embeddings.requires_grad_(True)
    tiny_bert.classifier.bias.requires_grad_(False)
    message = r"trained here and not there: .*bert\.embeddings\.word.*trained there and not here: classifier\.bias"
    with pytest.raises(OptionError, match=message):
        trainer(max_steps=2).train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")


@pytest.mark.parametrize(("given", "meant"), [(f"{FIRST}x", FIRST), ("adamw_tor", "adamw_torch"), ("?", None)])
def test_an_unknown_optimizer_ends_a_script_in_one_line(given, meant, tmp_path, capsys):
    """transformers' own answer has 126 lines of usage; other arguments keep it."""
    parser = HfArgumentParser(TrainingArguments)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", given])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: --optim {given}: no such name: ") and all(name in said for name in NAMES)
    assert (f"did you mean {meant}?" in said) if meant else ("did you mean" not in said)
    if given == f"{FIRST}x" and importlib.util.find_spec("trl"):  # it has a parser of its own
        from trl.scripts.utils import TrlParser

        with pytest.raises(SystemExit):
            TrlParser(TrainingArguments).parse_args_and_config(["--output_dir", str(tmp_path), "--optim", given])
        assert capsys.readouterr().err == said
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--lr_scheduler_type", "nix"])
    assert "invalid choice: 'nix'" in capsys.readouterr().err
