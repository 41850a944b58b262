"""--optim_args: typed, checked, and checked early."""

import pytest
from transformers import Trainer

import hf_efcp
from hf_efcp import OptionError, optimizer_cls_and_kwargs
from hf_efcp.registry import get_optimizer_info
from tests.reference import names

by_name = pytest.mark.parametrize("name", hf_efcp.list_optimizers())
by_windowed_name = pytest.mark.parametrize("name", names(windowed=True))


@by_name
def test_the_defaults_are_those_of_the_registry(name, make_args):
    info = get_optimizer_info(name)
    expected = {"lr": 3e-4, "preset": "measured", "shard": "auto"}
    for optim_args in (None, "", {}):
        args = make_args(optim=name, optim_args=optim_args, learning_rate=3e-4)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert (cls, kwargs) == (info.cls, expected)
        assert Trainer.get_optimizer_cls_and_kwargs(args, None)[1] is not kwargs  # the Trainer pops from it


@by_windowed_name
@pytest.mark.parametrize(
    "optim_args",
    [
        "window_size=8,window_momentum=1e-1,update_rms=none,scope=layer",
        " window_size = 8, window_momentum = 1e-1 , update_rms=None, scope=layer, ",
        "window_size=8,window_momentum=1e-1,update_rms=null,scope=layer",
        '{"window_size": 8, "window_momentum": 1e-1, "update_rms": null, "scope": "layer"}',
        {"window_size": 8, "window_momentum": 0.1, "update_rms": None, "scope": "layer"},
    ],
    ids=["text", "spaces", "null", "json", "dict"],
)
def test_every_form_gives_the_same_typed_options(name, optim_args, make_args):
    args = make_args(optim=name, optim_args=optim_args)
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    expected = {"lr": 5e-5, "window_size": 8, "window_momentum": 1e-1, "update_rms": None, "scope": "layer"}
    assert kwargs == {"preset": "measured", "shard": "auto", **expected}
    assert [type(v) for v in (kwargs["window_size"], kwargs["window_momentum"])] == [int, float]


@by_windowed_name
@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("windw_size=8", "unknown option 'windw_size' for efcp_.*did you mean 'window_size'.*valid: .*window_momentum"),
        ("window_size=8.5", "window_size='8.5': expected an integer"),
        ("window_size=0", "window_size=0: must be an integer >= 1"),
        ("window_momentum=nan", "window_momentum=nan: must be a number"),
        ("preset=papr", "preset='papr': must be paper or measured"),
        ("scope=block", "scope='block': must be model or layer"),
        ("window_size", "'window_size' is not of the form name=value"),
        ("window_size=8,window_size=9", "'window_size' is given twice"),
        ("window_size=8 scope=layer", "with commas between them: window_size=8,scope=layer"),
        ("window_size=8;scope=layer", "with commas between them: window_size=8,scope=layer"),
        ('{"window_size": 8', "not valid JSON"),
        ('{"window_size": [8]}', r"window_size=\[8\]: expected an integer"),
        (["window_size=8"], "expected text"),
        ("lr=1e-3", "lr=0.001 contradicts learning_rate=5e-05; use --learning_rate"),
        ("weight_decay=0.1", "weight_decay=0.1 contradicts weight_decay=0.0; use --weight_decay"),
    ],
)
def test_a_bad_option_fails_when_the_arguments_are_made(name, optim_args, message, make_args, tmp_path):
    with pytest.raises(OptionError, match=message):
        make_args(optim=name, optim_args=optim_args)
    assert not list(tmp_path.iterdir())


@by_windowed_name
def test_options_that_repeat_an_argument_are_accepted(name, make_args):
    args = make_args(optim=name, optim_args="lr=1e-3,weight_decay=0.1", learning_rate=1e-3, weight_decay=0.1)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["lr"] == 1e-3


def test_arguments_changed_later_are_checked_before_training(make_args, tiny_bert):
    args = make_args(optim="efcp_lowrank_mfac")
    args.optim_args = "rnk=4"
    with pytest.raises(OptionError, match="did you mean 'rank'"):
        Trainer(tiny_bert, args).create_optimizer()


@pytest.mark.parametrize("optim_args", [None, "no_such_option=1"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop"])
def test_other_optimizers_are_untouched(optim, optim_args, make_args):
    args = make_args(optim=optim, optim_args=optim_args, optim_target_modules="all-linear")
    original = Trainer.get_optimizer_cls_and_kwargs._hf_efcp_original
    assert Trainer.get_optimizer_cls_and_kwargs(args) == original(args, None)


def test_the_errors_of_other_optimizers_are_untouched(make_args):
    args = make_args(optim="adamw_torch", optim_args="a=b=c")
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        Trainer.get_optimizer_cls_and_kwargs(args)
    assert not isinstance(error.value, OptionError)


@by_windowed_name
def test_the_public_fallback(name, make_args, tiny_bert):
    cls, kwargs = optimizer_cls_and_kwargs(make_args(optim=name))
    args = make_args(optim="adamw_torch")
    assert optimizer_cls_and_kwargs(args, name) == (cls, kwargs)
    optimizer = Trainer(tiny_bert, args, optimizer_cls_and_kwargs=(cls, kwargs)).create_optimizer()
    assert type(optimizer) is cls


def test_the_fallback_refuses_a_name_that_is_not_ours(make_args):
    with pytest.raises(OptionError, match="unknown optimizer 'adamw_torch'"):
        optimizer_cls_and_kwargs(make_args(optim="adamw_torch"))
