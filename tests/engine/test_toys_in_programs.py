"""The methods of tests/toys.py in the programs of Hugging Face, without a line of their own there."""

import re

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import hf_efcp
from hf_efcp import EFCPCallback, OptionError
from tests import toys
from tests.distributed.fsdp2 import runs_models
from tests.distributed.processes import run
from tests.engine.toy_programs import (
    EXACT,
    NAMES,
    SAVED,
    STEPS,
    advance,
    divided_between_two,
    everything,
    known_to_transformers,
    loop,
    losses,
    probabilities,
    trained_by_two,
    trainer,
)
from tests.integration.conftest import one_thread, python  # noqa: F401
from tests.optim.helpers import differences, snapshot
from tests.reference import relative

BY_NAME = pytest.mark.parametrize("name", NAMES)
CLASSES = {"efcp_toy_mean": toys.ToyMean, "efcp_toy_factors": toys.ToyFactors}


@pytest.fixture(autouse=True)
def registered():
    with known_to_transformers():
        yield


@BY_NAME
def test_trainer_trains_saves_and_resumes_bit_for_bit(name, tmp_path):
    out, again = trainer(tmp_path / "out", name), trainer(tmp_path / "again", name, seed=1)
    out.train()
    assert type(out.optimizer.optimizer) is CLASSES[name]
    assert sum(losses(out)[-4:]) < 0.8 * sum(losses(out)[:4])
    again.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}"))
    assert differences(everything(out), everything(again)) == []
    assert len(losses(again)) == STEPS


MISTAKES = [
    ("efcp_toy_mean", "densty=0.1", "unknown option 'densty' for efcp_toy_mean: did you mean 'density'"),
    ("efcp_toy_factors", "mean_dcay=0.1", "unknown option 'mean_dcay' for efcp_toy_factors: did you mean 'mean_decay'"),
    ("efcp_toy_factors", "mean_decay=1", r"mean_decay=1\.0: must be a number in \[0, 1\)"),
    ("efcp_toy_factors", "rank=0", "rank=0: must be an integer >= 1"),
    ("efcp_toy_factors", "window_size=4", "window_size='4': no option of efcp_toy_factors, but of .*efcp_toy_mean"),
    ("efcp_toy_mean", "rank=2", "rank='2': no option of efcp_toy_mean, but of .*efcp_toy_factors"),
    ("efcp_toy_mean", "comm=factors", "comm='factors': no option of efcp_toy_mean, but of efcp_lowrank_mfac, efcp_lowrank_ggt"),
    ("efcp_toy_factors", "comm=factors", "comm='factors': no option of efcp_toy_factors, but of efcp_lowrank_mfac"),
    ("efcp_toy_factors", "memory_budget=1GiB", "memory_budget='1GiB': no option of efcp_toy_factors, but of "),
    ("efcp_toy_factor", "rank=2", "unknown optimizer 'efcp_toy_factor': did you mean 'efcp_toy_factors'"),
]


@pytest.mark.parametrize(("name", "optim_args", "message"), MISTAKES, ids=lambda x: x[:30])
def test_a_mistake_is_one_clear_line_before_anything_is_written(name, optim_args, message, tmp_path):
    with pytest.raises(OptionError, match=message) as error:
        TrainingArguments(str(tmp_path / "out"), optim=name, optim_args=optim_args, use_cpu=True)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("callback", [False, True], ids=["EFCPTrainer", "EFCPCallback"])
@BY_NAME
def test_diagnostics_are_logged(name, callback, tmp_path):
    few = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    made = trainer(tmp_path, name, Trainer if callback else hf_efcp.EFCPTrainer, **few)
    if callback:
        made.add_callback(EFCPCallback())
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert [(entry["efcp_step"], entry["efcp_skipped_steps"]) for entry in logged] == [(2, 0), (4, 0)]
    assert all(entry["efcp_error_norm"] > 0 for entry in logged)
    assert all(("efcp_kappa" in entry) == (name == "efcp_toy_mean") for entry in logged)
    expected = {f"efcp_{figure}": value for figure, value in made.optimizer.optimizer.diagnostics().items()}
    assert {k: v for k, v in logged[-1].items() if k.startswith("efcp_")} == expected


@BY_NAME
def test_an_accelerate_loop_saves_and_goes_on_bit_for_bit(name, tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = loop(accelerator, name, seed=0)
    first = advance(accelerator, model, optimizer, 0, SAVED)
    accelerator.save_state(tmp_path)
    end = advance(accelerator, model, optimizer, SAVED, STEPS)
    assert sum(end[-4:]) < 0.8 * sum(first[:4])
    expected, figures = snapshot(optimizer.optimizer, list(model.parameters())), optimizer.optimizer.diagnostics()
    accelerator.free_memory()
    model, optimizer = loop(accelerator, name, seed=1)
    advance(accelerator, model, optimizer, 5, 6)  # a state that must not survive
    accelerator.load_state(tmp_path)
    assert advance(accelerator, model, optimizer, SAVED, STEPS) == end
    assert differences(expected, snapshot(optimizer.optimizer, list(model.parameters()))) == []
    assert optimizer.optimizer.diagnostics() == figures


FIELDS = """
import dataclasses, pickle, sys
import hf_efcp
from tests import toys
toys.register()
hf_efcp.register()
from transformers import HfArgumentParser
from hf_efcp import EFCPTrainer, EFCPTrainingArguments, OptionError, optimizer_cls_and_kwargs
from tests.engine.toy_programs import losses, trainer

help = {f.name: f.metadata["help"] for f in dataclasses.fields(EFCPTrainingArguments) if f.name.startswith("efcp_")}
print(help["efcp_mean_decay"])
own = ["--output_dir", "out", "--use_cpu", "--report_to", "none", "--optim", "efcp_toy_factors"]
parser = HfArgumentParser(EFCPTrainingArguments)
(args,) = parser.parse_args_into_dataclasses([*own, "--efcp_mean_decay", "0.9", "--efcp_rank", "3"])
kwargs = optimizer_cls_and_kwargs(pickle.loads(pickle.dumps(args)))[1]
print(kwargs["mean_decay"], kwargs["rank"], "window_size" in kwargs)
given = {"optim_args": None, "efcp_mean_decay": 0.9, "efcp_error_dtype": "bf16", "max_steps": 3, "save_strategy": "no"}
made = trainer("out", "efcp_toy_factors", EFCPTrainer, EFCPTrainingArguments, **given)
made.train()
print(made.optimizer.optimizer.options.mean_decay, made.optimizer.optimizer.options.error_dtype, len(losses(made)))
for name, wrong in (("efcp_toy_mean", {"efcp_mean_decay": 0.9}), ("efcp_toy_factors", {"efcp_window_size": 4})):
    try:
        EFCPTrainingArguments("out", use_cpu=True, optim=name, **wrong)
    except OptionError as error:
        print(error)
"""


def test_typed_fields_where_their_module_is_imported_after_registration(tmp_path, python):  # noqa: F811
    (tmp_path / "script.py").write_text(FIELDS)
    done = python("script.py")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("{", "["))]  # a program's log
    assert lines[0] == "b, decay of the mean [a number in [0, 1)] (efcp_toy_factors); unless given: 0.5"
    assert lines[1:3] == ["0.9 3 False", "0.9 torch.bfloat16 3"]
    assert re.fullmatch("efcp_mean_decay=0.9: no option of efcp_toy_mean, but of efcp_toy_factors", lines[3])
    assert re.fullmatch("efcp_window_size=4: no option of efcp_toy_factors, but of efcp_lowrank_mfac, .*efcp_toy_mean", lines[4])


def test_trainer_on_two_processes_trains_as_one_and_resumes_bit_for_bit(tmp_path):
    everybody = run(2, trained_by_two, str(tmp_path / "two"))
    for name in NAMES:
        alone = trainer(tmp_path / "one", name, dtype=torch.float64, optim_args=EXACT[name])
        alone.train()
        expected = probabilities(alone.model.parameters())
        for results in everybody:
            out, again, plan, wrapper = results[name]
            assert wrapper == "DistributedDataParallel" and plan.startswith("rank 0: ")
            assert differences(out, again) == []
            params = [value for key, value in out.items() if key.startswith("parameter ")]
            assert relative(probabilities(params), expected) < 1e-9
        folder = tmp_path / f"two/{name}/out/checkpoint-{SAVED}/efcp_optim"
        assert sorted(path.name for path in folder.iterdir()) == ["index.json", "rank_0.safetensors", "rank_1.safetensors"]


@runs_models
def test_fsdp2_under_accelerate_goes_on_bit_for_bit(tmp_path):
    for results in run(2, divided_between_two, str(tmp_path)):
        for name in NAMES:
            first, end, again, divided = results[name]
            assert divided and end == again
            assert sum(end[-4:]) < 0.8 * sum(first[:4])
