"""Trainer writes the report at the end, and the record on the way."""

import json

import pytest
from transformers import Trainer

from hf_efcp import EFCPTrainer, EFCPTrainingArguments, OptionError
from hf_efcp.integrations import run_options
from hf_efcp.report.read import read
from tests.reference import NAMES

FEW = {"max_steps": 4, "logging_steps": 2, "disable_tqdm": True, "use_cpu": True, "report_to": []}


def test_a_field_asks_for_it(tmp_path, tiny_bert, token_data, monkeypatch):
    pytest.importorskip("matplotlib")
    args = EFCPTrainingArguments(str(tmp_path), efcp_report=True, save_steps=2, efcp_window_size=4, **FEW)
    trainer = EFCPTrainer(tiny_bert, args, train_dataset=token_data, eval_dataset=token_data)
    trainer.train()
    before = (tmp_path / "report.html").read_text()
    assert "eval_loss" not in before and "efcp_lowrank_mfac" in before
    trainer.evaluate()  # what comes after is taken up
    assert "eval_loss" in (tmp_path / "report.html").read_text()
    (run,) = read([tmp_path])
    assert run.optimizer["memory"] == trainer.optimizer.memory_footprint()
    assert run.optimizer["options"]["window_size"] == "4" and run.exact
    assert [step for step, _ in run.times] == [2, 4] and run.times[0][1] < run.times[1][1]
    assert run.diagnostics["angle_update_gradient"].steps == (4,)
    assert run.share > 0

    monkeypatch.setattr("hf_efcp.report.page.write", lambda folders, file: None)
    resumed = EFCPTrainer(tiny_bert, args, train_dataset=token_data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    times = read([tmp_path])[0].times
    assert [step for step, _ in times] == [2, 4] and times[0] == run.times[0] and times[1][1] > times[0][1]


@pytest.mark.parametrize("name", [NAMES[0], "adamw_torch"])
def test_optim_args_ask_for_it_with_any_optimizer(name, tmp_path, make_args, tiny_bert, token_data):
    pytest.importorskip("matplotlib")
    args = make_args(optim=name, optim_args="report=true", save_strategy="no", **FEW)
    Trainer(tiny_bert, args, train_dataset=token_data).train()
    found = json.loads((tmp_path / "out" / "efcp_run.json").read_text())
    assert found["finished"] and found["optimizer"]["name"] == name
    assert sum(found["optimizer"]["memory"].values()) > 0
    if name == "adamw_torch":
        assert found["optimizer"]["memory"] == found["optimizer"]["adamw"]


@pytest.mark.parametrize("trouble", ["no loss was logged", "report.html: cannot be written", "efcp_run.json"])
def test_a_run_does_not_end_for_its_report(trouble, tmp_path, make_args, tiny_bert, token_data, caplog):
    pytest.importorskip("matplotlib")
    folder, few = tmp_path / "out", dict(FEW)
    if trouble == "no loss was logged":
        few["logging_steps"] = 500
    else:  # a folder is in the file's place
        (folder / trouble.partition(":")[0] / "x").mkdir(parents=True)
    args = make_args(optim=NAMES[0], optim_args="report=true", save_strategy="no", **few)
    assert Trainer(tiny_bert, args, train_dataset=token_data).train().global_step == 4
    (line,) = [record.getMessage() for record in caplog.records if "its report was not written" in record.getMessage()]
    assert trouble in line


def test_nothing_is_written_unasked(tmp_path, make_args, tiny_bert, token_data):
    Trainer(tiny_bert, make_args(optim=NAMES[0], save_strategy="no", **FEW), train_dataset=token_data).train()
    assert not (tmp_path / "out" / "efcp_run.json").exists()


def test_without_matplotlib_it_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(run_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="report=true: the report needs matplotlib"):
        EFCPTrainingArguments(str(tmp_path), efcp_report=True, **FEW)
