"""What programs read from a constructor, and how they call it: help(), editors, jsonargparse, torchtune."""

import copy
import dataclasses
import inspect
import pickle
import typing

import pytest
import torch

from hf_efcp import OptionError, create_optimizer
from hf_efcp.options import GroupOptions, field_types
from hf_efcp.registry import all_optimizers
from tests.reference import known_to

INFOS = pytest.mark.parametrize("info", all_optimizers(), ids=lambda info: info.name)


def weights():
    return [torch.nn.Parameter(torch.ones(4, 5))]


def size_of(info):
    """The option that says how much the method keeps."""
    return next(option for option in ("window_size", "rank", "block_size") if option in info.options())


@INFOS
def test_the_constructor_spells_out_every_option(info):
    signature = inspect.signature(info.cls.__init__)
    assert inspect.signature(info.cls).parameters == {n: p for n, p in signature.parameters.items() if n != "self"}
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature.parameters.values())
    defaults = info.cls.options_type()
    for name, kind in field_types(info.cls.options_type).items():
        assert signature.parameters[name].default == getattr(defaults, name)
        read = typing.get_args(signature.parameters[name].annotation) or (signature.parameters[name].annotation,)
        assert set(typing.get_args(kind) or (kind,)) <= set(read)
    assert typing.get_type_hints(info.cls.__init__)["lr"] == float | None
    assert signature.parameters["lr"].default is None, "each group has its own"
    assert (info.cls.__init__.__module__, info.cls.__init__.__qualname__) == (
        info.cls.__module__,
        f"{info.cls.__name__}.__init__",
    )


@INFOS
def test_a_constructor_of_ones_own(info):
    option = size_of(info)

    class Smaller(info.cls):
        def __init__(self, params, size=3):
            super().__init__(params, 0.1, **{option: size})

    assert list(inspect.signature(Smaller).parameters) == ["params", "size"]
    optimizer = Smaller(weights(), 2)
    assert getattr(optimizer.options, option) == 2
    optimizer = info.cls(weights(), 0.1, **{option: 4})
    assert getattr(copy.deepcopy(optimizer).options, option) == 4
    assert getattr(pickle.loads(pickle.dumps(optimizer)).options, option) == 4


@INFOS
def test_a_program_that_fills_in_all_defaults_leaves_the_preset_in_force(info, caplog):
    """LightningCLI passes every argument, and nobody can tell its user's from the defaults."""
    defaults = {n: p.default for n, p in inspect.signature(info.cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    momentum = {"window_momentum" if info.windowed else "beta1": 0.5}
    given = {**defaults, "preset": "measured", **momentum}
    filled = info.cls(weights(), 0.1, **given)
    assert "all options are given" in caplog.text
    assert filled.options == info.cls(weights(), 0.1, preset="measured", **momentum).options
    assert filled.builder.asked.given == {"preset", *momentum}
    caplog.clear()
    assert info.cls(weights(), 0.1, **defaults).options == info.cls(weights(), 0.1).options
    assert not caplog.text


@INFOS
def test_a_program_that_fills_in_all_defaults_goes_on_with_the_checkpoints_options(info, caplog):
    """Also where its user wrote a default out: docs/clients.md says so, and the log says what was taken."""
    defaults = {n: p.default for n, p in inspect.signature(info.cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    there, option = weights(), size_of(info)
    saved = info.cls(there, 0.1, **{option: 3})
    there[0].grad = torch.ones(4, 5)
    saved.step()
    optimizer = info.cls(weights(), 0.1, **defaults)
    optimizer.load_state_dict(saved.state_dict())
    assert getattr(optimizer.options, option) == 3 and f"from the checkpoint: {option}=3" in caplog.text
    with pytest.raises(OptionError, match=f"checkpoint was made with {option}=3"):
        info.cls(weights(), 0.1, **{**defaults, option: 2}).load_state_dict(saved.state_dict())


@INFOS
def test_options_of_one_optimizer_make_another(info):
    """Not a program's defaults: a value that the class has by default, given under a preset that has another, is kept."""
    option = "window_size" if info.windowed else next(iter(info.cls.measured), size_of(info))
    kept = getattr(info.cls.options_type(), option)
    options = info.cls(weights(), 0.1, preset="measured", **{option: kept}).options
    assert getattr(options, option) == kept
    again = dataclasses.asdict(options)
    assert info.cls(weights(), 0.1, weight_decay=0.0, **again).options == options
    assert create_optimizer(info.name, weights(), lr=0.1, weight_decay=0.0, **again).options == options


@INFOS
def test_the_parameters_may_come_first(info):
    optimizer = create_optimizer(weights(), name=info.name, lr=0.1, **{size_of(info): 4})  # torchtune's way
    assert type(optimizer) is info.cls and getattr(optimizer.options, size_of(info)) == 4
    assert type(create_optimizer(name=info.name, model_or_params=torch.nn.Linear(2, 3), lr=0.1)) is info.cls
    with pytest.raises(OptionError, match="unknown optimizer 'efcp_x'"):
        create_optimizer(weights(), name="efcp_x", lr=0.1)
    with pytest.raises(TypeError):
        create_optimizer(info.name, weights(), None, lr=0.1)
    assert list(inspect.signature(create_optimizer).parameters) == ["name", "model_or_params", "process_group", "options"]


@INFOS
def test_a_command_line_made_of_the_constructor(info):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"}, instantiate=False)
    some = known_to(info.name, {"error_dtype": "bfloat16", "memory_budget": "1MiB"})
    asked = {size_of(info): 4, **some, "preset": "measured"}
    argv = [f"--optimizer=hf_efcp.{info.cls.__name__}", "--optimizer.lr=0.1"]
    argv += [f"--optimizer.{option}={value}" for option, value in asked.items()]
    given = parser.parse_args(argv).optimizer.init_args
    assert {f.name for t in (GroupOptions, info.cls.options_type) for f in dataclasses.fields(t)} <= set(vars(given))
    optimizer = info.cls(weights(), **given)
    expected = {size_of(info): 4, **known_to(info.name, {"error_dtype": torch.bfloat16, "memory_budget": 2**20})}
    assert {option: getattr(optimizer.options, option) for option in expected} == expected
    assert optimizer.builder.asked.given == asked.keys()
    with pytest.raises(jsonargparse.ArgumentError, match="windw_size"):
        parser.parse_args([*argv, "--optimizer.windw_size=4"])
