"""Each remark comes with what causes it, and with its figure; a run without fault gets none of them."""

import re

import pytest

from hf_efcp.report.advice import advise
from hf_efcp.report.read import read
from tests.report.runs import DIAGNOSTICS, logs, record

NEW = {
    "skipped": ({"skipped_steps": 3}, {}, r"3 of 43 steps were refused"),
    "rising": ({}, {"end": 2.5}, r"rose from 2.09 to 2.47\. Lower the learning rate \(0.0001 now\)"),
    "overfitting": ({}, {"evaluations": (1.0, 0.7, 0.9, 1.2)}, r"least at step 20 \(0.7\) and is 1.2 now"),
    "fast": ({"relative_step": 0.05}, {}, r"by 5.0% of their norm"),
    "against": ({"angle_update_gradient": 100.0}, {}, r"100 degrees"),
    "lossy": ({"compression_error": 0.99}, {}, r"leaves out 99.0%.*Raise rank above 4"),
    "heavy": ({"error_mass": 30.0}, {}, r"holds 30.0 gradients"),
    "cancels": ({"kappa": 1e4}, {}, r"kappa is 10000 .*shorter than 8"),
}


@pytest.mark.parametrize("case", NEW)
def test_what_is_off_is_said_with_its_figure(case, tmp_path):
    diagnostics, given, message = NEW[case]
    remarks = advise(read([record(tmp_path, logs(**{**DIAGNOSTICS, **diagnostics}, **given))]))
    assert remarks[0].kind == "change"
    (found,) = [r for r in remarks if r.kind == "change"]
    assert re.search(message, found.text)


def test_a_run_without_fault(tmp_path):
    remarks = advise(read([record(tmp_path, logs(**DIAGNOSTICS))]))
    assert {r.kind for r in remarks} == {"try", "fine"}  # its loss still falls
    assert any("No figure of this report is out of its usual range" in r.text for r in remarks)
    assert any(r.text == "The optimizer takes 3.00 bytes for each trained parameter, and AdamW takes 8.01." for r in remarks)


def test_what_may_be_better(tmp_path):
    def text(**given):
        return " ".join(r.text for r in advise(read([record(tmp_path, logs(**given))])) if r.kind == "try")

    assert "No diagnostics were logged" in text()
    assert "The newest entry has 99% of the weight" in text(**{**DIAGNOSTICS, "weight_newest": 0.99})
    assert "1.0e-07 of their norm" in text(**{**DIAGNOSTICS, "relative_step": 1e-7})


def test_runs_are_compared(tmp_path):
    folders = [record(tmp_path / "ours", logs()), record(tmp_path / "adamw", logs(evaluations=(1, 0.9)), "adamw_torch", 1.0)]
    remarks = {(r.run, r.text) for r in advise(read(folders)) if r.kind == "fine"}
    assert ("ours", "Its last eval_loss is the least of all runs: 0.8, against 0.9 (adamw).") in remarks
    text = "Its steps are the fastest: 1 s each, evaluation included. Others take 2.00 times as long (ours)."
    assert ("adamw", text) in remarks


def test_times_of_a_busy_machine_are_not_compared(tmp_path):
    def fine(share):
        folders = [record(tmp_path / f"{n} {share}", logs(), seconds=n, processor_share=share) for n in (1.0, 2.0)]
        return advise(read(folders))

    assert "fastest" in " ".join(r.text for r in fine(0.95))
    assert "fastest" in " ".join(r.text for r in fine(None))
    remarks = fine(0.33)
    assert "fastest" not in " ".join(r.text for r in remarks)
    assert sum(r.text.startswith("The process computed in 33% of its time.") for r in remarks if r.kind == "try") == 2
