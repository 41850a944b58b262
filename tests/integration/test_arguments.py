"""EFCPTrainingArguments, and every mistake in arguments: one clear line, before anything is written."""

import dataclasses
import json
import pickle

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_efcp
from hf_efcp import EFCPTrainer, EFCPTrainingArguments, LowRankMFAC, OptionError, optimizer_cls_and_kwargs
from hf_efcp.integrations.arguments import EFCPFields
from hf_efcp.registry import get_optimizer_info

by_name = pytest.mark.parametrize("name", hf_efcp.list_optimizers())


def options_of(name):
    """The options that have fields: lr and weight decay are the Trainer's own."""
    return set(get_optimizer_info(name).options()) - {"lr", "weight_decay"}


@pytest.fixture
def make(tmp_path):
    def make(**given):
        return EFCPTrainingArguments(**{"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], **given})

    return make


@pytest.fixture
def parse(tmp_path):
    def parse(*argv):
        own = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]
        (args,) = HfArgumentParser(EFCPTrainingArguments).parse_args_into_dataclasses([*own, *argv])
        return args

    return parse


def test_there_is_a_field_with_help_for_every_option():
    fields = {f.name: f for f in dataclasses.fields(EFCPTrainingArguments) if f.name.startswith("efcp_")}
    options = {o for name in hf_efcp.list_optimizers() for o in options_of(name)}
    assert set(fields) == {f"efcp_{o}" for o in options | {"diagnostics_steps", "report"}}
    assert all(f.default is None and len(f.metadata["help"]) > 10 for f in fields.values())
    assert "efcp_sparse_ggt" in fields["efcp_density"].metadata["help"]
    assert "[a number in (0, 1]]" in fields["efcp_density"].metadata["help"]


@by_name
def test_without_fields_the_options_are_those_of_optim(name, make, make_args):
    assert make().optim == "efcp_lowrank_mfac"
    assert optimizer_cls_and_kwargs(make(optim=name)) == optimizer_cls_and_kwargs(make_args(optim=name))


def test_fields_are_typed(make, parse):
    given = {"efcp_rank": 8, "efcp_momentum": 0.5, "efcp_update_rms": 0.2, "efcp_save_window": False, "efcp_window_dtype": "bf16"}
    expected = {"rank": 8, "momentum": 0.5, "update_rms": 0.2, "save_window": False, "window_dtype": torch.bfloat16}
    argv = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    for args in (make(**given), parse(*argv)):
        kwargs = optimizer_cls_and_kwargs(args)[1]
        assert {o: kwargs[o] for o in expected} == expected
        assert get_optimizer_info("efcp_lowrank_mfac").merged(kwargs).window_size == LowRankMFAC.measured["window_size"]
    assert optimizer_cls_and_kwargs(parse("--efcp_update_rms", "none"))[1]["update_rms"] is None


def test_fields_and_optim_args_may_agree(make):
    args = make(efcp_rank=8, efcp_momentum=0.5, optim_args="rank=8,momentum=5e-1,window_size=16")
    kwargs = optimizer_cls_and_kwargs(args)[1]
    assert (kwargs["rank"], kwargs["momentum"], kwargs["window_size"]) == (8, 0.5, 16)


def test_a_preset_is_an_option_as_others_are(make, parse, make_args):
    for args in (
        make(efcp_preset="paper"),
        parse("--efcp_preset", "paper"),
        make_args(optim="efcp_lowrank_mfac", optim_args="preset=paper"),
    ):
        cls, kwargs = optimizer_cls_and_kwargs(args)
        assert kwargs == {"lr": 5e-5, "preset": "paper", "shard": "auto"}
        options = cls([torch.nn.Parameter(torch.ones(2, 2))], **kwargs).options
        assert options == dataclasses.replace(cls.options_type(), shard="auto")


def test_a_dtype_becomes_text_which_reporters_can_write(make):
    args = make(efcp_window_dtype=torch.bfloat16)
    assert json.loads(args.to_json_string())["efcp_window_dtype"] == "bfloat16"
    assert optimizer_cls_and_kwargs(args)[1]["window_dtype"] == torch.bfloat16


def test_a_field_that_no_optimizer_has(make):
    args = make()
    args.efcp_rnak = 3
    with pytest.raises(OptionError, match="unknown field 'efcp_rnak' for efcp_lowrank_mfac: did you mean 'efcp_rank'"):
        optimizer_cls_and_kwargs(args)


def test_arguments_survive_pickle_json_and_replace(make, tmp_path):
    args = make(efcp_rank=8)
    assert pickle.loads(pickle.dumps(args)).efcp_rank == 8
    assert json.loads(args.to_json_string())["efcp_rank"] == 8
    assert dataclasses.replace(args, efcp_rank=2).efcp_rank == 2
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).efcp_rank == 8
    assert make(optim="adamw_torch").optim == "adamw_torch"


# Each: the arguments, and what the message must say: option, value, what is allowed, the nearest name.
MISTAKES = [
    ({"optim": "efcp_lowrank"}, "efcp_lowrank.*efcp_lowrank_mfac"),
    ({"optim_args": "rnk=4"}, "unknown option 'rnk' for efcp_lowrank_mfac: did you mean 'rank'"),
    ({"optim_args": "density=0.1"}, "density='0.1': no option of efcp_lowrank_mfac, but of efcp_sparse_mfac"),
    ({"optim_args": "rank=four"}, "rank='four': expected an integer"),
    ({"optim_args": "rank=0"}, "rank=0: must be an integer >= 1"),
    ({"optim_args": "rank"}, "'rank' is not of the form name=value .example"),
    ({"optim_args": "rank=4;window_size=8"}, "with commas between them: rank=4,window_size=8"),
    ({"optim_args": "rank=4,rank=8"}, "'rank' is given twice"),
    ({"optim_args": '{"rank": 4'}, "not valid JSON"),
    ({"optim_args": "damping=-1"}, "damping=-1.0: must be a finite number > 0"),
    ({"optim_args": "save_window=maybe"}, "save_window='maybe': expected true or false"),
    ({"optim_args": "window_dtype=fp16"}, "window_dtype='fp16': expected one of .*bfloat16"),
    ({"efcp_preset": "papr"}, "preset='papr': must be paper or measured"),
    ({"optim_args": "lr=1e-3"}, "lr=0.001 contradicts learning_rate=5e-05; use --learning_rate"),
    ({"optim_args": "betas=0.9,0.95"}, "'0.95' is not of the form name=value"),
    ({"learning_rate": -1.0}, "lr=-1.0: must be a finite number >= 0"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1: must be a finite number >= 0"),
    ({"optim_target_modules": " "}, "optim_target_modules=' ': names no module"),
    ({"optim": "efcp_sparse_mfac", "optim_args": "density=1.5"}, r"density=1.5: must be a number in \(0, 1\]"),
    ({"optim": "efcp_sparse_mfac", "optim_args": "block_size=65536"}, r"block_size=65536: must be .*\[1, 32768\]"),
    ({"optim": "efcp_lowrank_ggt", "optim_args": "beta2=0"}, r"beta2=0.0: must be a number in \(0, 1\]"),
    ({"optim": "efcp_lowrank_ggt", "optim_args": "beta1=.9,window_momentum=.9"}, "are the same thing: give one of them"),
    (
        {"optim": "efcp_lowrank_ggt", "optim_args": "damping=1e-3"},
        "damping='1e-3': no option of .*_ggt, but of efcp_lowrank_mfac",
    ),
]
FIELD_MISTAKES = [
    ({"efcp_rank": 0}, "rank=0: must be an integer >= 1"),
    ({"efcp_rank": 8, "optim_args": "rank=4"}, "efcp_rank=8 contradicts rank='4' in optim_args: give one of them"),
    ({"optim": "efcp_sparse_mfac", "efcp_rank": 8}, "efcp_rank=8: no option of efcp_sparse_mfac, but of efcp_lowrank_mfac"),
    ({"optim": "adamw_torch", "efcp_rank": 8}, "efcp_rank: no effect with optim=adamw_torch; choose one of efcp_lowrank"),
    ({"efcp_scope": "block"}, "scope='block': must be model or layer"),
    ({"efcp_error_dtype": "int8"}, "error_dtype='int8': expected one of float64, float32, bfloat16"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES + FIELD_MISTAKES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_mistake_is_one_clear_line_and_writes_nothing(given, message, make, make_args, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make(**given)
    assert "\n" not in str(error.value)
    if not any(name.startswith("efcp_") for name in given):
        with pytest.raises(ValueError, match=message):
            make_args(**{"optim": "efcp_lowrank_mfac", **given})
    assert not list(tmp_path.iterdir())


def test_a_mistyped_flag_is_named(parse, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse("--efcp_rnak", "8")
    assert "efcp_rnak" in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_targets_that_match_nothing_fail_before_a_folder_is_made(make, tiny_bert, tmp_path):
    with pytest.raises(OptionError, match=r"'quary' matches no module .* did you mean 'query'"):
        EFCPTrainer(tiny_bert, make(optim_target_modules="quary"))
    assert not list(tmp_path.iterdir())
    stock = Trainer(tiny_bert, make(optim_target_modules="quary"), train_dataset=[])
    with pytest.raises(OptionError, match=r"'quary' matches no module .* did you mean 'query'"):
        stock.create_optimizer()
    assert not list((tmp_path / "out").iterdir())


def test_plain_training_arguments_have_no_fields(make_args):
    assert not [f.name for f in dataclasses.fields(TrainingArguments) if f.name.startswith("efcp_")]
    assert make_args().optim != "efcp_lowrank_mfac"


def test_the_fields_alone_change_no_default_of_another_config(tmp_path):
    @dataclasses.dataclass
    class Warm(TrainingArguments):
        learning_rate: float = 7e-4

    @dataclasses.dataclass
    class Config(EFCPFields, Warm):
        pass

    args = Config(str(tmp_path), optim="efcp_lowrank_mfac", efcp_rank=2, efcp_window_dtype=torch.bfloat16, use_cpu=True)
    assert (args.learning_rate, args.efcp_window_dtype) == (7e-4, "bfloat16")
    assert optimizer_cls_and_kwargs(args)[1]["rank"] == 2
    assert Config(str(tmp_path), use_cpu=True).optim == TrainingArguments(str(tmp_path), use_cpu=True).optim


def test_a_dtype_in_optim_args_can_be_written_as_json(make_args):
    args = make_args(optim="efcp_lowrank_mfac", optim_args={"window_dtype": torch.bfloat16, "rank": 2})
    assert json.loads(args.to_json_string())["optim_args"] == {"window_dtype": "bfloat16", "rank": 2}
    assert optimizer_cls_and_kwargs(args)[1]["window_dtype"] == torch.bfloat16


def test_a_mistyped_name_names_the_nearest(make_args):
    with pytest.raises(OptionError, match="unknown optimizer 'efcp_lowrnk_mfac': did you mean 'efcp_lowrank_mfac'"):
        make_args(optim="efcp_lowrnk_mfac")
