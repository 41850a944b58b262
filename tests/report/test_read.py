"""What is read from a run's folder, and what is said of one that cannot be read."""

import json

import pytest

from hf_efcp.options import OptionError
from hf_efcp.report.read import metrics, read
from tests.report.runs import DIAGNOSTICS, logs, record


def test_curves_diagnostics_and_seconds(tmp_path):
    (run,) = read([record(tmp_path / "run", logs(**DIAGNOSTICS))])
    assert run.title == "run" and run.exact
    assert run.curves["loss"].steps[:2] == (5, 10) and run.curves["loss"].last == 0.5
    assert run.curves["eval_loss"].values == (1.0, 0.8)
    assert run.diagnostics["kappa"].values == (1.1,) * 8 and "efcp_kappa" not in run.curves
    assert run.seconds([5, 12, 40]) == [10.0, 24.0, 80.0]
    assert metrics([run]) == ["loss", "eval_loss"]


def test_a_run_of_anybody_without_a_record(tmp_path):
    """Trainer's own file, in the newest checkpoint; its seconds are divided evenly."""
    for number in (5, 40):
        (tmp_path / f"checkpoint-{number}").mkdir()
        history = [*logs(steps=number), {"train_runtime": 60.0, "train_loss": 1.0, "step": number}]
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run,) = read([tmp_path])
    assert run.curves["loss"].steps[-1] == 40 and not run.exact and run.name == ""
    assert run.seconds([20]) == [30.0] and run.summary["train_runtime"] == 60
    assert "train_loss" not in run.curves


def test_evaluations_that_came_after_the_record_are_taken(tmp_path):
    history = logs()
    record(tmp_path, history)
    later = [*history, {"eval_loss": 0.7, "step": 41}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": later}))
    assert read([tmp_path])[0].curves["eval_loss"].last == 0.7


def test_folders_of_one_name_are_told_apart(tmp_path):
    runs = read([record(tmp_path / side / "out", logs()) for side in "ab"])
    assert [run.title for run in runs] == ["a/out", "b/out"]
    with pytest.raises(OptionError, match="same folder is given twice"):
        read([tmp_path / "a" / "out"] * 2)


def test_what_cannot_be_read_is_one_clear_error(tmp_path):
    def fails(message, folder=tmp_path / "run"):
        with pytest.raises(OptionError, match=message):
            read([folder])

    fails("no such folder", tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    fails("neither efcp_run.json nor trainer_state.json")
    file = tmp_path / "run" / "efcp_run.json"
    for content, message in {
        '{"version": 1, "log_his': "is no JSON, or was cut short",
        "[]": "a JSON object was expected, found list",
        '{"version": 2}': "version 2, and this hf_efcp reads version 1",
        '{"version": 1, "log_history": {}}': "log_history is missing, or no list",
        '{"version": 1, "log_history": [{"step": 1, "loss": "low"}]}': "no loss was logged",
        '{"version": 1, "log_history": [{"step": 1, "loss": 1}], "times": [1]}': "times",
        '{"version": 1, "log_history": [{"step": 1, "loss": 1}], "processor_share": "all"}': "processor_share",
        '{"version": 1, "log_history": [{"step": 1, "loss": 1}], "optimizer": "ours"}': "optimizer",
        '{"version": 1, "log_history": [{"step": 1, "loss": 1}], "optimizer": {"memory": {"window": "much"}}}': "memory",
    }.items():
        file.write_text(content)
        fails(message)
    with pytest.raises(OptionError, match="no folder"):
        read([])
