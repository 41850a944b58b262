"""Diagnostics every N steps, asked for by the callback, by a field or in optim_args; and where Accelerate has wrapped us."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

import hf_efcp
from hf_efcp import EFCPCallback, EFCPTrainer, EFCPTrainingArguments, OptionError
from hf_efcp.engine.base import EngineOptimizer
from hf_efcp.integrations.callback import DIAGNOSTICS_STEPS
from hf_efcp.registry import get_optimizer_info
from tests.reference import NAMES, each, info, names

by_name = pytest.mark.parametrize("name", each())
PROBED = "efcp_cosine_update_gradient"


@pytest.fixture
def train(make_args, tiny_bert, token_data):
    """Train for 5 steps with a log at each second one; the history, and the trainer."""

    def train(trainer_class=Trainer, arguments=None, callbacks=(), **given):
        few = {"max_steps": 5, "logging_steps": 2, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
        args = (arguments or make_args)(**{"optim": NAMES[0], **few, **given})
        trainer = trainer_class(tiny_bert, args, train_dataset=token_data, callbacks=list(callbacks))
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log], trainer

    return train


@pytest.fixture
def fields(tmp_path):
    return lambda **given: EFCPTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], **given)


def probed_at(history):
    return [log["step"] for log in history if PROBED in log]


@by_name
def test_optim_args_switch_it_on_for_an_unmodified_script(name, train):
    history, trainer = train(optim=name, optim_args="diagnostics_steps=3")
    assert [log["step"] for log in history] == [2, 3, 4, 5]
    assert probed_at(history) == [3, 5]
    assert all(0 < log["efcp_angle_update_gradient"] < 180 for log in history if PROBED in log)
    assert ("efcp_condition" in history[1]) == info(name).windowed
    assert all(isinstance(value, int | float) for log in history for value in log.values())
    assert trainer.optimizer.memory_footprint() == trainer.optimizer.optimizer.memory_footprint()


def test_without_it_the_stock_trainer_logs_as_ever(train):
    history, _ = train()
    assert [log["step"] for log in history] == [2, 4]
    assert not any(key.startswith("efcp_") for log in history for key in log)


@pytest.mark.parametrize(("steps", "expected"), [(None, [5]), (2, [2, 4, 5]), (0, [])])
def test_a_field_says_how_often(steps, expected, train, fields):
    history, _ = train(EFCPTrainer, fields, efcp_diagnostics_steps=steps)
    assert probed_at(history) == expected
    assert all("efcp_skipped_steps" in log for log in history)


def test_the_callback_says_how_often_and_stands_before_the_reporters(train):
    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen = []
    history, trainer = train(callbacks=[Reporter(), EFCPCallback(every=4)])
    assert probed_at(history) == [4, 5] == [round(i) for i, log in zip((4, 5), seen[1:], strict=False) if PROBED in log]
    order = [type(c) for c in trainer.callback_handler.callbacks]
    assert order[0] is EFCPCallback and order.count(EFCPCallback) == 1 and ProgressCallback not in order[:1]


def test_a_probed_run_is_the_same_run(train, tiny_bert):
    start = {n: p.detach().clone() for n, p in tiny_bert.named_parameters()}
    ends = []
    for optim_args in (None, "diagnostics_steps=1"):
        tiny_bert.load_state_dict(start, strict=False)
        train(optim_args=optim_args)
        ends.append([p.detach().clone() for p in tiny_bert.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_steps_that_are_not_due_are_not_probed(train, monkeypatch):
    asked = []
    monkeypatch.setattr(EngineOptimizer, "probe_next_step", lambda self: asked.append(1))
    history, _ = train(EFCPTrainer, optim_args="diagnostics_steps=100")
    assert len(asked) == 1 and len(history) == 3  # the last step; logs at 2, 4 and 5


def test_another_optimizer_has_no_diagnostics_and_no_further_logs(train):
    history, trainer = train(optim="adamw_torch", callbacks=[EFCPCallback(every=1)])
    assert [log["step"] for log in history] == [2, 4]
    with pytest.raises(AttributeError, match="memory_footprint"):
        trainer.optimizer.memory_footprint()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim_args": "diagnostics_steps=-1"}, "diagnostics_steps=-1: .*an integer >= 0"),
        ({"optim_args": "diagnostics_steps=few"}, "diagnostics_steps='few': expected an integer"),
        ({"optim_args": "diagnostic_steps=5"}, "unknown option 'diagnostic_steps'.*did you mean 'diagnostics_steps'"),
        ({"optim_args": "report=maybe"}, "report='maybe': expected true or false"),
        ({"efcp_diagnostics_steps": 5, "optim_args": "diagnostics_steps=6"}, "efcp_diagnostics_steps=5 contradicts"),
        ({"efcp_diagnostics_steps": -5}, "diagnostics_steps=-5"),
        ({"efcp_diagnostics_steps": 5, "optim": "adamw_torch"}, "efcp_diagnostics_steps: no effect with optim=adamw_torch"),
        ({"efcp_diagnostic_steps": 5}, "did you mean 'efcp_diagnostics_steps'"),
    ],
)
def test_bad_input_is_refused_at_once(given, message, fields):
    with pytest.raises(OptionError, match=message):
        fields(**given)


@pytest.mark.parametrize("every", [-1, 0.5, True, "10"])
def test_the_callback_refuses_a_bad_number(every):
    with pytest.raises(OptionError, match="every="):
        EFCPCallback(every=every)
    assert EFCPCallback().every == DIAGNOSTICS_STEPS


@by_name
def test_an_accelerate_loop_logs_the_same(name):
    model, accelerator = torch.nn.Linear(6, 5), Accelerator(cpu=True)
    optimizer = get_optimizer_info(name).cls(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        optimizer.probe_next_step()
        accelerator.backward(model(torch.ones(3, 6)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    logged = hf_efcp.diagnostics(optimizer)
    assert PROBED in logged and all(type(value) is float for value in logged.values())
    assert logged == {f"efcp_{key}": value for key, value in optimizer.diagnostics().items()}
    assert optimizer.memory_footprint() == optimizer.optimizer.memory_footprint()
    assert hf_efcp.diagnostics(torch.optim.SGD(model.parameters(), lr=0.1)) == {}


def test_windowless_methods_say_what_they_have():
    for name in names(windowed=False):
        p = torch.nn.Parameter(torch.ones(40, 30))
        optimizer = get_optimizer_info(name).cls([p], lr=1e-2)
        p.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        optimizer.probe_next_step()
        optimizer.step()
        figures = optimizer.diagnostics()
        assert {"compression_error", "error_mass", "update_rms_matrix", "scale_q50"} <= figures.keys()
        assert not {"condition", "kappa", "weight_age_0"} & figures.keys()
