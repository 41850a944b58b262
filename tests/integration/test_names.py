"""Our names in transformers' enum, in its arguments and in pickles."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import types
import warnings

import accelerate
import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_efcp
from hf_efcp.integrations import names, patches, trainer_options

NAMES = hf_efcp.list_optimizers()
BUILT_IN = [n for n in OptimizerNames if n.value not in NAMES]
by_name = pytest.mark.parametrize("name", NAMES)


def test_the_private_attributes_exist():
    original = Trainer.get_optimizer_cls_and_kwargs._hf_efcp_original
    assert list(inspect.signature(original).parameters) == ["args", "model"]
    assert isinstance(vars(Trainer)["get_optimizer_cls_and_kwargs"], staticmethod)
    assert TrainingArguments.__post_init__._hf_efcp_original.__module__ == "transformers.training_args"
    for name, parameters in (
        ("_save_optimizer_and_scheduler", ["output_dir"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
    ):
        assert list(inspect.signature(getattr(Trainer, name)._hf_efcp_original).parameters) == ["self", *parameters]
    assert list(inspect.signature(Trainer.get_decay_parameter_names).parameters) == ["self", "model"]
    assert list(inspect.signature(Accelerator.prepare_optimizer._hf_efcp_original).parameters)[:2] == ["self", "optimizer"]
    for module in (transformers.trainer, accelerate.accelerator):
        parameters = list(inspect.signature(module.load_fsdp_optimizer._hf_efcp_original).parameters)
        assert parameters[:6] == ["fsdp_plugin", "accelerator", "optimizer", "model", "input_dir", "optimizer_index"]
    assert issubclass(OptimizerNames, str)
    for attribute in ("_member_map_", "_value2member_map_", "_member_names_"):
        assert "ADAMW_TORCH" in str(getattr(OptimizerNames, attribute))
    if Version(transformers.__version__).major >= 5:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS

        assert OptimizerNames.ADAMW_TORCH in _OPTIMIZER_HANDLERS
        assert set(NAMES) < set(_OPTIMIZER_HANDLERS)


@by_name
def test_enum_member(name):
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper()) is OptimizerNames(member)
    assert isinstance(member, OptimizerNames)
    assert vars(OptimizerNames)[name.upper()] is member  # where Python 3.12+ looks
    assert (member, member.name, member.value, hash(member)) == (name, name.upper(), name, hash(name))
    assert list(OptimizerNames).count(member) == 1
    assert len(OptimizerNames) == len(list(OptimizerNames)) == len(BUILT_IN) + len(NAMES)
    with pytest.raises(ValueError, match=name):
        OptimizerNames("no_such_optimizer")


@by_name
def test_pickle_and_copy_give_the_same_member(name, make_args):
    member = OptimizerNames(name)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    args = make_args(optim=name)
    assert copy.deepcopy(args).optim is pickle.loads(pickle.dumps(args)).optim is member


def test_built_in_names_pickle_as_before():
    for member in BUILT_IN:
        data = pickle.dumps(member)
        assert b"hf_efcp" not in data
        assert pickle.loads(data) is member


@by_name
def test_training_arguments(name, make_args):
    args = make_args(optim=name, optim_args="shard=off")
    assert args.optim is OptimizerNames(name)
    replaced = dataclasses.replace(args, learning_rate=1e-3)
    assert (replaced.optim, replaced.learning_rate) == (name, 1e-3)
    assert json.loads(args.to_json_string())["optim"] == name
    assert args.to_dict()["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    assert make_args().set_optimizer(name=name).optim == name


@by_name
def test_argument_parser(name, tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (args,) = parser.parse_args_into_dataclasses([*argv, "--optim", name, "--optim_args", '{"shard": "off"}'])
    assert (args.optim, args.optim_args) == (name, '{"shard": "off"}')
    assert parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "optim": name})[0].optim == name
    (choices,) = (a.choices for a in parser._actions if a.dest == "optim")
    assert set(NAMES) < set(choices)


def test_argument_parser_refuses_other_names(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", "efcp_lowrank"])
    assert "efcp_lowrank_mfac" in capsys.readouterr().err


def test_training_args_bin_loads_in_a_process_that_never_heard_of_us(make_args, tmp_path, python):
    torch.save([make_args(optim=name) for name in NAMES], tmp_path / "training_args.bin")
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import Trainer\n"
        "assert 'hf_efcp' not in sys.modules\n"
        "for args in torch.load('training_args.bin', weights_only=False):\n"
        "    print(args.optim.value, Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{n} {hf_efcp.registry.get_optimizer_info(n).cls.__name__}" for n in NAMES]


def test_names_pickled_before_patches_py_was_there_load(tmp_path, python):
    """As hf_efcp wrote them: a reference to hf_efcp.integrations.names._restore, in a process that has not imported us."""
    for i, name in enumerate(NAMES):
        data = b"\x80\x02chf_efcp.integrations.names\n_restore\nX%c\x00\x00\x00%b\x85R." % (len(name), name.encode())
        assert pickle.loads(data) is OptimizerNames(name)
        (tmp_path / f"{i}.pickle").write_bytes(data)
    read = "[pickle.load(open(f'{i}.pickle', 'rb')) for i in range(" + f"{len(NAMES)})]"
    done = python("-c", f"import pickle; print({read})")
    assert (done.returncode, done.stdout) == (0, f"{[OptimizerNames(name) for name in NAMES]!r}\n"), done.stderr


def test_a_training_args_bin_written_before_patches_py_was_there_loads(make_args, tmp_path, python, monkeypatch):
    monkeypatch.setattr(patches._restore, "__module__", "hf_efcp.integrations.names")
    args = make_args(optim=NAMES[0], optim_args="window_size=8")
    assert b"hf_efcp.integrations.names" in pickle.dumps(args) and b"patches" not in pickle.dumps(args)
    torch.save(args, tmp_path / "training_args.bin")
    done = python("-c", "import torch; print(torch.load('training_args.bin', weights_only=False).optim.value)")
    assert (done.returncode, done.stdout) == (0, f"{NAMES[0]}\n"), done.stderr


def test_the_former_place_of_the_public_function():
    assert names.optimizer_cls_and_kwargs is trainer_options.optimizer_cls_and_kwargs is hf_efcp.optimizer_cls_and_kwargs


def test_registering_again_and_reloading_change_nothing(make_args):
    def state():
        return [
            [id(member) for member in OptimizerNames],
            Trainer.get_optimizer_cls_and_kwargs._hf_efcp_original,
            TrainingArguments.__post_init__._hf_efcp_original,
            len(importlib.import_module("sys").meta_path),
        ]

    before = state()
    hf_efcp.register()
    importlib.reload(patches)
    importlib.reload(hf_efcp)
    assert state() == before
    args = make_args(optim=NAMES[0])
    assert pickle.loads(pickle.dumps(args)).optim is args.optim
    assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is hf_efcp.registry.get_optimizer_info(NAMES[0]).cls


def test_import_is_silent_light_and_without_side_effects(tmp_path, python):
    script = tmp_path / "silent.py"
    script.write_text(
        "import random, sys, torch\n"
        "def state():\n"
        "    return (random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),\n"
        "            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),\n"
        "            torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled())\n"
        "before = state()\n"
        "import hf_efcp\n"
        "assert state() == before\n"
        "heavy = {'transformers', 'accelerate', 'datasets', 'triton', 'numba', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import transformers.training_args as module\n"
        "assert set(hf_efcp.list_optimizers()) < set(module.OptimizerNames)\n"
        "importlib = __import__('importlib')\n"
        "assert set(hf_efcp.list_optimizers()) < set(importlib.reload(module).OptimizerNames)\n"
    )
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_adds_less_than_a_tenth_to_that_of_transformers(tmp_path, python):
    script = tmp_path / "timed.py"
    script.write_text(
        "import time\n"
        "start = time.process_time()\n"
        "import transformers.trainer\n"
        "middle = time.process_time()\n"
        "import hf_efcp\n"
        "print((time.process_time() - middle) / (middle - start))\n"
    )
    assert 0 < float(python(script).stdout) < 0.1


@pytest.mark.parametrize("module", ["transformers.training_args", "transformers.trainer"])
def test_a_transformers_without_the_private_parts_gives_one_warning(module, monkeypatch):
    monkeypatch.setattr(patches, "_warned", False)
    future = types.ModuleType(module)
    future.OptimizerNames = future.Trainer = type("Empty", (), {})
    with pytest.warns(UserWarning, match=r"Trainer\(optimizer_cls_and_kwargs=hf_efcp\.optimizer_cls_and_kwargs\(args\)\)"):
        patches._apply(future)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches._apply(future)
